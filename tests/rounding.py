"""Bounds on what rounding may do, from the type, the number of summands and the size of what is compared.

A sum of n terms in floating point is within n eps/2 of the true one, as a share of the terms' sizes added up (Higham, Accuracy
and Stability of Numerical Algorithms, section 4.2). So two sums of the same terms in different orders, which is what another
instruction set, batch or layout comes to, are within n eps of each other. Errors of one CPU are many times smaller, for
roundings cancel; a mistake is many times larger.
"""

import torch

LAYERS, WIDEST = 2, 32  # of fakes.make_checkpoint: its MLP has the longest products


def rounding(summands: int, dtype: torch.dtype = torch.float32) -> float:
    """The share of the terms' sizes by which two sums of so many terms in `dtype` may differ."""
    return summands * torch.finfo(dtype).eps

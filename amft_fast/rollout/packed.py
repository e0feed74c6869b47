"""Weights in the order in which oneDNN's products of few rows read them, on a CPU.

A decoded token reads every weight once for a few rows. The plain product then spends much of its time on bringing the weights
into its kernels' order, each time anew. Here that is done once for a call of the engine, on first use; it pays from some five
tokens on and takes as much memory as the weights until the call ends. Measured (docs/rollouts.md): 1.2 to 1.8 times as fast in
fp32, 1.4 to 2.4 times in bf16; for other sizes and more rows it is no faster, and nothing is packed.
"""

from __future__ import annotations

import functools

import torch

# Of a type: bytes of a weight from which it pays, and the rows between which.
PAYS = {torch.float32: (2 << 20, 2, 64), torch.bfloat16: (256 << 10, 1, 256)}


@functools.cache
def served(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have such products: bf16 wants AVX-512 or AVX-NE-CONVERT."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def pays(dtype: torch.dtype, size: int) -> bool:
    """Whether a weight of so many bytes is packed on this CPU, for the rows that it then takes."""
    return dtype in PAYS and size >= PAYS[dtype][0] and served(dtype)


class Packed:
    """x Wᵀ for weights W [out, in] side by side, without bias."""

    def __init__(self, *weights: torch.Tensor) -> None:
        self.weights = weights
        self.ordered: torch.Tensor | None = None
        w = weights[0]
        size = sum(w.numel() for w in weights) * w.element_size()
        self.fewest, self.most = PAYS[w.dtype][1:] if w.device.type == "cpu" and pays(w.dtype, size) else (0, -1)

    def takes(self, rows: int) -> bool:
        return self.fewest <= rows <= self.most

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.ordered is None:
            weight = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)
            self.ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        return torch.ops.mkldnn._linear_pointwise(x, self.ordered, None, "none", [], "")

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ of bf16 in fp32: the product, and what rounding took off it, as the loss head has them (kernels/matmul.py)."""
        rounded = self(x)
        lost = torch.ops.mkldnn._linear_pointwise.binary(x, rounded, self.ordered, None, "sub")
        return rounded.float().add_(lost)

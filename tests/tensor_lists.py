"""Lists of tensors of odd shapes and mixed dtypes for multi_tensor_dot."""

import torch

from amft_fast.multi_tensor import AdamState

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Empty, scalar, shorter than a vector, not a multiple of one, and longer than a chunk of the CPU (32768) and the GPU (8192).
SHAPES = [(3,), (0,), (), (37, 129), (5, 7), (8192,), (2, 0), (40001,), (1,)]
# Dtypes of u, gradients and AdamW's state; a list of dtypes is dealt out along the tensors.
MIXTURES = {
    "fp32": (F32, F32, F32),
    "bf16-u-and-gradients": (BF16, BF16, F32),
    "bf16-gradients": (F32, BF16, F32),
    "bf16": (BF16, BF16, BF16),
    "fp64": (F64, F64, F64),
    "mixed-within-lists": ([F32, BF16, F64], [BF16, F32], [F32, F64]),
}


def make_lists(mixture=(F32, F32, F32), shapes=SHAPES, device="cpu", offset=0, seed=0):
    """u1, u2, g1, total, exp_avg, exp_avg_sq. `offset` shifts every tensor's start, in elements, in a larger buffer."""
    generator = torch.Generator().manual_seed(seed)

    def make(dtypes, scale):
        dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
        tensors = []
        for i, shape in enumerate(shapes):
            x = torch.randn(shape, generator=generator) * scale
            buffer = torch.empty(x.numel() + offset, dtype=dtypes[i % len(dtypes)], device=device)
            tensors.append(buffer[offset:].view(shape).copy_(x))
        return tensors

    u, g, s = mixture
    lists = [make(u, 1.0), make(u, 2.0), make(g, 0.1), make(g, 0.1), make(s, 0.05), make(s, 0.01)]
    for x in lists[5]:
        x.abs_()
    # Elements that never had a gradient, whose second moment stays 0; and some whose gradient is new.
    for tensors in lists[2:]:
        tensors[3][::3, 1] = 0
    for tensors in lists[4:]:
        tensors[3][::5, 2] = 0
    return lists


def adam_state(lists, **changes):
    values = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "step": 7, "clip": 0.6} | changes
    return AdamState(lists[4], lists[5], **values)


def call(function, lists, num_u, adam):
    return function(lists[:num_u], lists[2], lists[3], adam)

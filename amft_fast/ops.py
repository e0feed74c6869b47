"""The one place that picks Triton, torch or C++ for an operation, and can say why."""

from __future__ import annotations

import torch
from amft_kernels.backends import triton_obstacle
from amft_kernels.chunks import default_chunk_bytes
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import PolicyLoss, linear_policy_loss
from amft_kernels.loss_forms import LossForm, OwnLoss, value_and_slope
from amft_kernels.matmul import bf16_is_faster, compute_dtype, cpu_scratch_bytes, logits_into

from amft_fast.multi_tensor import AdamState, backends, multi_tensor_dot

__all__ = [
    "AdamState",
    "LossForm",
    "OwnLoss",
    "PolicyLoss",
    "bf16_is_faster",
    "chunk_bytes",
    "compute_dtype",
    "cpu_scratch_bytes",
    "decode_attention",
    "explain",
    "linear_logprob",
    "linear_policy_loss",
    "logits_into",
    "multi_tensor_dot",
    "triton_obstacle",
    "value_and_slope",
]


def explain(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(operation, backend used on `device`, reason) for each operation."""
    kind = torch.device(device).type
    obstacle = triton_obstacle(kind, torch.float32)
    if kind == "cuda" and obstacle is None:
        head = ("triton", "CUDA device and triton are there")
    else:
        head = ("torch", obstacle or "chunked torch is the CPU path; Triton's interpreter is for tests")
    dot, _, why = backends()[kind].partition(" (")
    native = ("multi_tensor_dot", dot, why.rstrip(")") or "the native extension was built at install")
    return [("linear_policy_loss", *head), ("linear_logprob", *head), native]


def chunk_bytes(device: torch.device | str, memory: int | None = None) -> int:
    """The loss head's workspace on `device`, in bytes; `memory`: of a device that is not this machine's."""
    return default_chunk_bytes(torch.device(device), memory)


def decode_attention(*args, **kwargs) -> torch.Tensor:
    """`amft_kernels.decode_attention`, which needs Triton and is loaded when it is called."""
    from amft_kernels.decode_attention import decode_attention

    return decode_attention(*args, **kwargs)

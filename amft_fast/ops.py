"""The one place that picks Triton, torch or C++ for an operation, and can say why."""

from __future__ import annotations

import importlib.util

import torch
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import PolicyLoss, linear_policy_loss

__all__ = ["PolicyLoss", "explain", "linear_logprob", "linear_policy_loss"]


def explain(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(operation, backend used on `device`, reason) for each operation."""
    cuda = torch.device(device).type == "cuda"
    triton = importlib.util.find_spec("triton") is not None
    if cuda and triton:
        head = ("triton", "CUDA device and triton are there")
    elif cuda:
        head = ("torch", "CUDA device, but triton is not installed: pip install triton")
    else:
        head = ("torch", "chunked torch is the CPU path; Triton needs a GPU")
    return [("linear_policy_loss", *head), ("linear_logprob", *head)]

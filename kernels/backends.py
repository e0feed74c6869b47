"""Which backend serves a head, and why."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

BACKENDS = ("auto", "triton", "torch")


def choose_backend(backend: str, hidden: torch.Tensor) -> str:
    """ "triton" or "torch" for this call; `ValueError` when the one asked for cannot serve."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return "torch"
    obstacle = triton_obstacle(hidden.device.type, hidden.dtype)
    if obstacle is None:
        # The interpreter is for tests: "auto" leaves the CPU to torch.
        return "triton" if backend == "triton" or hidden.is_cuda else "torch"
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot be used: {obstacle}")
    return "torch"


def triton_obstacle(device: str, dtype: torch.dtype) -> str | None:
    """What keeps Triton from serving tensors of this kind, or None."""
    if not _has_triton():
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, hidden is float64"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton needs a CUDA device, hidden is on {device}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def plain_arithmetic(tensor: torch.Tensor) -> Iterator[None]:
    """No graph, and Triton's launches on the tensor's device. (Autocast leaves operations with `out=` alone.)"""
    on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with torch.no_grad(), on_device:
        yield

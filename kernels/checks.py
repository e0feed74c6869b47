"""What both heads demand of their arguments. Every refusal is a `ValueError` that names the argument and what was got.

Checks that read device memory (are the targets in range?) are made on the CPU alone: on CUDA they would stop the host
until the device has caught up. There the kernels turn a bad row into NaN and set a flag instead.
"""

from __future__ import annotations

import torch

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float | torch.Tensor,
    logit_softcap: float | None,
) -> int:
    """Check what describes the head itself; returns the number of real vocabulary columns."""
    if hidden_NH.dim() != 2:
        raise ValueError(
            f"hidden must be 2-D [N, H] (flatten batch and time first), got shape {tuple(hidden_NH.shape)}"
        )
    if hidden_NH.dtype not in _FLOATS:
        raise ValueError(f"hidden must be float64, float32, bfloat16 or float16, got {hidden_NH.dtype}")
    if weight_VH.dim() != 2 or weight_VH.shape[1] != hidden_NH.shape[1]:
        raise ValueError(f"weight must be [V, H] with H = {hidden_NH.shape[1]}, got shape {tuple(weight_VH.shape)}")
    _same_kind("weight", weight_VH, hidden_NH)

    vocab = weight_VH.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab <= weight_VH.shape[0]:
        raise ValueError(f"vocab_size must lie in [1, {weight_VH.shape[0]}] (the rows of weight), got {vocab_size}")
    if bias_V is not None:
        if bias_V.shape != weight_VH.shape[:1]:
            raise ValueError(f"bias must be [V] with V = {weight_VH.shape[0]}, got shape {tuple(bias_V.shape)}")
        _same_kind("bias", bias_V, hidden_NH)

    _check_targets(targets_N, hidden_NH, vocab, ignore_index)
    if isinstance(temperature, torch.Tensor):
        check_per_token("temperature", temperature, hidden_NH)
        if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be > 0 on every row, got {temperature.min().item():g}")
    else:
        check_number("temperature", temperature, above=0.0)
    if logit_softcap is not None:
        check_number("logit_softcap", logit_softcap, above=0.0)
    return vocab


def check_per_token(name: str, value: torch.Tensor, hidden_NH: torch.Tensor) -> None:
    """Refuse a per-token tensor of the wrong shape, type or device, or one that asks for a gradient it will not get."""
    if not isinstance(value, torch.Tensor) or value.shape != hidden_NH.shape[:1]:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor [N] with N = {hidden_NH.shape[0]}, got {got}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if value.device != hidden_NH.device:
        raise ValueError(f"{name} must be on hidden's device {hidden_NH.device}, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is taken as a constant, got a tensor that requires grad: detach it")


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    """Refuse anything but a finite number in range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # `not (x > y)` also refuses NaN.
    if above is not None and not (number and above < value < float("inf")):
        raise ValueError(f"{name} must be a finite number > {above:g}, got {value!r}")
    if least is not None and not (number and least <= value < float("inf")):
        raise ValueError(f"{name} must be a finite number ≥ {least:g}, got {value!r}")


def check_chunk_bytes(chunk_bytes: int | None, vocab: int) -> None:
    """The workspace must hold one row of logits (8 bytes each, for float64 too)."""
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 8 * vocab):
        raise ValueError(
            f"chunk_bytes must be an int that holds a row of logits ({8 * vocab} bytes), got {chunk_bytes!r}"
        )


def check_weight_grad(weight_grad: torch.Tensor | None, weight_VH: torch.Tensor) -> None:
    """A main-gradient buffer is fp32 (fp64 for an fp64 weight), contiguous, and shaped like the weight."""
    if weight_grad is None:
        return
    want = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
    if weight_grad.shape != weight_VH.shape or weight_grad.dtype != want or not weight_grad.is_contiguous():
        got = f"{tuple(weight_grad.shape)} {weight_grad.dtype}, contiguous: {weight_grad.is_contiguous()}"
        raise ValueError(f"weight_grad must be a contiguous {want} tensor of shape {tuple(weight_VH.shape)}, got {got}")
    if weight_grad.device != weight_VH.device or weight_grad.requires_grad:
        got = f"{weight_grad.device}, requires_grad: {weight_grad.requires_grad}"
        raise ValueError(f"weight_grad must be a plain buffer on {weight_VH.device}, got one on {got}")


def _same_kind(name: str, value: torch.Tensor, hidden_NH: torch.Tensor) -> None:
    if value.dtype != hidden_NH.dtype:
        raise ValueError(f"{name} must have hidden's dtype {hidden_NH.dtype}, got {value.dtype}")
    if value.device != hidden_NH.device:
        raise ValueError(f"{name} must be on hidden's device {hidden_NH.device}, got {value.device}")


def _check_targets(targets_N: torch.Tensor, hidden_NH: torch.Tensor, vocab: int, ignore_index: int) -> None:
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"targets must be [N] with N = {hidden_NH.shape[0]}, got shape {tuple(targets_N.shape)}")
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32, got {targets_N.dtype}")
    if targets_N.device != hidden_NH.device:
        raise ValueError(f"targets must be on hidden's device {hidden_NH.device}, got {targets_N.device}")
    if targets_N.device.type == "cpu":
        outside = (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= vocab))
        if bool(outside.any()):
            bad = targets_N[outside][0].item()
            raise ValueError(f"targets must lie in [0, {vocab}) or be ignore_index = {ignore_index}, got {bad}")

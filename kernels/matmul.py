"""The matrix products of the loss head, over caller-owned memory, with logits and weight gradients in fp32.

    logits_into          x_NV  = h_NH W_VHᵀ + b        hidden_grad_into    dh_NH = g_NV W_VH
    weight_grad_into     dW_VH = g_NVᵀ h_NH  (or +=)

bf16 logits are off by up to 0.06 at |z| ≈ 16–32, which would go straight into the policy ratio; so low-precision
operands give fp32 results here. CUDA has GEMMs for that (`out_dtype`); on the CPU operands are upcast slab by slab.

Legend: N rows, V vocabulary columns, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Operand copies and GEMM outputs on the CPU come in vocabulary slabs of at most this many bytes: they stay in L3.
_SLAB_BYTES = 8 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every training type, fp64 for fp64 (tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_into(
    out_NV: torch.Tensor, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
) -> None:
    """out = h Wᵀ + b, in out's dtype."""
    if hidden_NH.dtype == out_NV.dtype:
        torch.mm(hidden_NH, weight_VH.t(), out=out_NV)
    elif out_NV.is_cuda:
        torch.mm(hidden_NH, weight_VH.t(), out_dtype=out_NV.dtype, out=out_NV)
    else:
        wide_NH = hidden_NH.to(out_NV.dtype)
        for slab in _slabs(weight_VH, out_NV):
            torch.mm(wide_NH, weight_VH[slab].to(out_NV.dtype).t(), out=out_NV[:, slab])
    if bias_V is not None:
        out_NV.add_(bias_V)


def hidden_grad_into(
    out_NH: torch.Tensor, grad_NV: torch.Tensor, weight_VH: torch.Tensor, *, accumulate: bool = False
) -> torch.Tensor:
    """out (+)= g W, returned. `grad_NV` is in the weight's dtype on CUDA and may be wider on the CPU."""
    if grad_NV.dtype == weight_VH.dtype:
        return _product_into(out_NH, grad_NV, weight_VH, accumulate)
    wide_NH = out_NH if accumulate else torch.zeros(out_NH.shape, dtype=grad_NV.dtype, device=out_NH.device)
    for slab in _slabs(weight_VH, grad_NV):
        wide_NH.addmm_(grad_NV[:, slab], weight_VH[slab].to(grad_NV.dtype))
    return wide_NH if accumulate else out_NH.copy_(wide_NH)


def weight_grad_into(
    out_VH: torch.Tensor, grad_NV: torch.Tensor, hidden_NH: torch.Tensor, *, accumulate: bool
) -> torch.Tensor:
    """out (+)= gᵀ h, returned. The first chunk of rows need not read `out`: that saves a pass over [V, H]."""
    return _product_into(out_VH, grad_NV.t(), hidden_NH.to(grad_NV.dtype), accumulate)


def _product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, accumulate: bool) -> torch.Tensor:
    if out.dtype == left.dtype:
        return torch.addmm(out, left, right, beta=float(accumulate), out=out)
    if out.is_cuda and accumulate:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    if out.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    # The CPU's operands are at least as wide as `out`: the last rounding is of the sum.
    return out.copy_(torch.addmm(out.to(left.dtype), left, right) if accumulate else torch.mm(left, right))


def _slabs(weight_VH: torch.Tensor, wide_NV: torch.Tensor) -> Iterator[slice]:
    """Vocabulary slices whose upcast operands and products both stay within `_SLAB_BYTES`."""
    vocab = weight_VH.shape[0]
    width = max(wide_NV.shape[0], weight_VH.shape[1], 1)
    step = max(1, _SLAB_BYTES // (width * wide_NV.element_size()))
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab))

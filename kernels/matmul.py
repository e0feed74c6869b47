"""The matrix products of the loss head, over caller-owned memory, with logits and weight gradients in fp32.

    logits_into          x_NV  = h_NH W_VHᵀ + b        hidden_grad_into    dh_NH (+)= g_NV W_VH
    weight_grad_into     dW_VH (+)= g_NVᵀ h_NH

bf16 logits are off by up to 0.06 at |z| ≈ 16–32, which would go straight into the policy ratio; so low-precision
operands give fp32 results here. CUDA has GEMMs for that (`out_dtype`); on the CPU operands are upcast slab by slab.

Legend: N rows, V vocabulary columns, H hidden size; m, n, k: the sides of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

# Operand copies and products on the CPU come in vocabulary slabs of at most this many bytes: they stay in L3.
_SLAB_BYTES = 4 << 20

# Multiply-adds from which a product is worth oneDNN's set-up of about 2 ms for a shape it has not seen.
_ONEDNN_WORK = 1 << 27


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every training type, fp64 for fp64 (tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrowed(grad_NV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient in the dtype its products want: the weight's on a GPU, fp32 on a CPU, which has no mixed products."""
    return grad_NV if grad_NV.device.type == "cpu" else grad_NV.to(dtype)


def widened(grad_NV: torch.Tensor) -> torch.Tensor:
    """A kernel's gradient in the dtype its products want, also on the CPU (the interpreter)."""
    return grad_NV.to(compute_dtype(grad_NV.dtype)) if grad_NV.device.type == "cpu" else grad_NV


def logits_into(
    out_NV: torch.Tensor, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
) -> None:
    """out = h Wᵀ + b, in out's dtype."""
    if out_NV.device.type == "cpu":
        wide_NH = hidden_NH.to(out_NV.dtype)
        for slab in _slabs(out_NV, weight_VH):
            _cpu_product(out_NV[:, slab], wide_NH, weight_VH[slab].to(out_NV.dtype), accumulate=False)
    elif hidden_NH.dtype == out_NV.dtype:
        torch.mm(hidden_NH, weight_VH.t(), out=out_NV)
    else:
        torch.mm(hidden_NH, weight_VH.t(), out_dtype=out_NV.dtype, out=out_NV)
    if bias_V is not None:
        out_NV.add_(bias_V)


def hidden_grad_into(
    out_NH: torch.Tensor, grad_NV: torch.Tensor, weight_VH: torch.Tensor, *, accumulate: bool = False
) -> None:
    """out (+)= g W. `grad_NV` has the weight's dtype on CUDA and may be wider on the CPU."""
    if out_NH.device.type != "cpu":
        _cuda_product(out_NH, grad_NV, weight_VH, accumulate)
        return
    if grad_NV.dtype == weight_VH.dtype:
        _cpu_product(out_NH, grad_NV, weight_VH.t(), accumulate)
        return
    wide_NH = out_NH if accumulate else torch.zeros_like(out_NH, dtype=grad_NV.dtype)
    for slab in _slabs(grad_NV, weight_VH):
        _cpu_product(wide_NH, grad_NV[:, slab], weight_VH[slab].to(grad_NV.dtype).t(), accumulate=True)
    if not accumulate:
        out_NH.copy_(wide_NH)


def weight_grad_into(out_VH: torch.Tensor, grad_NV: torch.Tensor, hidden_NH: torch.Tensor, *, accumulate: bool) -> None:
    """out (+)= gᵀ h. The first chunk of rows need not read `out`: that saves a pass over [V, H]."""
    hidden_NH = hidden_NH.to(grad_NV.dtype)
    if out_VH.device.type != "cpu":
        _cuda_product(out_VH, grad_NV.t(), hidden_NH, accumulate)
        return
    for slab in _slabs(grad_NV, out_VH):
        _cpu_product(out_VH[slab], grad_NV[:, slab].t(), hidden_NH.t(), accumulate)


def _cuda_product(out_mn: torch.Tensor, left_mk: torch.Tensor, right_kn: torch.Tensor, accumulate: bool) -> None:
    if out_mn.dtype == left_mk.dtype:
        torch.addmm(out_mn, left_mk, right_kn, beta=float(accumulate), out=out_mn)
    elif accumulate:
        torch.addmm(out_mn, left_mk, right_kn, out_dtype=out_mn.dtype, out=out_mn)
    else:
        torch.mm(left_mk, right_kn, out_dtype=out_mn.dtype, out=out_mn)


def _cpu_product(out_mn: torch.Tensor, left_mk: torch.Tensor, right_nk: torch.Tensor, accumulate: bool) -> None:
    """out (+)= left @ rightᵀ; operands in one dtype."""
    if _onednn_suits(left_mk, right_nk):
        product_mn = torch.ops.mkldnn._linear_pointwise(left_mk.contiguous(), right_nk, None, "none", [], "")
        out_mn.add_(product_mn) if accumulate else out_mn.copy_(product_mn)
    else:
        torch.addmm(out_mn, left_mk, right_nk.t(), beta=float(accumulate), out=out_mn)


def _onednn_suits(left_mk: torch.Tensor, right_nk: torch.Tensor) -> bool:
    """Whether to leave a product to oneDNN: on AVX-512 machines of AMD, torch's MKL stays with AVX2 and runs at half speed.

    Operands must be dense, or oneDNN falls back to a reference loop a thousand times slower.
    """
    (m, k), n = left_mk.shape, right_nk.shape[0]
    dense = right_nk.is_contiguous() or right_nk.t().is_contiguous()
    return left_mk.dtype == torch.float32 and m * n * k >= _ONEDNN_WORK and dense and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    # An op of Inductor's, not of torch's public interface: without it the same products are taken by MKL.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


def _slabs(wide_NV: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[slice]:
    """Slices of the vocabulary whose part of either operand stays within `_SLAB_BYTES`."""
    vocab, width = weight_VH.shape[0], max(*wide_NV.shape[:1], weight_VH.shape[1], 1)
    count = -(-vocab * width * wide_NV.element_size() // _SLAB_BYTES)
    step = max(1, -(-vocab // max(1, count)))
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab))

"""The matrix products of the loss head, over caller-owned memory, with logits and weight gradients in fp32.

    logits_into          x_NV  = h_NH W_VHᵀ + b        hidden_grad_into    dh_NH (+)= g_NV W_VH
    weight_grad_into     dW_VH (+)= g_NVᵀ h_NH

bf16 logits are off by up to 0.06 at |z| ≈ 16–32, which would go straight into the policy ratio; so low-precision
operands give fp32 results here. CUDA has GEMMs for that (`out_dtype`). On a CPU operands are upcast slab by slab; where its
bf16 products leave the fp32 ones far behind (AMX), two of them make the logits, and one each of the gradients.

Legend: N rows, V vocabulary columns, H hidden size; m, n, k: the sides of one product.
"""

from __future__ import annotations

import functools
import os
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
        dtype = _cpu_operands(hidden_NH.dtype, out_NV.dtype)
        left_NH = hidden_NH.to(dtype)
        for slab in _slabs(out_NV, weight_VH):
            _cpu_product(out_NV[:, slab], left_NH, weight_VH[slab].to(dtype), accumulate=False, whole=True)
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
    dtype = _cpu_operands(weight_VH.dtype, grad_NV.dtype)
    for slab in _slabs(grad_NV, weight_VH):
        _cpu_product(wide_NH, grad_NV[:, slab].to(dtype), weight_VH[slab].to(dtype).t(), accumulate=True)
    if not accumulate:
        out_NH.copy_(wide_NH)


def weight_grad_into(out_VH: torch.Tensor, grad_NV: torch.Tensor, hidden_NH: torch.Tensor, *, accumulate: bool) -> None:
    """out (+)= gᵀ h. The first chunk of rows need not read `out`: that saves a pass over [V, H]."""
    if out_VH.device.type != "cpu":
        _cuda_product(out_VH, grad_NV.t(), hidden_NH.to(grad_NV.dtype), accumulate)
        return
    dtype = _cpu_operands(hidden_NH.dtype, grad_NV.dtype)
    hidden_NH = hidden_NH.to(dtype)
    for slab in _slabs(grad_NV, out_VH):
        _cpu_product(out_VH[slab], grad_NV[:, slab].to(dtype).t(), hidden_NH.t(), accumulate)


def _cuda_product(out_mn: torch.Tensor, left_mk: torch.Tensor, right_kn: torch.Tensor, accumulate: bool) -> None:
    if out_mn.dtype == left_mk.dtype:
        torch.addmm(out_mn, left_mk, right_kn, beta=float(accumulate), out=out_mn)
    elif accumulate:
        torch.addmm(out_mn, left_mk, right_kn, out_dtype=out_mn.dtype, out=out_mn)
    else:
        torch.mm(left_mk, right_kn, out_dtype=out_mn.dtype, out=out_mn)


def _cpu_product(
    out_mn: torch.Tensor, left_mk: torch.Tensor, right_nk: torch.Tensor, accumulate: bool, whole: bool = False
) -> None:
    """out (+)= left @ rightᵀ; operands in one dtype: out's, or bf16 for an out in fp32.

    Of bf16 the product is rounded before it is added, unless it is wanted `whole`, 2⁻¹⁷ of it off at most beside rounding in
    fp32: a second one takes the rounded first off before it is rounded itself, in the fp32 sums that a product keeps, and so
    is what was lost.
    """
    if left_mk.dtype != out_mn.dtype:
        rounded_mn = left_mk @ right_nk.t()
        out_mn.add_(rounded_mn) if accumulate else out_mn.copy_(rounded_mn)
        if whole:
            out_mn.add_(torch.addmm(rounded_mn, left_mk, right_nk.t(), beta=-1))
    elif _onednn_suits(left_mk, right_nk):
        product_mn = torch.ops.mkldnn._linear_pointwise(left_mk.contiguous(), right_nk, None, "none", [], "")
        out_mn.add_(product_mn) if accumulate else out_mn.copy_(product_mn)
    else:
        torch.addmm(out_mn, left_mk, right_nk.t(), beta=float(accumulate), out=out_mn)


def _cpu_operands(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """The dtype of the operands of a CPU's products of `dtype` with results in `wide`: bf16 stays where it is faster."""
    return dtype if dtype == torch.bfloat16 and wide == torch.float32 and bf16_is_faster() else wide


@functools.cache
def bf16_is_faster() -> bool:
    """Whether two bf16 products cost less than one in fp32: with AMX they run at four to eight times its speed."""
    limit = _onednn_limit()
    held = limit not in ("", "DEFAULT", "ALL") and "AMX" not in limit
    return not held and torch.cpu.get_capabilities().get("amx_bf16", False) and torch.backends.mkldnn.is_available()


def _onednn_suits(left_mk: torch.Tensor, right_nk: torch.Tensor) -> bool:
    """Whether to leave a product to oneDNN: on AVX-512 machines of AMD, torch's MKL stays with AVX2 and runs at half speed.

    Operands must be dense, or oneDNN falls back to a reference loop a thousand times slower.
    """
    (m, k), n = left_mk.shape, right_nk.shape[0]
    dense = right_nk.is_contiguous() or right_nk.t().is_contiguous()
    return left_mk.dtype == torch.float32 and m * n * k >= _ONEDNN_WORK and dense and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN may use AVX-512: torch's own kernels and oneDNN's are held below it by variables of their own."""
    held = _onednn_limit() in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
    return not held and "AVX512" in torch.backends.cpu.get_cpu_capability() and has_onednn()


def _onednn_limit() -> str:
    """The instruction set that oneDNN is held to by variables of its own; empty: none."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def has_onednn() -> bool:
    """Whether this torch has the op; an op of Inductor's, not of torch's public interface. Without it MKL serves."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _slabs(wide_NV: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[slice]:
    """Slices of the vocabulary whose part of either operand stays within `_SLAB_BYTES`."""
    vocab = weight_VH.shape[0]
    step = _slab_columns(wide_NV.shape[0], vocab, weight_VH.shape[1], wide_NV.element_size())
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab))


def _slab_columns(rows: int, vocab: int, hidden: int, width: int) -> int:
    count = -(-vocab * max(rows, hidden, 1) * width // _SLAB_BYTES)
    return max(1, -(-vocab // max(1, count)))


def cpu_scratch_bytes(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> int:
    """The most that the three products over a chunk of `rows` rows allocate beside operands and results, on this CPU.

    bf16 products of AMX take two of their own for the logits, then ∂L/∂x of a slab in bf16 and a product of either gradient.
    MKL writes where it is told: it needs the fp32 copies of operands of a narrower `dtype` and nothing else. oneDNN's op
    returns a product of its own, and wants the left operand contiguous, which the columns of a slab are not.
    """
    wide = compute_dtype(dtype)
    b, columns = wide.itemsize, _slab_columns(rows, vocab, hidden, wide.itemsize)
    narrow = dtype != wide
    if narrow and _cpu_operands(dtype, wide) == dtype:
        slab = 2 * rows * columns
        return max(2 * slab, 4 * rows * hidden + slab + 2 * rows * hidden, slab + 2 * columns * hidden)
    of_rows, of_weight, of_logits = b * rows * hidden, b * columns * hidden, b * rows * columns
    onednn = wide == torch.float32 and _onednn_is_faster()
    by_slab = onednn and rows * columns * hidden >= _ONEDNN_WORK
    at_once = onednn and rows * vocab * hidden >= _ONEDNN_WORK
    logits = (of_rows + of_weight if narrow else 0) + (of_logits if by_slab else 0)
    if narrow:
        cut = of_logits if columns < vocab else 0
        hidden_grad = of_rows + of_weight + (cut + of_rows if by_slab else 0)
    else:
        hidden_grad = of_rows if at_once else 0
    weight_grad = (of_rows if narrow else 0) + (of_logits + of_weight if by_slab else 0)
    return max(logits, hidden_grad, weight_grad)

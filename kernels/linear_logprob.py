"""Log-probs and exact entropy of targets under a linear head, both differentiable, without logits [N, V] in memory.

    x_i = W h_i + b        z_i = c · tanh(x_i / c) / T_i        logp_i = log softmax(z_i)[t_i]
    H_i = −Σ_j p_ij log p_ij                                    p_ij = softmax(z_i)_j

For any loss with upstream gradients a_i = ∂L/∂logp_i and b_i = ∂L/∂H_i, which are not known in the forward:

    ∂L/∂z_ij = a_i (δ_{j,t_i} − p_ij) − b_i p_ij (log p_ij + H_i)

The forward keeps, per row, max z and log Σ exp(z − max) (apart: their fp32 sum is only good to 1e-3 near 1e4) and takes
2·N·H·V FLOP. The backward recomputes the logits vocabulary slab by slab, 6·N·H·V FLOP: each slab of dW is written once,
without atomics, in a fixed order, and dH is accumulated in fp32. `linear_policy_loss` needs no recompute: where its
losses will do, it is the faster one.

Legend: N rows (tokens), V vocabulary, H hidden size, n rows of a chunk, r rows of a block, S columns of a slab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from amft_kernels.backends import choose_backend, plain_arithmetic
from amft_kernels.checks import check_chunk_bytes, check_head
from amft_kernels.chunks import RowPlan, plan_rows, plan_tiles
from amft_kernels.gradients import SlabGradients
from amft_kernels.matmul import compute_dtype, logits_into, narrowed, widened
from amft_kernels.row_math import (
    GradCoefficients,
    Head,
    dead_rows,
    logit_grad_,
    make_head,
    scale_,
    times_p_,
    without_rows,
)
from amft_kernels.targets import Targets, prepare_targets
from torch.autograd.function import once_differentiable

__all__ = ["linear_logprob", "linear_logprob_reference"]

# Up to this hidden size the Triton forward multiplies and reduces in one kernel; beyond it a cuBLAS GEMM and a row kernel
# should be faster. Reasoned in `fused_logprob_triton.py`, not measured; 0 turns the fused kernel off.
FUSED_FORWARD_MAX_HIDDEN = 512


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, on plain logits with autograd; in fp64 it is the truth that the tests measure against.

    Ignored rows may hold anything. (Of rows that no gradient arrives for autograd knows nothing: these must be finite here.)
    """
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    valid = targets != ignore_index
    hidden = hidden.where(valid[:, None], 0.0)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.where(valid, 1.0)
    logits = F.linear(hidden, weight[:vocab], None if bias is None else bias[:vocab])
    logits = logits.to(compute_dtype(logits.dtype))
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_probs = F.log_softmax(logits, dim=1)
    logp = log_probs.gather(1, targets.where(valid, 0).long()[:, None])[:, 0].where(valid, 0.0)
    if bias is not None:  # −inf columns: 0 · log 0 is 0
        log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return logp, -(log_probs.exp() * log_probs).sum(1).where(valid, 0.0)


class RowStats(NamedTuple):
    """What the backward needs of each row; 0 on ignored rows."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    max: torch.Tensor  # of z
    log_sum: torch.Tensor  # log Σ exp(z − max)


def _rows_torch(
    x_rV: torch.Tensor, target_r1: torch.Tensor, head: Head, temperature_r1, scratch_2rV: torch.Tensor, full: bool
) -> tuple[torch.Tensor, ...]:
    """The row statistics of a block, or logp alone; `x_rV` is overwritten."""
    p_rV, y_rV = scratch_2rV[:, : x_rV.shape[0]]
    z_rV = scale_(x_rV, head, temperature_r1)
    torch.log_softmax(z_rV, dim=1, out=y_rV)
    logp_r = y_rV.gather(1, target_r1)[:, 0]
    if not full:
        return (logp_r,)
    torch.softmax(z_rV, dim=1, out=p_rV)
    max_r, log_sum_r = z_rV.amax(1), y_rV.amax(1).neg_()  # log p = −log Σ at the largest logit
    return logp_r, times_p_(y_rV, p_rV, head).sum(1).neg_(), max_r, log_sum_r


def _forward_torch(hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: Head, plan: RowPlan, full: bool) -> RowStats:
    vocab, dtype = head.weight_VH.shape[0], compute_dtype(hidden_NH.dtype)
    stats = RowStats(*hidden_NH.new_zeros(4, plan.rows, dtype=dtype))
    logits_nV = hidden_NH.new_empty(plan.chunk_rows, vocab, dtype=dtype)
    scratch_2rV = hidden_NH.new_empty(2, plan.block_rows, vocab, dtype=dtype)

    for index in plan.chunks():
        h_nH, target_n1 = hidden_NH[index], targets_N[index, None]
        x_nV, temperature_n1 = logits_nV[: h_nH.shape[0]], head.temperature_of(index)
        logits_into(x_nV, h_nH, head.weight_VH, head.bias_V)
        parts = []
        for part in plan.blocks(h_nH.shape[0]):
            t_r1 = temperature_n1[part] if isinstance(temperature_n1, torch.Tensor) else temperature_n1
            parts.append(_rows_torch(x_nV[part], target_n1[part], head, t_r1, scratch_2rV, full))
        for column_N, pieces in zip(stats, zip(*parts)):
            column_N[index] = torch.cat(pieces)
    return stats


def _forward_triton(
    hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: Head, plan: RowPlan, full: bool
) -> RowStats:
    """As `_forward_torch`; `full` costs nothing here, where memory or the product is the bound."""
    from amft_kernels import fused_logprob_triton, rows_launch

    if fused_logprob_triton.suits(hidden_NH, FUSED_FORWARD_MAX_HIDDEN):
        return RowStats(*fused_logprob_triton.fused_stats(hidden_NH, targets_N, head))
    vocab = head.weight_VH.shape[0]
    stats = RowStats(*hidden_NH.new_zeros(4, plan.rows, dtype=torch.float32))
    logits_nP = rows_launch.workspace(plan.chunk_rows, vocab, hidden_NH.device)
    for part in plan.parts():
        h_nH = hidden_NH[part]
        x_nP = logits_nP[: h_nH.shape[0]]
        logits_into(x_nP[:, :vocab], h_nH, head.weight_VH, None)
        rows_launch.logprob_rows(x_nP, part.start, targets_N, head, stats)
    return stats


class Upstream(NamedTuple):
    """∂L/∂logp and ∂L/∂H; the latter is None when nothing depends on the entropy. `dead_N`: rows where both are 0."""

    logprobs_N: torch.Tensor
    entropy_N: torch.Tensor | None
    dead_N: torch.Tensor | None = None


def _slab_grad_torch(
    x_nS: torch.Tensor,
    first: int,
    target_n1: torch.Tensor,
    stats: RowStats,
    upstream: Upstream,
    head: Head,
    temperature_n1: float | torch.Tensor,
    scratch_2rS: torch.Tensor,
) -> None:
    """Overwrite logits of the columns from `first` on by ∂L/∂x, block of rows by block of rows."""
    block_rows, width = scratch_2rS.shape[1], x_nS.shape[1]
    for start in range(0, len(x_nS), block_rows):
        part = slice(start, start + block_rows)
        p_rS, plogp_rS = scratch_2rS[:, : len(x_nS[part]), :width]
        t_r1 = temperature_n1[part] if isinstance(temperature_n1, torch.Tensor) else temperature_n1
        z_rS = scale_(x_nS[part], head, t_r1)
        y_rS = torch.sub(z_rS, stats.max[part, None], out=plogp_rS).sub_(stats.log_sum[part, None])
        torch.exp(y_rS, out=p_rS)
        column_r1, a_r1 = target_n1[part] - first, upstream.logprobs_N[part, None]
        spike_r1 = torch.where((column_r1 >= 0) & (column_r1 < width), a_r1, 0.0)
        dead_r1 = None if upstream.dead_N is None else upstream.dead_N[part, None]
        by = GradCoefficients(column_r1.clamp_(0, width - 1), spike_r1, -a_r1, None, dead_r1)
        if upstream.entropy_N is not None:
            times_p_(y_rS, p_rS, head)
            b_r1 = upstream.entropy_N[part, None]
            by = by._replace(of_p=-(a_r1 + b_r1 * stats.entropy[part, None]), of_plogp=-b_r1)
        logit_grad_(z_rS, p_rS, plogp_rS, by, head, t_r1)


def _backward_torch(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    stats: RowStats,
    upstream: Upstream,
    head: Head,
    plan: RowPlan,
    columns: int,
    sink: SlabGradients,
) -> None:
    """∂L/∂x slab by slab of `columns` columns, each given to `sink` for its products."""
    vocab, dtype = head.weight_VH.shape[0], compute_dtype(hidden_NH.dtype)
    tile = hidden_NH.new_empty(plan.chunk_rows * columns, dtype=dtype)
    scratch = hidden_NH.new_empty(2, plan.block_rows, columns, dtype=dtype)
    for first in range(0, vocab, columns):
        slab = slice(first, min(first + columns, vocab))
        w_SH, bias_S = head.weight_VH[slab], None if head.bias_V is None else head.bias_V[slab]
        for part in plan.parts():
            index = plan.index_of(part)
            h_nH = hidden_NH[index]
            x_nS = tile[: len(h_nH) * len(w_SH)].view(len(h_nH), len(w_SH))
            logits_into(x_nS, h_nH, w_SH, bias_S)
            row_stats, row_upstream = (type(v)(*(c if c is None else c[index] for c in v)) for v in (stats, upstream))
            target_n1, t_n1 = targets_N[index, None], head.temperature_of(index)
            _slab_grad_torch(x_nS, first, target_n1, row_stats, row_upstream, head, t_n1, scratch)
            sink.add(slab, part, narrowed(x_nS, h_nH.dtype), without_rows(h_nH, row_upstream.dead_N), w_SH)


def _backward_triton(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    stats: RowStats,
    upstream: Upstream,
    head: Head,
    plan: RowPlan,
    columns: int,
    sink: SlabGradients,
) -> None:
    """As `_backward_torch`, with one kernel per tile."""
    from amft_kernels import rows_launch

    logits_nP = rows_launch.workspace(plan.chunk_rows, columns, hidden_NH.device)
    for first in range(0, head.weight_VH.shape[0], columns):
        wanted = slice(first, first + columns)
        part_head = head._replace(
            weight_VH=head.weight_VH[wanted], bias_V=None if head.bias_V is None else head.bias_V[wanted]
        )
        width = part_head.weight_VH.shape[0]
        for part in plan.parts():
            h_nH = hidden_NH[part]
            x_nP = logits_nP[: h_nH.shape[0]]
            logits_into(x_nP[:, :width], h_nH, part_head.weight_VH, None)
            g_nS = rows_launch.grad_view(x_nP, width, hidden_NH.dtype)
            arriving = (upstream.logprobs_N, upstream.entropy_N)
            rows_launch.slab_grad(x_nP, g_nS, part.start, first, targets_N, part_head, stats, *arriving)
            dead_n = None if upstream.dead_N is None else upstream.dead_N[part]
            slab = slice(first, first + width)
            sink.add(slab, part, widened(g_nS), without_rows(h_nH, dead_n), part_head.weight_VH)


class Setup(NamedTuple):
    """One call's constants: everything but the differentiable tensors."""

    targets: Targets
    temperature: float | torch.Tensor
    softcap: float | None
    vocab: int
    chunk_bytes: int | None
    backend: str

    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
        return make_head(hidden, weight, bias, self.targets, self.vocab, self.temperature, self.softcap)


def _forward(hidden, weight, bias, setup: Setup, full: bool) -> RowStats:
    with plain_arithmetic(hidden):
        dtype, valid_N = compute_dtype(hidden.dtype), setup.targets.valid_N
        plan = plan_rows(valid_N, setup.vocab, dtype, setup.chunk_bytes, setup.backend)
        head = setup.head(hidden, weight, bias)
        forward = _forward_triton if setup.backend == "triton" else _forward_torch
        stats = forward(hidden.detach(), setup.targets.index_N, head, plan, full)
        return RowStats(*map(setup.targets.reported, stats))


def _backward(hidden, weight, bias, setup: Setup, stats: RowStats, upstream: Upstream, needs) -> tuple:
    with plain_arithmetic(hidden):
        dtype, upstream = compute_dtype(hidden.dtype), Upstream(*map(setup.targets.weighted, upstream[:2]))
        dead_N = dead_rows(upstream, setup.targets.valid_N)
        live_N = setup.targets.valid_N if dead_N is None else setup.targets.valid_N & ~dead_N
        plan, columns = plan_tiles(live_N, setup.vocab, weight.shape[1], dtype, setup.chunk_bytes, setup.backend)
        upstream = upstream._replace(dead_N=None if plan.active is not None else dead_N)
        sink = SlabGradients(hidden, weight, bias, needs, plan, setup.vocab)
        head = setup.head(hidden, weight, bias)
        backward = _backward_triton if setup.backend == "triton" else _backward_torch
        backward(hidden.detach(), setup.targets.index_N, stats, upstream, head, plan, columns, sink)
        return sink.finish()


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, setup):
        stats = _forward(hidden, weight, bias, setup, full=True)
        ctx.save_for_backward(hidden, weight, bias, *stats)
        ctx.setup = setup
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_N, grad_entropy_N):
        hidden, weight, bias, *stats = ctx.saved_tensors
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(stats[0])
        upstream = Upstream(grad_logprobs_N, grad_entropy_N)
        return *_backward(hidden, weight, bias, ctx.setup, RowStats(*stats), upstream, ctx.needs_input_grad), None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    with_entropy: bool = True,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) and the entropy in nats of each row, [N] in fp32 (fp64 for fp64), differentiable; 0 on ignored rows.

    Rows that are ignored, or that a gradient of 0 arrives for, reach no gradient, whatever their hidden states hold.

    hidden [N, H] and weight [V, H] in one dtype; targets [N] int. temperature: a number or [N]. vocab_size: columns from
    here on are padding. with_entropy=False: the entropy is None; under `torch.no_grad()` (old and reference log-probs)
    that is the leanest path. chunk_bytes: workspace, any value that holds a row of logits. backend: "triton", "torch"
    (chunked), or "auto".

    `ValueError` for a bad shape, dtype, device or range. On CUDA a target out of range makes its row NaN instead.
    """
    vocab = check_head(hidden, weight, targets, bias, vocab_size, ignore_index, temperature, logit_softcap)
    check_chunk_bytes(chunk_bytes, vocab)
    backend = choose_backend(backend, hidden)
    target = prepare_targets(targets, vocab, ignore_index)
    setup = Setup(target, temperature, logit_softcap, vocab, chunk_bytes, backend)
    differentiable = (tensor for tensor in (hidden, weight, bias) if tensor is not None)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        logprobs, entropy = _LinearLogprob.apply(hidden, weight, bias, setup)
    else:
        logprobs, entropy, *_ = _forward(hidden, weight, bias, setup, full=with_entropy)
    return logprobs, entropy if with_entropy else None

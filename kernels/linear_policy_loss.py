"""Hidden states and the LM-head weight in, the whole AMFT loss out, without logits [N, V] in memory.

    x_i = W h_i + b                 z_i = c · tanh(x_i / c) / T_i       (softcap c; without it z_i = x_i / T_i)
    lse_i = log Σ_j exp z_ij        logp_i = z_{i,t_i} − lse_i
    p_ij = exp(z_ij − lse_i)        H_i = −Σ_j p_ij log p_ij
    L = Σ_i [ s_i · (−logp_i) + u_i · S(p_i) + r_i · (PG_i + β · KL_i) − e_i · H_i ]

PG, KL and S are in `loss_forms.py`; s, u, r, e are the per-token weights (μ and the denominators folded in), so that
demonstration rows and rollout rows ride in one call. With a_i = ∂L/∂logp_i and ∂L/∂H_i = −e_i,

    ∂L/∂z_ij = a_i (δ_{j,t_i} − p_ij) + e_i p_ij (log p_ij + H_i)
    ∂L/∂x_ij = ∂L/∂z_ij · (1 − (T_i z_ij / c)²) / T_i           (no softcap: the factor is 1/T_i)
    dH = ∂L/∂x W        dW = (∂L/∂x)ᵀ h        db = Σ_i ∂L/∂x_i

All of it but the matrix products is a function of one row, and everything it needs is known before the forward. So the
gradients are formed in the forward, chunk of rows by chunk of rows: 6·N·H·V FLOP, nothing is computed twice.

Legend: N rows (tokens), V vocabulary, H hidden size, n rows of a chunk, r rows of a block (a part of a chunk that
stays in cache).
"""

from __future__ import annotations

import torch
from amft_kernels.backends import choose_backend, plain_arithmetic
from amft_kernels.checks import check_chunk_bytes, check_head, check_number, check_per_token, check_weight_grad
from amft_kernels.chunks import RowPlan, plan_rows
from amft_kernels.gradients import GradientBuffers, attach
from amft_kernels.linear_logprob import linear_logprob_reference
from amft_kernels.loss_forms import LossForm, value_and_slope
from amft_kernels.matmul import compute_dtype, logits_into, narrowed, widened
from amft_kernels.policy_terms import LOG_RATIO_LIMIT, PolicyLoss, PolicyOptions, Rows, logprob_grad, loss_and_sums
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

__all__ = ["LossForm", "PolicyLoss", "linear_policy_loss", "linear_policy_loss_reference"]

_PLAIN = LossForm()
WEIGHTS = ("nll_weight", "shaped_weight", "pg_weight", "entropy_weight")


def linear_policy_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    nll_weight: torch.Tensor | None = None,
    shaped_weight: torch.Tensor | None = None,
    pg_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    behavior_logprobs: torch.Tensor | None = None,
    tis_cap: float | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    form: LossForm = _PLAIN,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> PolicyLoss:
    """The definition, on plain logits with autograd; in fp64 it is the truth that the tests measure against."""
    options = {"temperature": temperature, "logit_softcap": logit_softcap, "bias": bias}
    options |= {"vocab_size": vocab_size, "ignore_index": ignore_index}
    valid = targets != ignore_index
    # Rows without weight may hold NaN, which a factor of 0 would not stop: the loss is one of the other rows alone.
    weights = [w for w in (nll_weight, shaped_weight, pg_weight, entropy_weight) if w is not None]
    live = valid & torch.stack([w != 0 for w in weights]).any(0)
    logp, entropy = linear_logprob_reference(hidden, weight, targets.where(live, ignore_index), **options)

    zero = logp.new_zeros(())
    nll = shaped = pg = kl = entropy_sum = pg_tokens = clipped = approx_kl = ratio_sum = ratio_max = zero
    if nll_weight is not None:
        on = valid & (nll_weight != 0)
        nll = (nll_weight[on] * -logp[on]).sum()
    if shaped_weight is not None:
        on = valid & (shaped_weight != 0)
        shaped = (shaped_weight[on] * shaped_reference(logp[on], form)).sum()
    if entropy_weight is not None:
        on = valid & (entropy_weight != 0)
        entropy_sum = (entropy_weight[on] * entropy[on]).sum()
    if pg_weight is not None:
        on = valid & (pg_weight != 0)
        r, A, lp = pg_weight[on], advantages[on], logp[on]
        old = lp.detach() if old_logprobs is None else old_logprobs[on]
        log_ratio = (lp - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
        behavior = old if behavior_logprobs is None else behavior_logprobs[on]
        if form.name == "own":
            value, slope = value_and_slope(form.own, lp, old, behavior, A)
            pg = (r * (value + slope * (lp - lp.detach()))).sum()
            clipped = ((slope == 0) & (A != 0)).sum()
        else:
            value, clipped_on = form_reference(lp, old, log_ratio, A, form, clip_low, clip_high, dual_clip)
            if behavior_logprobs is not None:
                importance = (old - behavior).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
                kept = (importance >= (form.is_low or 0.0)) & (importance <= _or_infinity(form.is_high))
                value = value * importance.clamp(max=_or_infinity(tis_cap)) * kept
            pg, clipped = (r * value).sum(), clipped_on.sum()
        if form.ratio_penalty:
            pg = pg + (r * 0.5 * form.ratio_penalty * log_ratio.square()).sum()
        if ref_logprobs is not None:
            d = (ref_logprobs[on] - lp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl = (r * {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}[form.kl]).sum()
        pg_tokens, approx_kl, ratio_sum = on.sum(), (ratio - 1 - log_ratio).sum(), ratio.sum()
        ratio_max = ratio.max() if len(ratio) else zero
    loss = nll + shaped + pg + kl_coef * kl - entropy_sum
    with torch.no_grad():
        logp, entropy = linear_logprob_reference(hidden, weight, targets, **options)
    rest = (logp, entropy, nll, shaped, pg, kl, entropy_sum, pg_tokens, clipped, approx_kl, ratio_sum, ratio_max)
    return PolicyLoss(loss, *(value.detach().to(logp.dtype) for value in rest))


def form_reference(
    lp: torch.Tensor,
    old: torch.Tensor,
    log_ratio: torch.Tensor,
    A: torch.Tensor,
    form: LossForm,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The form's loss per token with a graph, before IS and the penalty, and which tokens it clipped, capped or left out."""
    ratio = log_ratio.exp()
    if form.name == "cispo":
        return -(ratio.clamp(max=form.ratio_cap).detach() * A * lp), ratio > form.ratio_cap
    if form.name == "sapo":
        tau = torch.where(A > 0, form.tau_positive, form.tau_negative)
        return -A * 4 / tau * torch.sigmoid(tau * (ratio - 1)), log_ratio.abs() >= LOG_RATIO_LIMIT
    if form.name == "dppo":
        moved = (lp.exp() - old.exp()).detach()
        keep = torch.where(A > 0, moved <= form.tv_bound, moved >= -form.tv_bound)
        return -(ratio.clamp(max=form.ratio_cap).detach() * keep * A * lp), ~keep
    if form.name == "dro":
        return -A * lp, torch.zeros_like(A, dtype=torch.bool)
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if dual_clip is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, dual_clip * A), surrogate)
    return -surrogate, surrogate != ratio * A


def shaped_reference(lp: torch.Tensor, form: LossForm) -> torch.Tensor:
    """S per token, with a graph."""
    p = lp.exp()
    return -p / (p + form.shape_gamma) if form.shape == "ratio" else -(p * (1 - p)).detach() * lp


def _or_infinity(bound: float | None) -> float:
    return float("inf") if bound is None else bound


def _rows_torch(
    x_rV: torch.Tensor,
    rows: Rows,
    head: Head,
    temperature_r1: float | torch.Tensor,
    options: PolicyOptions,
    scratch_2rV: torch.Tensor,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp and entropy of a block of rows; with `want_grad` the logits `x_rV` are overwritten by ∂L/∂x."""
    p_rV, plogp_rV = scratch_2rV[:, : x_rV.shape[0]]
    target_r1 = rows.targets[:, None]
    z_rV = scale_(x_rV, head, temperature_r1)
    # torch's kernel takes x − max − log Σ in that order: an fp32 lse near 1e4 would only be good to 1e-3.
    torch.log_softmax(z_rV, dim=1, out=plogp_rV)
    torch.softmax(z_rV, dim=1, out=p_rV)
    logp_r = plogp_rV.gather(1, target_r1)[:, 0]
    entropy_r = times_p_(plogp_rV, p_rV, head).sum(1).neg_()
    if want_grad:
        a_r1 = logprob_grad(rows, logp_r, options)[:, None]
        dead_r1 = None if rows.dead is None else rows.dead[:, None]
        by = GradCoefficients(target_r1, a_r1, -a_r1, None, dead_r1)
        if rows.entropy_weight is not None:
            e_r1 = rows.entropy_weight[:, None]
            by = by._replace(of_p=e_r1 * entropy_r[:, None] - a_r1, of_plogp=e_r1)
        logit_grad_(z_rV, p_rV, plogp_rV, by, head, temperature_r1)
    return logp_r, entropy_r


def _forward_torch(
    hidden_NH: torch.Tensor, rows: Rows, head: Head, options: PolicyOptions, grads: GradientBuffers, plan: RowPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp and entropy of the rows in `plan`, 0 elsewhere; adds to `grads`."""
    vocab, dtype = head.weight_VH.shape[0], compute_dtype(hidden_NH.dtype)
    logprobs_N, entropy_N = hidden_NH.new_zeros(2, plan.rows, dtype=dtype)
    logits_nV = hidden_NH.new_empty(plan.chunk_rows, vocab, dtype=dtype)
    scratch_2rV = hidden_NH.new_empty(2, plan.block_rows, vocab, dtype=dtype)

    for index in plan.chunks():
        h_nH, chunk = hidden_NH[index], rows.take(index)
        x_nV, temperature_n1 = logits_nV[: h_nH.shape[0]], head.temperature_of(index)
        logits_into(x_nV, h_nH, head.weight_VH, head.bias_V)
        stats = []
        for part in plan.blocks(h_nH.shape[0]):
            t_r1 = temperature_n1[part] if isinstance(temperature_n1, torch.Tensor) else temperature_n1
            stats.append(_rows_torch(x_nV[part], chunk.take(part), head, t_r1, options, scratch_2rV, grads.wanted))
        logprobs_N[index], entropy_N[index] = (torch.cat(column) for column in zip(*stats))
        if grads.wanted:
            grads.add_chunk(index, narrowed(x_nV, h_nH.dtype), without_rows(h_nH, chunk.dead), head.weight_VH)
    return logprobs_N, entropy_N


def _forward_triton(
    hidden_NH: torch.Tensor, rows: Rows, head: Head, options: PolicyOptions, grads: GradientBuffers, plan: RowPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_forward_torch`, with one kernel per chunk for all that is not a matrix product."""
    from amft_kernels import rows_launch

    vocab = head.weight_VH.shape[0]
    logprobs_N, entropy_N = hidden_NH.new_zeros(2, plan.rows, dtype=torch.float32)
    logits_nP = rows_launch.workspace(plan.chunk_rows, vocab, hidden_NH.device)
    kept_gP = rows_launch.workspace(plan.group_rows, vocab, hidden_NH.device, hidden_NH.dtype) if plan.keeps else None
    for group in plan.groups():
        for part in plan.parts(group):
            h_nH = hidden_NH[part]
            x_nP = logits_nP[: h_nH.shape[0]]
            logits_into(x_nP[:, :vocab], h_nH, head.weight_VH, None)
            g_nV = None
            if kept_gP is not None:
                g_nV = kept_gP[part.start - group.start : part.stop - group.start, :vocab]
            elif grads.wanted:
                g_nV = rows_launch.grad_view(x_nP, vocab, hidden_NH.dtype)
            rows_launch.policy_rows(x_nP, g_nV, part.start, rows, head, options, logprobs_N, entropy_N)
        if grads.wanted:
            g_gV = g_nV if kept_gP is None else kept_gP[: group.stop - group.start, :vocab]
            dead_g = None if rows.dead is None else rows.dead[group]
            grads.add_chunk(group, widened(g_gV), without_rows(hidden_NH[group], dead_g), head.weight_VH)
    return logprobs_N, entropy_N


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    nll_weight: torch.Tensor | None = None,
    shaped_weight: torch.Tensor | None = None,
    pg_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    behavior_logprobs: torch.Tensor | None = None,
    tis_cap: float | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    form: LossForm = _PLAIN,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    weight_grad: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The loss above with its gradients for `hidden`, `weight` and `bias`; see `PolicyLoss` for what comes back.

    hidden [N, H] and weight [V, H] in one dtype; targets [N] int. The weights s, u, r, e, `advantages` (A) and the three
    kinds of log-probs are [N] floats, taken as constants; a missing weight is 0 everywhere. Rows whose target is
    `ignore_index` take no part, whatever their hidden states and other inputs hold (NaN included); a row whose weights are
    all 0 has its log-prob and entropy, and reaches no gradient and no sum; the policy inputs of rows with pg_weight 0 are
    not looked at.

    old_logprobs: None means on-policy, ratio 1 with gradient. behavior_logprobs: of the engine that sampled, for
    importance sampling with `tis_cap` and the form's bounds (which have no effect without them). form: the policy gradient's
    form and its constants; with a function of one's own the torch backend serves, on any device. temperature: a number or [N].
    vocab_size: columns from here on are padding. weight_grad: fp32 [V, H] buffer that the forward adds dW into; the
    weight then gets no autograd gradient and the loss must be back-propagated with gradient 1. chunk_bytes: workspace,
    any value that holds a row of logits. backend: "triton", "torch" (chunked), or "auto".

    `ValueError` for a bad shape, dtype, device, range or combination. On CUDA a target out of range makes its row NaN
    instead (no host sync). Sources: `policy_terms.py`.
    """
    vocab = check_head(hidden, weight, targets, bias, vocab_size, ignore_index, temperature, logit_softcap)
    per_token = {
        "nll_weight": nll_weight,
        "shaped_weight": shaped_weight,
        "pg_weight": pg_weight,
        "entropy_weight": entropy_weight,
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "behavior_logprobs": behavior_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    options = PolicyOptions(kl_coef, clip_low, clip_high, dual_clip, tis_cap, form)
    _check_policy(hidden, per_token, options)
    check_chunk_bytes(chunk_bytes, vocab)
    check_weight_grad(weight_grad, weight)
    if form.own is not None and backend not in ("auto", "torch"):
        raise ValueError(f"form.own takes backend 'torch', which evaluates it row by row, got {backend!r}")
    backend = choose_backend(backend if form.own is None else "torch", hidden)

    grads = GradientBuffers(hidden, weight, bias, weight_grad, vocab)
    with plain_arithmetic(hidden):
        target = prepare_targets(targets, vocab, ignore_index)
        rows = _rows(hidden, target, per_token)
        head = make_head(hidden, weight, bias, target, vocab, temperature, logit_softcap)
        dtype = compute_dtype(hidden.dtype)
        kept = hidden.dtype if grads.wanted else None
        plan = plan_rows(target.valid_N, vocab, dtype, chunk_bytes, backend, kept)
        weights = (rows.nll_weight, rows.shaped_weight, rows.pg_weight, rows.entropy_weight)
        rows = rows._replace(dead=dead_rows(weights, plan.active))
        grads.zero_rows(plan.active, chunks=plan.count > 0)
        forward = _forward_triton if backend == "triton" else _forward_torch
        logprobs, entropy = map(target.reported, forward(hidden.detach(), rows, head, options, grads, plan))
        sums = loss_and_sums(rows, logprobs, entropy, options)
    loss = attach(sums.pop("loss"), grads, hidden, weight, bias)
    return PolicyLoss(loss=loss, logprobs=logprobs, entropy=entropy, **sums)


def _rows(hidden: torch.Tensor, target: Targets, per_token: dict[str, torch.Tensor | None]) -> Rows:
    """The per-token inputs, contiguous and in the compute dtype; ignored rows get target 0 and no weight."""
    dtype = compute_dtype(hidden.dtype)
    columns = {
        name: None if value is None else value.detach().to(dtype).contiguous() for name, value in per_token.items()
    }
    for name in WEIGHTS:
        columns[name] = target.weighted(columns[name])
    return Rows(targets=target.index_N, **columns)


def _check_policy(hidden: torch.Tensor, per_token: dict[str, torch.Tensor | None], options: PolicyOptions) -> None:
    for name, value in per_token.items():
        if value is not None:
            check_per_token(name, value, hidden)
    given = {name for name, value in per_token.items() if value is not None}
    if not given & set(WEIGHTS):
        raise ValueError("nll_weight, shaped_weight, pg_weight or entropy_weight must be given, got none of them")
    if ("pg_weight" in given) != ("advantages" in given):
        raise ValueError(
            f"pg_weight and advantages go together, got {'advantages' if 'advantages' in given else 'pg_weight'} alone"
        )
    extra = sorted(given & {"old_logprobs", "behavior_logprobs", "ref_logprobs"})
    if extra and "pg_weight" not in given:
        raise ValueError(f"pg_weight must be given with {', '.join(extra)}, got None")
    check_number("kl_coef", options.kl_coef, least=0.0)
    if options.kl_coef and "ref_logprobs" not in given:
        raise ValueError(f"ref_logprobs must be given with a kl_coef, got None with kl_coef = {options.kl_coef:g}")
    check_number("clip_low", options.clip_low, least=0.0)
    check_number("clip_high", options.clip_high, least=0.0)
    if options.dual_clip is not None:
        check_number("dual_clip", options.dual_clip, above=1.0)
    if options.tis_cap is not None:
        check_number("tis_cap", options.tis_cap, above=0.0)
    options.form.check()

"""The loss of one token's log-prob, with its derivative: imitation, policy gradient and KL to a reference.

    L_i = s · (−logp) + u · S(p) + r · (PG + β · KL)

PG, KL and S are those of `loss_forms.py`; s, u, r are weights. A missing old log-prob stands for the current one, held
constant. All log-ratios are clamped to ±20, with no gradient outside: exp(20) = 4.9e8 is finite in every sum, and no
honest ratio gets there.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), k1 to k3 (joschu.net/blog/kl-approx.html), clip-higher
(arXiv 2503.14476).

Legend: N rows (tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from amft_kernels import loss_forms
from amft_kernels.loss_forms import LossForm, Ratio, Term

LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """The loss, per-token values and the sums that make the metrics. Everything but `loss` is detached.

    Sums add up over micro-batches; counts and the three ratio statistics are over the rows whose pg_weight is not 0.
    """

    loss: torch.Tensor  # nll_sum + shaped_sum + pg_sum + kl_coef · kl_sum − entropy_sum
    logprobs: torch.Tensor  # [N], 0 on ignored rows
    entropy: torch.Tensor  # [N] in nats, 0 on ignored rows
    nll_sum: torch.Tensor  # Σ nll_weight · (−logp)
    shaped_sum: torch.Tensor  # Σ shaped_weight · S(p)
    pg_sum: torch.Tensor  # Σ pg_weight · PG
    kl_sum: torch.Tensor  # Σ pg_weight · KL, before kl_coef
    entropy_sum: torch.Tensor  # Σ entropy_weight · H
    pg_tokens: torch.Tensor  # rows with pg_weight ≠ 0
    clipped_tokens: torch.Tensor  # of those, how many the form clipped, capped or left out
    approx_kl_sum: torch.Tensor  # Σ ρ − 1 − log ρ: the k3 estimate of KL(old ‖ current), 0 on-policy
    ratio_sum: torch.Tensor  # Σ ρ
    ratio_max: torch.Tensor  # max ρ, 0 without such rows


class Rows(NamedTuple):
    """The per-token inputs, each [N] or None. Floats are in the compute dtype; `targets` are indices; `dead`: rows without
    any weight (`row_math.dead_rows`)."""

    targets: torch.Tensor
    nll_weight: torch.Tensor | None = None
    shaped_weight: torch.Tensor | None = None
    pg_weight: torch.Tensor | None = None
    entropy_weight: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    behavior_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    dead: torch.Tensor | None = None

    def take(self, index: slice | torch.Tensor) -> Rows:
        """These rows only: a slice, or a tensor of row numbers."""
        return Rows(*(None if column is None else column[index] for column in self))


class PolicyOptions(NamedTuple):
    """The scalars of the policy-gradient terms, as in `linear_policy_loss`."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tis_cap: float | None = None
    form: LossForm = LossForm()


class Surrogate(NamedTuple):
    """Values and derivatives by logp of every row; rows with pg_weight = 0 may hold anything, NaN included."""

    pg_N: torch.Tensor
    pg_grad_N: torch.Tensor
    log_ratio_N: torch.Tensor
    ratio_N: torch.Tensor
    clipped_N: torch.Tensor


def surrogate(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> Surrogate:
    """The policy gradient's form with its analytic derivative."""
    form = options.form
    if rows.old_logprobs is None:
        zero_N = torch.zeros_like(logprobs_N)
        ratio = Ratio(logprobs_N, zero_N, torch.ones_like(logprobs_N), torch.ones_like(logprobs_N, dtype=torch.bool))
    else:
        raw_N = logprobs_N - rows.old_logprobs
        log_ratio_N = _bounded(raw_N)
        ratio = Ratio(logprobs_N, log_ratio_N, log_ratio_N.exp(), raw_N == log_ratio_N)
    term = _form(rows, ratio, options)
    if form.ratio_penalty:
        penalty_N = 0.5 * form.ratio_penalty * ratio.log_N.square()
        slope_N = form.ratio_penalty * ratio.log_N * ratio.passes_N
        term = term._replace(value_N=term.value_N + penalty_N, slope_N=term.slope_N + slope_N)
    return Surrogate(term.value_N, term.slope_N, ratio.log_N, ratio.value_N, term.clipped_N)


def _form(rows: Rows, ratio: Ratio, options: PolicyOptions) -> Term:
    form = options.form
    old_N = ratio.logp_N if rows.old_logprobs is None else rows.old_logprobs
    if form.own is not None:
        behavior_N = old_N if rows.behavior_logprobs is None else rows.behavior_logprobs
        return loss_forms.own(form.own, ratio.logp_N, old_N, behavior_N, rows.advantages, rows.pg_weight != 0)
    gain_N = -rows.advantages
    if rows.behavior_logprobs is not None:
        gain_N = gain_N * _importance(old_N - rows.behavior_logprobs, options)
    if form.name == "cispo":
        return loss_forms.cispo(gain_N, ratio, form)
    if form.name == "sapo":
        return loss_forms.sapo(gain_N, ratio, rows.advantages, form)
    if form.name == "dppo":
        return loss_forms.dppo(gain_N, ratio, rows.advantages, old_N, form)
    if form.name == "dro":
        return loss_forms.dro(gain_N, ratio)
    return _clipped(gain_N, ratio, rows, options)


def _importance(log_ratio_N: torch.Tensor, options: PolicyOptions) -> torch.Tensor:
    """IS from old − behavior: truncated, and 0 outside the bounds."""
    importance_N = _bounded(log_ratio_N).exp_()
    low, high = options.form.is_low, options.form.is_high
    outside_N = torch.zeros_like(importance_N, dtype=torch.bool)
    if low is not None:
        outside_N |= importance_N < low
    if high is not None:
        outside_N |= importance_N > high
    if options.tis_cap is not None:
        importance_N = importance_N.clamp(max=options.tis_cap)
    return importance_N.masked_fill(outside_N, 0.0)


def _clipped(gain_N: torch.Tensor, ratio: Ratio, rows: Rows, options: PolicyOptions) -> Term:
    """For A ≥ 0 the surrogate is A · min(ρ, 1 + clip_high), for A < 0 it is A · min(max(ρ, 1 − clip_low), dual_clip)."""
    if rows.old_logprobs is None:
        return Term(gain_N, gain_N, ~ratio.passes_N)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    up_N, ratio_N = rows.advantages >= 0, ratio.value_N
    used_N = torch.where(up_N, ratio_N.clamp(max=high), ratio_N.clamp(min=low, max=options.dual_clip))
    # Where the clip changed nothing the gradient passes, also at the edge itself (as in autograd's clamp).
    clipped_N = (used_N != ratio_N) & (rows.advantages != 0)
    return Term(gain_N * used_N, gain_N * ratio_N * (~clipped_N & ratio.passes_N), clipped_N)


def logprob_grad(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> torch.Tensor:
    """a_N = ∂L/∂logp = −s + u · ∂S/∂logp + r · (∂PG/∂logp + β ∂KL/∂logp)."""
    grad_N = torch.zeros_like(logprobs_N)
    if rows.nll_weight is not None:
        grad_N = grad_N - rows.nll_weight
    if rows.shaped_weight is not None:
        slope_N = loss_forms.shaped(logprobs_N, options.form)[1]
        grad_N = grad_N + torch.where(rows.shaped_weight != 0, rows.shaped_weight * slope_N, 0.0)
    if rows.pg_weight is not None:
        slope_N = surrogate(rows, logprobs_N, options).pg_grad_N
        if rows.ref_logprobs is not None and options.kl_coef:
            slope_N = slope_N + options.kl_coef * _kl(rows, logprobs_N, options)[1]
        # NaN in the advantages or log-probs of a row without weight must not spread: 0 · NaN is NaN, so choose instead.
        grad_N = grad_N + torch.where(rows.pg_weight != 0, rows.pg_weight * slope_N, 0.0)
    return grad_N


def _kl(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    raw_N = rows.ref_logprobs - logprobs_N
    d_N = _bounded(raw_N)
    return loss_forms.kl(options.form.kl, d_N, raw_N == d_N)


def loss_and_sums(
    rows: Rows, logprobs_N: torch.Tensor, entropy_N: torch.Tensor, options: PolicyOptions
) -> dict[str, torch.Tensor]:
    """The scalar fields of `PolicyLoss` by name."""
    zero = logprobs_N.new_zeros(())
    sums = dict.fromkeys((name for name in PolicyLoss._fields if name not in ("logprobs", "entropy")), zero)
    if rows.nll_weight is not None:
        # A target at a −inf column has logp = −inf: no weight, no loss.
        sums["nll_sum"] = torch.where(rows.nll_weight != 0, -rows.nll_weight * logprobs_N, 0.0).sum()
    if rows.shaped_weight is not None:
        shaped_N = loss_forms.shaped(logprobs_N, options.form)[0]
        sums["shaped_sum"] = torch.where(rows.shaped_weight != 0, rows.shaped_weight * shaped_N, 0.0).sum()
    if rows.entropy_weight is not None:
        sums["entropy_sum"] = torch.where(rows.entropy_weight != 0, rows.entropy_weight * entropy_N, 0.0).sum()
    if rows.pg_weight is not None:
        sums |= _policy_sums(rows, logprobs_N, options)
    sums["loss"] = sums["nll_sum"] + sums["shaped_sum"] + sums["pg_sum"] + options.kl_coef * sums["kl_sum"]
    sums["loss"] = sums["loss"] - sums["entropy_sum"]
    return sums


def _policy_sums(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> dict[str, torch.Tensor]:
    terms = surrogate(rows, logprobs_N, options)
    on_N = rows.pg_weight != 0

    def total(values_N: torch.Tensor) -> torch.Tensor:
        return torch.where(on_N, values_N, 0.0).sum()

    ratio_N = torch.where(on_N, terms.ratio_N, 0.0)
    sums = {
        "pg_sum": total(rows.pg_weight * terms.pg_N),
        "pg_tokens": on_N.sum().to(logprobs_N.dtype),
        "clipped_tokens": (on_N & terms.clipped_N).sum().to(logprobs_N.dtype),
        "approx_kl_sum": total(torch.expm1(terms.log_ratio_N) - terms.log_ratio_N),
        "ratio_sum": ratio_N.sum(),
        "ratio_max": ratio_N.max() if ratio_N.numel() else ratio_N.new_zeros(()),
    }
    if rows.ref_logprobs is not None:
        sums["kl_sum"] = total(rows.pg_weight * _kl(rows, logprobs_N, options)[0])
    return sums


def _bounded(log_ratio_N: torch.Tensor) -> torch.Tensor:
    return log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

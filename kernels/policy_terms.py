"""The policy-gradient part of the loss: a function of one token's log-prob, with its derivative.

    ρ   = exp(logp − old)            old = None: ρ is 1 and passes its gradient
    IS  = min(exp(old − behavior), tis_cap), a constant (with old = None, the current logp stands for old)
    PG  = −IS · min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A); for A < 0 the min is raised to dual_clip · A at least
    KL  = exp(ref − logp) − (ref − logp) − 1                                                        (k3, ≥ 0)

For A ≥ 0 the surrogate is A · min(ρ, 1 + clip_high), for A < 0 it is A · min(max(ρ, 1 − clip_low), dual_clip). All
log-ratios are clamped to ±20, with no gradient outside: exp(20) = 4.9e8 is finite in every sum, and no honest ratio
gets there.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), k3 (joschu.net/blog/kl-approx.html), clip-higher
(arXiv 2503.14476).

Legend: N rows (tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """The loss, per-token values and the sums that make the metrics. Everything but `loss` is detached.

    Sums add up over micro-batches; counts and the three ratio statistics are over the rows whose pg_weight is not 0.
    """

    loss: torch.Tensor  # nll_sum + pg_sum + kl_coef · kl_sum − entropy_sum
    logprobs: torch.Tensor  # [N], 0 on ignored rows
    entropy: torch.Tensor  # [N] in nats, 0 on ignored rows
    nll_sum: torch.Tensor  # Σ nll_weight · (−logp)
    pg_sum: torch.Tensor  # Σ pg_weight · PG
    kl_sum: torch.Tensor  # Σ pg_weight · KL, before kl_coef
    entropy_sum: torch.Tensor  # Σ entropy_weight · H
    pg_tokens: torch.Tensor  # rows with pg_weight ≠ 0
    clipped_tokens: torch.Tensor  # of those, how many the clip or the dual clip left without a gradient
    approx_kl_sum: torch.Tensor  # Σ ρ − 1 − log ρ: the k3 estimate of KL(old ‖ current), 0 on-policy
    ratio_sum: torch.Tensor  # Σ ρ
    ratio_max: torch.Tensor  # max ρ, 0 without such rows


class Rows(NamedTuple):
    """The per-token inputs, each [N] or None. Floats are in the compute dtype; `targets` are indices; `dead`: rows without
    any weight (`row_math.dead_rows`)."""

    targets: torch.Tensor
    nll_weight: torch.Tensor | None = None
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


class Surrogate(NamedTuple):
    """Values and derivatives by logp of every row; rows with pg_weight = 0 may hold anything, NaN included."""

    pg_N: torch.Tensor
    pg_grad_N: torch.Tensor
    log_ratio_N: torch.Tensor
    ratio_N: torch.Tensor
    clipped_N: torch.Tensor


def surrogate(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> Surrogate:
    """The clipped policy gradient with its analytic derivative."""
    gain_N = -rows.advantages
    if rows.behavior_logprobs is not None:
        trainer_N = logprobs_N if rows.old_logprobs is None else rows.old_logprobs
        importance_N = _bounded(trainer_N - rows.behavior_logprobs).exp_()
        if options.tis_cap is not None:
            importance_N.clamp_(max=options.tis_cap)
        gain_N = gain_N * importance_N
    if rows.old_logprobs is None:
        zero_N = torch.zeros_like(logprobs_N)
        return Surrogate(gain_N, gain_N, zero_N, torch.ones_like(logprobs_N), zero_N.bool())

    raw_N = logprobs_N - rows.old_logprobs
    log_ratio_N = _bounded(raw_N)
    ratio_N = log_ratio_N.exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    up_N = rows.advantages >= 0
    ratio_used_N = torch.where(up_N, ratio_N.clamp(max=high), ratio_N.clamp(min=low, max=options.dual_clip))
    # Where the clip changed nothing the gradient passes, also at the edge itself (as in autograd's clamp).
    clipped_N = (ratio_used_N != ratio_N) & (rows.advantages != 0)
    passes_N = ~clipped_N & (raw_N == log_ratio_N)
    pg_grad_N = gain_N * ratio_N * passes_N
    return Surrogate(gain_N * ratio_used_N, pg_grad_N, log_ratio_N, ratio_N, clipped_N)


def logprob_grad(rows: Rows, logprobs_N: torch.Tensor, options: PolicyOptions) -> torch.Tensor:
    """a_N = ∂L/∂logp = −s + r · (∂PG/∂logp + β ∂KL/∂logp)."""
    grad_N = torch.zeros_like(logprobs_N)
    if rows.nll_weight is not None:
        grad_N = grad_N - rows.nll_weight
    if rows.pg_weight is not None:
        slope_N = surrogate(rows, logprobs_N, options).pg_grad_N
        if rows.ref_logprobs is not None and options.kl_coef:
            raw_N = rows.ref_logprobs - logprobs_N
            log_ratio_N = _bounded(raw_N)
            slope_N = slope_N - options.kl_coef * torch.expm1(log_ratio_N) * (raw_N == log_ratio_N)
        # NaN in the advantages or log-probs of a row without weight must not spread: 0 · NaN is NaN, so choose instead.
        grad_N = grad_N + torch.where(rows.pg_weight != 0, rows.pg_weight * slope_N, 0.0)
    return grad_N


def loss_and_sums(
    rows: Rows, logprobs_N: torch.Tensor, entropy_N: torch.Tensor, options: PolicyOptions
) -> dict[str, torch.Tensor]:
    """The scalar fields of `PolicyLoss` by name."""
    zero = logprobs_N.new_zeros(())
    sums = dict.fromkeys((name for name in PolicyLoss._fields if name not in ("logprobs", "entropy")), zero)
    if rows.nll_weight is not None:
        # A target at a −inf column has logp = −inf: no weight, no loss.
        sums["nll_sum"] = torch.where(rows.nll_weight != 0, -rows.nll_weight * logprobs_N, 0.0).sum()
    if rows.entropy_weight is not None:
        sums["entropy_sum"] = torch.where(rows.entropy_weight != 0, rows.entropy_weight * entropy_N, 0.0).sum()
    if rows.pg_weight is not None:
        sums |= _policy_sums(rows, logprobs_N, options)
    sums["loss"] = sums["nll_sum"] + sums["pg_sum"] + options.kl_coef * sums["kl_sum"] - sums["entropy_sum"]
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
        log_ratio_N = _bounded(rows.ref_logprobs - logprobs_N)
        sums["kl_sum"] = total(rows.pg_weight * (torch.expm1(log_ratio_N) - log_ratio_N))
    return sums


def _bounded(log_ratio_N: torch.Tensor) -> torch.Tensor:
    return log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

"""The policy gradient's forms: what one token's log-prob, its ratio and its advantage make of the loss, with the derivative.

With ρ = exp(logp − old), p = exp(logp), A the advantage and IS the engine's correction (both constants), the loss is IS · f:

    grpo    f = −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A); for A < 0 the min is raised to dual_clip · A at least
    cispo   f = −sg(min(ρ, c)) A · logp                                                     (arXiv 2506.13585)
    sapo    f = −A · (4/τ) σ(τ(ρ − 1)),   τ = τ⁺ for A > 0, else τ⁻                         (arXiv 2511.20347)
    dppo    f = −sg(min(ρ, c) · keep) A · logp,   keep: p − exp(old) ≤ δ for A > 0, else ≥ −δ         (arXiv 2602.04879)
    dro     f = −A · logp                                                                   (arXiv 2405.19107)
    own     f = a function of (logp, old, behavior, A) that the caller brings; its derivative is autograd's, or its own

sg stops the gradient. To each of them `ratio_penalty` β adds (β/2) · log²ρ, once a token (DRO's regulariser; prime-rl's for
DPPO with β = 2τ). With old = None ρ is 1 and passes its gradient, which makes −A of the derivative of every form but `own`.

IS = exp(old − behavior): with `tis_cap` min(IS, cap), and 0 outside [is_low, is_high] (MIS has
the upper bound alone, IcePop both).

KL, an estimate of KL(policy ‖ reference) from d = ref − logp: k1 −d, k2 d²/2, k3 exp(d) − d − 1.

A demonstration's token can enter by its own probability: S = −p/(p + γ) ("ratio", LUFFY's policy shaping, arXiv 2504.14945), or
S = −sg(p(1 − p)) · logp ("phi", CHORD's weight, arXiv 2508.11408).

Legend: N rows (tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

FORMS = ("grpo", "cispo", "sapo", "dppo", "dro", "own")
KL_KINDS = ("k1", "k2", "k3")
SHAPES = ("ratio", "phi")

# (logp, old, behavior, advantages), each [N], to the loss [N], or to (loss, ∂loss/∂logp).
OwnLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | tuple]


class LossForm(NamedTuple):
    """Which form, and its constants."""

    name: str = "grpo"
    ratio_cap: float = 5.0  # c of cispo and dppo
    tau_positive: float = 1.0  # sapo
    tau_negative: float = 1.05
    tv_bound: float = 0.2  # δ of dppo
    ratio_penalty: float = 0.0  # β
    is_low: float | None = None
    is_high: float | None = None
    kl: str = "k3"
    shape: str = "ratio"
    shape_gamma: float = 0.1
    own: OwnLoss | None = None

    def check(self) -> None:
        """Raises ValueError, naming what is not as it must be."""
        for name, value, known in (
            ("name", self.name, FORMS),
            ("kl", self.kl, KL_KINDS),
            ("shape", self.shape, SHAPES),
        ):
            if value not in known:
                raise ValueError(f"form.{name} must be one of {', '.join(known)}, got {value!r}")
        if (self.name == "own") != (self.own is not None):
            raise ValueError(f"form.own goes with form.name 'own', got {self.own!r} with {self.name!r}")
        for name in ("ratio_cap", "tau_positive", "tau_negative", "tv_bound", "shape_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"form.{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if not 0 <= self.ratio_penalty < float("inf"):
            raise ValueError(f"form.ratio_penalty must be a finite number ≥ 0, got {self.ratio_penalty!r}")


class Ratio(NamedTuple):
    """logp, log ρ within its limits, ρ, and where the limits let a gradient pass; each [N]."""

    logp_N: torch.Tensor
    log_N: torch.Tensor
    value_N: torch.Tensor
    passes_N: torch.Tensor


class Term(NamedTuple):
    """A form's value, its derivative by logp, and the rows it left without one; rows without weight may hold anything."""

    value_N: torch.Tensor
    slope_N: torch.Tensor
    clipped_N: torch.Tensor


def cispo(gain_N: torch.Tensor, ratio: Ratio, form: LossForm) -> Term:
    """gain = −IS · A here and below. Capped rows keep a gradient; they are counted all the same."""
    weight_N = gain_N * ratio.value_N.clamp(max=form.ratio_cap)
    return Term(weight_N * ratio.logp_N, weight_N, ratio.value_N > form.ratio_cap)


def sapo(gain_N: torch.Tensor, ratio: Ratio, advantages_N: torch.Tensor, form: LossForm) -> Term:
    tau_N = torch.where(advantages_N > 0, form.tau_positive, form.tau_negative)
    gate_N = torch.sigmoid(tau_N * (ratio.value_N - 1))
    slope_N = gain_N * 4 * gate_N * (1 - gate_N) * ratio.value_N * ratio.passes_N
    return Term(gain_N * 4 / tau_N * gate_N, slope_N, ~ratio.passes_N)


def dppo(gain_N: torch.Tensor, ratio: Ratio, advantages_N: torch.Tensor, old_N: torch.Tensor, form: LossForm) -> Term:
    moved_N = ratio.logp_N.exp() - old_N.exp()
    keep_N = torch.where(advantages_N > 0, moved_N <= form.tv_bound, moved_N >= -form.tv_bound)
    weight_N = gain_N * ratio.value_N.clamp(max=form.ratio_cap) * keep_N
    return Term(weight_N * ratio.logp_N, weight_N, ~keep_N)


def dro(gain_N: torch.Tensor, ratio: Ratio) -> Term:
    return Term(gain_N * ratio.logp_N, gain_N, torch.zeros_like(ratio.passes_N))


def own(
    function: OwnLoss,
    logp_N: torch.Tensor,
    old_N: torch.Tensor,
    behavior_N: torch.Tensor,
    advantages_N: torch.Tensor,
    on_N: torch.Tensor,
) -> Term:
    """The caller's function, asked about the rows that count alone."""
    value_N, slope_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    inputs = (logp_N[on_N], old_N[on_N], behavior_N[on_N], advantages_N[on_N])
    value_N[on_N], slope_N[on_N] = value_and_slope(function, *inputs)
    return Term(value_N, slope_N, on_N & (slope_N == 0) & (advantages_N != 0))


def value_and_slope(function: OwnLoss, logp: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its derivative by logp: the function's own where it gives both, else autograd's."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        given = function(logp, *(x.detach() for x in others))
        if isinstance(given, tuple):
            value, slope = given
            return value.detach(), slope.detach()
        (slope,) = torch.autograd.grad(given.sum(), logp)
    return given.detach(), slope


def kl(kind: str, d_N: torch.Tensor, passes_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate from d = ref − logp within its limits, and its derivative by logp."""
    if kind == "k1":
        return -d_N, passes_N.to(d_N.dtype)
    if kind == "k2":
        return 0.5 * d_N.square(), -d_N * passes_N
    return torch.expm1(d_N) - d_N, -torch.expm1(d_N) * passes_N


def shaped(logp_N: torch.Tensor, form: LossForm) -> tuple[torch.Tensor, torch.Tensor]:
    """S and its derivative by logp."""
    p_N = logp_N.exp()
    if form.shape == "ratio":
        share_N = p_N / (p_N + form.shape_gamma)
        return -share_N, -share_N * form.shape_gamma / (p_N + form.shape_gamma)
    phi_N = p_N * (1 - p_N)
    return -phi_N * logp_N, -phi_N

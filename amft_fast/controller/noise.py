"""The μ of least noise, from the variances of both gradients and how far they lie apart (method gac)."""

from __future__ import annotations

import math
from typing import Any

from amft_fast.config import Config
from amft_fast.controller.base import Controller, named
from amft_fast.controller.statistics import ratio


class NoiseOptimal(Controller):
    """GAC: the μ whose mixed gradient lies nearest to the RL gradient's expectation.

    With g_S and g_R the gradients of one step, of variances σ_S² and σ_R², and Δ = E g_S − E g_R how far they are apart,

        E |μ g_S + (1 − μ) g_R − E g_R|² = μ² (σ_S² + |Δ|²) + (1 − μ)² σ_R²,     least at   μ* = σ_R² / (σ_R² + σ_S² + |Δ|²)

    Every `gac_every` steps each gradient is taken in two halves: |g₁ − g₂|²/4 is the variance of their mean, and
    ⟨s₁ − r₁, s₂ − r₂⟩ is |Δ|² without bias. All three are averaged over time, and μ moves to μ* by at most `gac_max_step`.
    (arXiv 2605.26184 says as much and no formula; this one is ours. A step whose answers all earned the same has no
    g_R, and says nothing.)
    """

    def __init__(self, cfg: Config) -> None:
        self.c, self.mixture = cfg.controller, cfg.mixture
        self.value, self.means, self.weight = self.c.mu_init, [0.0, 0.0, 0.0], 0.0

    def mu(self, clock: float) -> float:
        return self.value

    def wants_noise(self, step: int) -> bool:
        return step >= 0 and step % self.mixture.gac_every == 0

    def noise(self, sft: float, rl: float, apart: float) -> dict[str, float]:
        """|s₁ − s₂|², |r₁ − r₂|² and ⟨s₁ − r₁, s₂ − r₂⟩ of a step; the figures of μ's move."""
        if rl > 0 and all(map(math.isfinite, (sft, rl, apart))):
            memory = self.mixture.gac_memory
            self.means = [memory * m + (1 - memory) * x for m, x in zip(self.means, (sft / 4, rl / 4, apart))]
            self.weight = memory * self.weight + 1 - memory
            var_sft, var_rl, delta = (m / self.weight for m in self.means)
            best = ratio(var_rl, var_rl + var_sft + max(delta, 0.0))
            step = min(max(best - self.value, -self.mixture.gac_max_step), self.mixture.gac_max_step)
            self.value = min(max(self.value + step, self.c.mu_min), self.c.mu_max)
        figures = {"var_sft": sft / 4, "var_rl": rl / 4, "apart": apart, "mu_next": self.value}
        return named(figures)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "means": self.means, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.means, self.weight = state["value"], state["means"], state["weight"]

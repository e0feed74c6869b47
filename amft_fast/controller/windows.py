"""The published way to learn μ: dot-products of gradients, over windows of steps.

The learned controller works in windows of K steps. At a window's start the loop takes a utility gradient u = ∇(−U) (two
halves, see meta_gradient.py); at every step of the window the probe gives its dot-products with that step's two gradients; at
the window's end μ moves once:

    s     = mean over the window of the signal, in which a positive value says that imitation helps the utility more
    σ     = standard error of s, from the two halves of u, remembered over windows
    gate  = max(0, 1 − (κ_ν · snr_gate · σ / s)²)
    Δμ    = clip(η_μ · s · gate, ±max_step) + η_H · (H* − H),        μ kept in [μ_min, μ_max]

κ_ν is Student's t at 97.5 % for ν degrees of freedom over its limit 1.96: σ is an estimate from few windows (one difference of
halves each), and taken at its face value it would let pure noise through in half of the first windows.

Signals, per half k, with X the difference of the two gradients' unit vectors or of the gradients themselves:

    balanced   ⟨u_k, g_SFT/|g_SFT| − g_RL/|g_RL|⟩ / |u|     separate cosines: neither gradient's length outweighs the other
    cosine     ⟨u_k, g_SFT − g_RL⟩ / (|u| |g_SFT − g_RL|)
    raw        η ⟨u_k, P ∘ c(I − ĝĝᵀ)(g_SFT − g_RL)⟩        the derivative dU/dμ itself, of one real optimizer step
    rms        raw, divided by its own running root mean square
    random     balanced with a sign drawn by lot in each window: a control
"""

from __future__ import annotations

import math
from typing import Any

from amft_fast.config import Config
from amft_fast.controller.base import Controller, named
from amft_fast.controller.statistics import ratio, student_t975
from amft_fast.data.stream import sample_seed
from amft_fast.multi_tensor import mixing_slope, named_sums


class MetaController(Controller):
    """Learns μ from the probe and the policy's entropy; `meta` and `entropy` switch its two parts."""

    def __init__(self, cfg: Config, meta: bool = True, entropy: bool = True) -> None:
        self.cfg, self.c = cfg, cfg.controller
        self.has_meta, self.has_entropy = meta, entropy
        self.needs_entropy_target = entropy
        self.value = self.c.mu_init
        self.windows = 0
        self.variance: float | None = None  # running σ² of the window's signal
        self.mean_square = 0.0  # of the raw signal, for rms
        self.at_bound = 0
        self._clear()

    def _clear(self) -> None:
        self.sums = dict.fromkeys(("half1", "half2", "cos_sft", "cos_rl", "entropy"), 0.0)
        self.probed = self.seen = 0

    def mu(self, clock: float) -> float:
        return self.value

    def starts_window(self, step: int) -> bool:
        t = step - self.c.start_step
        return self.has_meta and t >= 0 and t % self.c.window == 0

    def probes(self, step: int) -> bool:
        return self.has_meta and step >= self.c.start_step

    def observe(
        self, step: int, sums: list[float] | None, clip: float, lr: float, entropy: float | None, target: float | None
    ) -> dict[str, float]:
        """What one step measured: the probe's sums (None on a step without), its clip coefficient, the mean entropy; and H*,
        which is not read without an entropy part.

        Returns the figures of μ's move at the end of a window, else an empty dict.
        """
        if step < self.c.start_step:
            return {}
        if sums is not None:
            self._take_probe(named_sums(sums, self.value), clip, lr)
        if entropy is not None and math.isfinite(entropy):  # a step that was not finite says nothing about μ
            self.sums["entropy"] += entropy
            self.seen += 1
        last = (step - self.c.start_step + 1) % self.c.window == 0
        return self._move(target) if last else {}

    def _take_probe(self, n: dict[str, float], clip: float, lr: float) -> None:
        norm_u = math.sqrt(max(n["u1_u1"] + n["u2_u2"] + 2 * n["u1_u2"], 0.0)) / 2
        norm_sft, norm_rl = math.sqrt(n["sft_sft"]), math.sqrt(n["rl_rl"])
        halves = [self._signal(n, u, norm_u, clip, lr) for u in ("u1", "u2")]
        if not all(map(math.isfinite, halves)):
            return
        self.sums["half1"] += halves[0]
        self.sums["half2"] += halves[1]
        self.sums["cos_sft"] += ratio(n["u1_sft"] + n["u2_sft"], 2 * norm_u * norm_sft)
        self.sums["cos_rl"] += ratio(n["u1_rl"] + n["u2_rl"], 2 * norm_u * norm_rl)
        self.probed += 1

    def _signal(self, n: dict[str, float], u: str, norm_u: float, clip: float, lr: float) -> float:
        """The signal of one half of u: it is linear in u, so the whole signal is the mean of the two."""
        kind = self.c.signal
        if kind in ("balanced", "random"):
            norm_sft, norm_rl = math.sqrt(n["sft_sft"]), math.sqrt(n["rl_rl"])
            return ratio(n[f"{u}_sft"], norm_u * norm_sft) - ratio(n[f"{u}_rl"], norm_u * norm_rl)
        if kind == "cosine":
            return ratio(n[f"{u}_d"], norm_u * math.sqrt(max(n["d_d"], 0.0)))
        return lr * mixing_slope(n, u, self._diagonal(), clip)

    def _diagonal(self) -> str | None:
        p = self.cfg.meta.precondition
        if p == "auto":
            p = "exact" if self.cfg.train.optimizer == "adamw" else "none"
        return None if p == "none" else p

    def _move(self, target: float | None) -> dict[str, float]:
        """μ's one move at the end of a window."""
        c = self.c
        figures: dict[str, float] = {}
        meta = self._meta_part(figures) if self.probed else 0.0
        entropy = self.sums["entropy"] / max(self.seen, 1)
        pull = c.eta_entropy * (target - entropy) if self.has_entropy and self.seen else 0.0
        if c.space == "logit":
            logit = math.log(self.value / (1 - self.value)) + meta + pull
            moved = 1 / (1 + math.exp(-logit))
        else:
            moved = self.value + meta + pull
        self.value = min(max(moved, c.mu_min), c.mu_max)
        self.at_bound = self.at_bound + 1 if self.value in (c.mu_min, c.mu_max) else 0
        self.windows += 1
        self._clear()
        figures |= {"mu_meta": meta, "mu_entropy": pull, "mu_next": self.value, "entropy": entropy}
        return named(figures)

    def _meta_part(self, figures: dict[str, float]) -> float:
        c, n = self.c, self.probed
        half1, half2 = self.sums["half1"] / n, self.sums["half2"] / n
        signal = (half1 + half2) / 2
        if c.signal == "random":
            signal = abs(signal) * (1 if sample_seed(self.cfg.run.seed, "random sign", self.windows) % 2 else -1)
        square = ((half1 - half2) / 2) ** 2
        self.variance = (
            square if self.variance is None else c.noise_memory * self.variance + (1 - c.noise_memory) * square
        )
        error = math.sqrt(self.variance)
        if c.signal == "rms":
            self.mean_square = 0.9 * self.mean_square + 0.1 * signal**2
            scale = math.sqrt(self.mean_square / (1 - 0.9 ** (self.windows + 1)))
            signal, error = ratio(signal, scale), ratio(error, scale)
        snr = ratio(signal, error)
        gate = self._gate(snr)
        figures |= {"signal": signal, "stderr": error, "snr": snr, "gate": gate}
        figures |= {"cos_sft": self.sums["cos_sft"] / n, "cos_rl": self.sums["cos_rl"] / n}
        return min(max(c.eta_mu * signal * gate, -c.max_step), c.max_step)

    def _gate(self, snr: float) -> float:
        """How much of the step the evidence allows, 0 to 1."""
        if self.c.snr_gate == 0 or snr == 0:
            return float(self.c.snr_gate == 0)
        # Effective number of squared differences in the exponential average of σ²: 1 / Σ w².
        r, n = self.c.noise_memory, self.windows + 1
        weights = [r ** (n - 1)] + [(1 - r) * r**i for i in range(n - 1)]
        freedom = 1 / sum(w * w for w in weights)
        threshold = self.c.snr_gate * student_t975(freedom) / 1.96
        return max(0.0, 1 - (threshold / snr) ** 2)

    def state_dict(self) -> dict[str, Any]:
        keys = ("value", "windows", "variance", "mean_square", "at_bound", "sums", "probed", "seen")
        return {k: getattr(self, k) for k in keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

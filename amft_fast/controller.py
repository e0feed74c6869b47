"""μ over the course of a run: schedules, and the learned controller of method amft.

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

A controller is asked for μ at the start of a step and told afterwards what the step measured. Its state is plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from amft_fast.config import MAX_FLOAT, Config, TrainConfig
from amft_fast.data.stream import sample_seed
from amft_fast.methods import METHODS, Knobs
from amft_fast.multi_tensor import mixing_slope, named_sums

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Controller:
    """What says μ, and what it wants to be told. This one wants nothing and remembers nothing."""

    learned = False
    needs_entropy_target = False

    def mu(self, clock: float) -> float:
        """μ at `clock`, a position between 0 and the number of steps (see Trainer.clock)."""
        raise NotImplementedError

    def starts_window(self, step: int) -> bool:
        """Whether a fresh utility gradient is due before this step."""
        return False

    def probes(self, step: int) -> bool:
        """Whether `observe` is to be told of this step's dot-products with the utility gradient."""
        return False

    def wants_validation(self, step: int) -> bool:
        """Whether `validated` is to be told the loss of held-out demonstrations before this step."""
        return False

    def wants_noise(self, step: int) -> bool:
        """Whether `noise` is to be told of this step's gradients."""
        return False

    def observe(self, *measured: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


class Schedule(Controller):
    """μ as a fixed function of the progress 0..1 through the run: it depends on the step alone."""

    def __init__(self, shape: Callable[[float], float], steps: int) -> None:
        self.shape, self.steps = shape, steps

    def mu(self, clock: float) -> float:
        return self.shape(min(clock / max(self.steps - 1, 1), 1.0))


class Switch(Schedule):
    """Imitation until the loss of held-out demonstrations has stopped falling, then RL (arXiv 2512.11470).

    It has stopped when it was not under (1 − tolerance) times its best for `sft_patience` looks in a row; at the latest the
    schedule's own share is the end of it.
    """

    def __init__(self, shape: Callable[[float], float], cfg: TrainConfig) -> None:
        super().__init__(shape, cfg.steps)
        self.cfg, self.best, self.looks, self.switched = cfg, math.inf, 0, False

    def mu(self, clock: float) -> float:
        return 0.0 if self.switched else super().mu(clock)

    def wants_validation(self, step: int) -> bool:
        return step >= 0 and step % self.cfg.sft_check_every == 0 and self.mu(step) > 0

    def validated(self, nll: float) -> dict[str, float]:
        """The loss of held-out demonstrations before a step; the figures of it."""
        if nll < self.best * (1 - self.cfg.sft_tolerance):
            self.best, self.looks = nll, 0
        else:
            self.looks += 1
        self.switched = self.looks >= self.cfg.sft_patience
        return {"controller/val_nll": nll, "controller/looks_without_gain": float(self.looks)}

    def state_dict(self) -> dict[str, Any]:
        return {"best": min(self.best, MAX_FLOAT), "looks": self.looks, "switched": self.switched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.looks, self.switched = state["best"], state["looks"], state["switched"]


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
            best = _ratio(var_rl, var_rl + var_sft + max(delta, 0.0))
            step = min(max(best - self.value, -self.mixture.gac_max_step), self.mixture.gac_max_step)
            self.value = min(max(self.value + step, self.c.mu_min), self.c.mu_max)
        figures = {"var_sft": sft / 4, "var_rl": rl / 4, "apart": apart, "mu_next": self.value}
        return {f"controller/{k}": v for k, v in figures.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "means": self.means, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.means, self.weight = state["value"], state["means"], state["weight"]


class MetaController(Controller):
    """Learns μ from the probe and the policy's entropy; `meta` and `entropy` switch its two parts."""

    learned = True

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
        self.sums["cos_sft"] += _ratio(n["u1_sft"] + n["u2_sft"], 2 * norm_u * norm_sft)
        self.sums["cos_rl"] += _ratio(n["u1_rl"] + n["u2_rl"], 2 * norm_u * norm_rl)
        self.probed += 1

    def _signal(self, n: dict[str, float], u: str, norm_u: float, clip: float, lr: float) -> float:
        """The signal of one half of u: it is linear in u, so the whole signal is the mean of the two."""
        kind = self.c.signal
        if kind in ("balanced", "random"):
            norm_sft, norm_rl = math.sqrt(n["sft_sft"]), math.sqrt(n["rl_rl"])
            return _ratio(n[f"{u}_sft"], norm_u * norm_sft) - _ratio(n[f"{u}_rl"], norm_u * norm_rl)
        if kind == "cosine":
            return _ratio(n[f"{u}_d"], norm_u * math.sqrt(max(n["d_d"], 0.0)))
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
        return {f"controller/{k}": v for k, v in figures.items()}

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
            signal, error = _ratio(signal, scale), _ratio(error, scale)
        snr = _ratio(signal, error)
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


def student_t975(freedom: float) -> float:
    """Student's t at 97.5 %, for at least 1 degree of freedom, between whole numbers linear in 1/ν; 1.96 in the limit."""
    low = int(freedom)
    if low >= len(T975):
        return 1.96 + (T975[-1] - 1.96) * len(T975) / freedom
    share = (1 / low - 1 / freedom) / (1 / low - 1 / (low + 1))
    return T975[low - 1] + share * (T975[low] - T975[low - 1])


def _ratio(a: float, b: float) -> float:
    """a / b, and 0 where b is 0: a utility without spread, or a gradient that vanished, says nothing."""
    return a / b if b != 0 else 0.0


def inert(cfg: Config) -> str | None:
    """A sentence when the learned controller cannot move μ visibly, as with the published hyper-parameters."""
    c, lr = cfg.controller, cfg.train.lr
    if not METHODS[cfg.train.method].learned or c.signal != "raw" or lr * c.eta_mu > 1e-6 or c.eta_entropy > 2e-3:
        return None
    return (
        f"controller: with signal raw mu moves by train.lr x controller.eta_mu = {lr * c.eta_mu:.0e} times a dot-product: it "
        f"will stay where it starts, at {c.mu_init:g} (so do the published hyper-parameters; see docs/method.md)"
    )


def make(cfg: Config) -> Controller:
    """The controller that `train.method` names."""
    c, t = cfg.controller, cfg.train
    method = METHODS[t.method]
    if method.learns_from_noise:
        return NoiseOptimal(cfg)
    if method.shape is None:
        return MetaController(cfg, meta=method.learns_from_utility, entropy=method.learns_from_entropy)
    m = cfg.mixture
    falls = m.chord_steps / max(t.steps - 1, 1)
    knobs = Knobs(c.mu_init, c.schedule_start, c.schedule_end, t.sft_share, m.chord_mu, falls, m.chord_phi_mu)
    shape = partial(method.shape, k=knobs)
    return Switch(shape, t) if method.staged and t.sft_stop == "saturation" else Schedule(shape, t.steps)

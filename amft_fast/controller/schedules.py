"""μ as a function of the progress alone, and imitation until its held-out loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from amft_fast.config import MAX_FLOAT, TrainConfig
from amft_fast.controller.base import Controller


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

    def wants_validation(self, step: int, clock: float) -> bool:
        return step >= 0 and step % self.cfg.sft_check_every == 0 and self.mu(step) > 0

    def validated(self, logprobs: list[np.ndarray]) -> dict[str, float]:
        """The log-probs of each held-out demonstration's tokens before a step; the figures of it."""
        nll = -float(np.concatenate(logprobs).mean())
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

"""μ over the course of a run: the schedules, and (method amft) the learned controller.

A controller is asked for μ at the start of a step and told afterwards what the step measured. Its state is a plain dict of
JSON values that goes into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from amft_fast.config import Config


class Controller(Protocol):
    """What the training loop asks of a controller."""

    def mu(self, step: int) -> float: ...
    def imitates_only(self, step: int) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Schedule:
    """μ as a fixed function of the progress 0..1 through the run."""

    def __init__(self, shape: Callable[[float], float], steps: int) -> None:
        self.shape, self.steps = shape, steps

    def mu(self, step: int) -> float:
        return self.shape(step / max(self.steps - 1, 1))

    def imitates_only(self, step: int) -> bool:
        """Whether a step at this point takes demonstrations alone (then `train.sft_lr` applies)."""
        return self.mu(step) == 1.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A schedule depends on the step alone."""


def make(cfg: Config) -> Controller:
    """The controller that `train.method` names."""
    c, t = cfg.controller, cfg.train
    start, end = c.schedule_start, c.schedule_end
    shapes: dict[str, Callable[[float], float]] = {
        "sft": lambda x: 1.0,
        "rl": lambda x: 0.0,
        "sft_then_rl": lambda x: 1.0 if x < t.sft_share else 0.0,
        "fixed": lambda x: c.mu_init,
        "linear": lambda x: start + (end - start) * x,
        "cosine": lambda x: end + (start - end) * 0.5 * (1 + math.cos(math.pi * x)),
    }
    return Schedule(shapes[t.method], t.steps)

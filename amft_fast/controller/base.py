"""What every controller is: it is asked for μ at the start of a step and told afterwards what the step measured."""

from __future__ import annotations

from typing import Any


class Controller:
    """What says μ, and what it wants to be told. This one wants nothing and remembers nothing."""

    needs_entropy_target = False
    reads_demos = False  # whether a look now is to read held-out demonstrations

    def mu(self, clock: float) -> float:
        """μ at `clock`, a position between 0 and the number of steps (see Trainer.clock)."""
        raise NotImplementedError

    def starts_window(self, step: int) -> bool:
        """Whether a fresh utility gradient is due before this step."""
        return False

    def probes(self, step: int) -> bool:
        """Whether `observe` is to be told of this step's dot-products with the utility gradient."""
        return False

    def wants_validation(self, step: int, clock: float) -> bool:
        """Whether `validated` is to be told how likely held-out demonstrations are, before this step."""
        return False

    def wants_noise(self, step: int) -> bool:
        """Whether `noise` is to be told of this step's gradients."""
        return False

    def explored(self, alive: bool) -> None:
        """After a step with rollouts: whether some answers to a prompt earned differently, or were right."""

    def observe(self, *measured: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


def named(figures: dict[str, float]) -> dict[str, float]:
    """As a step's record has them."""
    return {f"controller/{k}": v for k, v in figures.items()}

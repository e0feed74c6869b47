"""The methods of `train.method`, one row each: what the settings, the controller, the report and the plan ask of a method.

A method is what μ does over a run, L = μ · L_SFT + (1 − μ) · L_RL. Either a schedule fixes it, a function of the progress
through the run (`shape`), or the controller learns it. A new schedule is one more row here, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Knobs(NamedTuple):
    """What a schedule may depend on beside the progress: settings of the sections controller and train."""

    mu: float  # controller.mu_init
    start: float  # controller.schedule_start
    end: float  # controller.schedule_end
    sft_share: float  # train.sft_share


class Method(NamedTuple):
    """One method; `shape` maps the progress 0..1 through the run and the knobs to μ in [0, 1]."""

    name: str
    words: str  # what a report calls it
    has_sft: bool = True  # whether it imitates demonstrations, at some time
    has_rl: bool = True  # whether it explores, at some time
    shape: Callable[[float, Knobs], float] | None = None
    staged: bool = False  # one after the other: no step has both
    learns_from_utility: bool = False  # whether the controller takes the utility gradient
    learns_from_entropy: bool = False  # whether the controller holds the entropy at H*

    @property
    def learned(self) -> bool:
        """Whether a controller moves μ; else `shape` gives it."""
        return self.shape is None


def _sft_then_rl(x: float, k: Knobs) -> float:
    return 1.0 if x < k.sft_share else 0.0


def _linear(x: float, k: Knobs) -> float:
    return k.start + (k.end - k.start) * x


def _cosine(x: float, k: Knobs) -> float:
    return k.end + (k.start - k.end) * 0.5 * (1 + math.cos(math.pi * x))


_ROWS = (
    Method("amft", "AMFT, μ learned by its meta-gradient", learns_from_utility=True, learns_from_entropy=True),
    Method("amft_no_meta", "AMFT without its meta-gradient", learns_from_entropy=True),
    Method("amft_no_entropy", "AMFT without its entropy term", learns_from_utility=True),
    Method("sft", "SFT, imitation alone", has_rl=False, shape=lambda x, k: 1.0),
    Method("rl", "RL alone", has_sft=False, shape=lambda x, k: 0.0),
    Method("sft_then_rl", "SFT, then RL", shape=_sft_then_rl, staged=True),
    Method("fixed", "SFT + RL with a fixed μ", shape=lambda x, k: k.mu),
    Method("linear", "SFT + RL with μ falling linearly", shape=_linear),
    Method("cosine", "SFT + RL with μ falling along a cosine", shape=_cosine),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}

"""Which demonstrations and rollouts enter an update, with which weights: what a method is, beside what μ does over the run.

A `Mixture` is asked three things in a step. How many answers to draw to a prompt, and what each begins with (`generations`,
`hint`); then, once the task has judged them, what each of the step's updates is made of (`mix`); and whether there are
updates beside these (`extra`). This one is L = μ · L_SFT + (1 − μ) · L_RL, with demonstrations from a stream of their own.

A demonstration's sequence in `Mix.sft`, or among the rollouts of `Mix.rl`, enters with −token_weight · log π +
shape_weight · S(p) per token (fields of the sequence; 1 and 0 where there are none), S as `Method.shaping` says
(amft_kernels.loss_forms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from amft_fast.config import Config
from amft_fast.data.batch import TokenSequence
from amft_fast.interfaces import Item, Sample


@dataclass
class Group:
    """One prompt of the step: its rollouts as the task judged them, and as the loss reads them."""

    samples: list[Sample]
    rollouts: list[TokenSequence]

    @property
    def prompt_id(self) -> str:
        return self.samples[0].prompt_id

    @property
    def rewards(self) -> np.ndarray:
        return np.array([s.reward for s in self.samples])

    @property
    def solved(self) -> int:
        """How many answers are right."""
        return sum(s.success for s in self.samples)

    def with_advantages(self, advantages: np.ndarray) -> list[TokenSequence]:
        """The rollouts with these in place of what they were judged to have, one a rollout."""
        for sample, a in zip(self.samples, advantages):
            sample.advantage = float(a)
        return [s.with_fields(advantages=a) for s, a in zip(self.rollouts, advantages)]


def groups_of(samples: list[Sample], rollouts: list[TokenSequence]) -> list[Group]:
    """The step's prompts in order."""
    pairs = groupby(zip(samples, rollouts), key=lambda pair: pair[0].group_id)
    return [Group(*map(list, zip(*members))) for _, members in pairs]


class Mix(NamedTuple):
    """One update: L = sft_weight · L_SFT + rl_weight · L_RL, each a mean by its own global count. `mu` is what is recorded."""

    sft: list[TokenSequence]
    rl: list[TokenSequence]
    mu: float
    sft_weight: float
    rl_weight: float


class Tools(NamedTuple):
    """What a mixture may ask for."""

    demo: Callable[[str], TokenSequence | None]  # of the training prompt with this id, None where it has none
    # Log-probs and entropies of the trained tokens of each sequence, at the present weights: a forward pass.
    tokens: Callable[[list[TokenSequence]], list[tuple[np.ndarray, np.ndarray]]]


class Mixture:
    """The plain mixture, and the base of all others."""

    streams = True  # whether demonstrations come from a stream of their own, `train.demos_per_step` a step
    kind: str | None = None  # of advantage, in place of `advantage.kind`

    def __init__(self, cfg: Config, tools: Tools) -> None:
        self.cfg, self.c, self.tools = cfg, cfg.mixture, tools
        self.progress = 0.0  # through the run, 0 to 1, told at each step

    @property
    def generations(self) -> int:
        """Answers drawn to each prompt."""
        return self.cfg.rollout.num_generations

    def hint(self, item: Item, number: int, step: int) -> list[int]:
        """Token ids that answer `number` to a prompt begins with, before the policy goes on by itself."""
        return []

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        """One update of a stream's demonstrations and some of the step's prompts."""
        return Mix(sft, [s for g in groups for s in g.rollouts], mu, mu, 1 - mu)

    def extra(self) -> list[Mix]:
        """Further updates of this step."""
        return []

    def state_dict(self) -> Any:
        """What must be saved, as JSON values."""
        return None

    def load_state_dict(self, state: Any) -> None: ...

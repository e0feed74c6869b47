"""Answers to held-out prompts: what a learned μ is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from amft_fast.interfaces import Item, Sample

MOST_ROUNDS = 8

Verdict = Literal["keep", "back", "go on"]
"""What becomes of the weights after a look: they are kept, they go back to those that are, or neither."""

Draw = Callable[[Sequence[Item], int, int], list[Sample]]
"""(prompts, which draw of a look this is, rounds) → so many rounds of answers to each, prompt by prompt."""


class HeldOut(NamedTuple):
    """What the answers to held-out prompts earned, and which prompts are alive."""

    rewards: np.ndarray  # [prompts]: the mean over a prompt's answers
    alive: np.ndarray  # [prompts]: share of the rounds whose answers earned differently, or were all right
    right: float  # share of all answers
    sampled: int  # tokens

    @classmethod
    def of(cls, samples: list[Sample], prompts: int, rounds: int = 1) -> HeldOut:
        """From equally many answers to each prompt, prompt by prompt; a round of them is as many as a step draws."""
        shape = (prompts, rounds, -1)
        rewards = np.array([s.reward for s in samples]).reshape(shape)
        right = np.array([s.success for s in samples]).reshape(shape)
        alive = (np.ptp(rewards, axis=2) > 0) | right.all(axis=2)
        return cls(rewards.mean(axis=(1, 2)), alive.mean(axis=1), float(right.mean()), tokens_of(samples))

    def joined(self, more: HeldOut, weight: float) -> HeldOut:
        """With further answers to the same prompts, `weight` times as many."""
        a, b = 1 / (1 + weight), weight / (1 + weight)
        return HeldOut(
            a * self.rewards + b * more.rewards,
            a * self.alive + b * more.alive,
            a * self.right + b * more.right,
            self.sampled + more.sampled,
        )


def tokens_of(samples: Sequence[Sample]) -> int:
    """Sampled ones."""
    return sum(sum(s.loss_mask) for s in samples)


def look(
    draw: Draw, items: Sequence[Item], few: int, known: int, tokens: Callable[[list[Sample]], float]
) -> tuple[HeldOut, list[Sample]]:
    """Answers to held-out prompts for about `tokens` of sampling, which it is told by the first ones; and those first ones.

    The first look takes `few` prompts, and then as many of the others as that pays for; each later one takes those of the
    first, `known`. What is left then pays for further rounds of answers to the same prompts, at most eight in all.
    """
    first = draw(items[: known or few], 0, 1)
    count, allowed = len(items[: known or few]), tokens(first)
    if not known:
        more = min(len(items), int(allowed * few / max(tokens_of(first), 1)))
        if more > count:
            first += draw(items[count:more], 0, 1)
            count = more
    found = HeldOut.of(first, count)
    further = min(MOST_ROUNDS, int(allowed / max(found.sampled, 1))) - 1
    if further > 0:
        found = found.joined(HeldOut.of(draw(items[:count], 1, further), count, further), further)
    return found, first

"""Answers to held-out prompts, and the likelihood of held-out demonstrations: what a learned μ is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from amft_fast.interfaces import Sample


def losses(logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """The mean loss of each demonstration's tokens, in nats, from their log-probs."""
    return np.array([-x.mean() for x in logprobs], float)


class HeldOut(NamedTuple):
    """What the answers to held-out prompts earned, which prompts are alive, and how likely held-out demonstrations are."""

    rewards: np.ndarray  # [prompts]: the mean over a prompt's answers
    alive: np.ndarray  # [prompts]: whether its answers earned differently, or were all right
    right: float  # share of all answers
    sampled: int  # tokens
    nll: np.ndarray  # [demonstrations]: the mean over a demonstration's tokens, in nats; empty where there are none

    @classmethod
    def of(cls, samples: list[Sample], prompts: int, demos: Sequence[np.ndarray] = ()) -> HeldOut:
        """From equally many answers to each prompt, prompt by prompt, and the log-probs of each demonstration's tokens."""
        rewards = np.array([s.reward for s in samples]).reshape(prompts, -1)
        right = np.array([s.success for s in samples]).reshape(prompts, -1)
        return cls.of_answers(rewards, right, sum(sum(s.loss_mask) for s in samples), losses(demos))

    @classmethod
    def of_answers(cls, rewards: np.ndarray, right: np.ndarray, sampled: int, nll: np.ndarray) -> HeldOut:
        """From each answer's reward and whether it is right, both [prompts, answers], and each demonstration's loss."""
        alive = (np.ptp(rewards, axis=1) > 0) | right.all(axis=1)
        return cls(rewards.mean(axis=1), alive, float(right.mean()), sampled, nll)

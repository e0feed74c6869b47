"""Answers to held-out prompts: what a learned μ is judged by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amft_fast.interfaces import Sample


class HeldOut(NamedTuple):
    """What the answers to held-out prompts earned, and which prompts are alive."""

    rewards: np.ndarray  # [prompts]: the mean over a prompt's answers
    alive: np.ndarray  # [prompts]: whether its answers earned differently, or were all right
    right: float  # share of all answers
    sampled: int  # tokens

    @classmethod
    def of(cls, samples: list[Sample], prompts: int) -> HeldOut:
        """From equally many answers to each prompt, prompt by prompt."""
        rewards = np.array([s.reward for s in samples]).reshape(prompts, -1)
        right = np.array([s.success for s in samples]).reshape(prompts, -1)
        alive = (np.ptp(rewards, axis=1) > 0) | right.all(axis=1)
        return cls(rewards.mean(axis=1), alive, float(right.mean()), sum(sum(s.loss_mask) for s in samples))

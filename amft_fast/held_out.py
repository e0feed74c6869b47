"""Answers to held-out prompts, and the likelihood of held-out demonstrations: what a learned μ is judged by."""

from __future__ import annotations

import math
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
    luck: float = math.nan  # see luck_of

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
        return cls(rewards.mean(axis=1), alive, float(right.mean()), sampled, nll, luck_of(rewards))


def luck_of(rewards: np.ndarray) -> float:
    """The share of the variance of rewards [prompts, answers] that lies between the answers to a prompt, 0 to 1; the rest lies
    between prompts. NaN where all earned the same, or no prompt has two answers.

    One minus the intraclass correlation, by the unbiased mean squares of a one-way analysis of variance.
    """
    prompts, answers = rewards.shape
    if prompts < 2 or answers < 2:
        return math.nan
    return luck_of_means(rewards.mean(axis=1), float(rewards.var(axis=1, ddof=1).mean()), answers)


def luck_of_means(means: np.ndarray, within: float, answers: int) -> float:
    """The same from the mean reward of each prompt over so many answers and the mean variance within prompts."""
    between = max(float(means.var(ddof=1)) - within / answers, 0.0)
    return within / (within + between) if within + between > 0 else math.nan

"""What other weights would earn on held-out prompts, told from answers that were drawn once.

With answers y of a prompt drawn at θ and b the mean reward of the prompt's other answers, U(θ') − U(θ) is

    E [ (r(y) − b) (w − 1) ],     w = π_θ'(y) / π_θ(y)

since E w = 1. At θ' near θ, w − 1 ≈ ⟨∇ log π(y), θ' − θ⟩, and this is the policy gradient's dot-product with the step that was
taken: the meta-gradient, one number for each prompt, along a real step of the optimizer, from a forward pass. w is kept
within [1/`cap`, `cap`]. Prompts whose answers all earned the same say nothing and are not scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amft_fast import objective
from amft_fast.interfaces import Item
from amft_fast.meta_gradient import Draw, RolloutCache
from amft_fast.scoring import Scorer


class HeldOut:
    """Held-out prompts, the answers drawn last, and what was earned with them."""

    def __init__(self, items: list[Item], scorer: Scorer, temperature: float, cap: float) -> None:
        self.scorer, self.temperature, self.cap = scorer, temperature, cap
        self.cache = RolloutCache(items, 1.0)

    def draw(self, step: int, draw: Draw) -> int:
        """Draws all answers anew; returns the tokens sampled. When `draw` raises, the former answers stay."""
        self.cache.refresh(step, draw, everything=True)
        return sum(sum(s.loss_mask) for g in self.cache.groups for s in g.samples)

    @property
    def rewards(self) -> np.ndarray:
        """[prompts, answers]"""
        return np.array([[s.reward for s in g.samples] for g in self.cache.groups])

    def gains(self) -> tuple[np.ndarray, int]:
        """U(present weights) − U(weights drawn with), estimated for each prompt [prompts]; and the tokens scored."""
        rewards = self.rewards
        n = rewards.shape[1]
        useful = np.flatnonzero(np.ptp(rewards, axis=1) > 0)
        samples = [s for i in useful for s in self.cache.groups[i].samples]
        sequences = [objective.rollout_sequence(s, self.temperature) for s in samples]
        gains = np.zeros(len(rewards))
        if sequences:
            moved = [
                np.sum(logp - s.fields["behavior_logprobs"][s.trained])
                for s, (logp, _) in zip(sequences, self.scorer.tokens(sequences))
            ]
            bound = np.log(self.cap)
            ratios = np.exp(np.clip(np.array(moved).reshape(-1, n), -bound, bound))
            r = rewards[useful]
            others = (r.sum(axis=1, keepdims=True) - r) / (n - 1)
            gains[useful] = ((r - others) * (ratios - 1)).mean(axis=1)
        return gains, sum(len(s.ids) for s in sequences)

    def state_dict(self) -> list[dict[str, Any]]:
        return self.cache.state_dict()

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.cache.load_state_dict(state)

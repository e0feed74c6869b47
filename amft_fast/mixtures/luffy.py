"""LUFFY (arXiv 2504.14945): the demonstration is one more answer of its prompt's group.

    A = r − mean over the n − 1 rollouts and the demonstration          (no standard deviation)
    rollouts:  −A ρ          demonstration:  −A f(p),  f(p) = p / (p + γ),  whose π_old is 1

All tokens share one denominator. A group in which all earned the same has A = 0 throughout, and so no gradient.
"""

from __future__ import annotations

import numpy as np

from amft_fast.data.batch import TokenSequence
from amft_fast.mixtures.base import Group, Mix, Mixture


class Luffy(Mixture):
    streams = False
    kind = "reinforce++"  # replaced below, and no group is too small for it

    @property
    def generations(self) -> int:
        return self.cfg.rollout.num_generations - 1  # the demonstration is the last

    def advantages(self, group: Group) -> tuple[TokenSequence | None, np.ndarray]:
        """The prompt's demonstration, and r − mean of the rollouts and, last, of it."""
        demo = self.tools.demo(group.prompt_id)
        rewards = group.rewards if demo is None else np.append(group.rewards, self.c.demo_reward)
        return demo, rewards - rewards.mean()

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        rl = []
        for group in groups:
            demo, advantages = self.advantages(group)
            rl += group.with_advantages(advantages[: len(group.samples)])
            if demo is not None:
                rl.append(demo.with_fields(token_weight=0.0, shape_weight=advantages[-1]))
        return Mix([], rl, 0.0, 0.0, 1.0)

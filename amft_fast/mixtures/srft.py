"""SRFT (arXiv 2506.19767): all at once, weighed by the entropy of each sequence, H̄ its mean over tokens, a constant.

    demonstration:  0.5 · exp(−H̄) · NLL,  and LUFFY's −A f(p)
    rollouts:       right −0.1 · exp(H̄) · log π,   wrong +log π

What is wrong is pushed down without an advantage and without a bound. Where a rollout serves several updates, the clip of
`objective` holds it; in the authors' code nothing does.
"""

from __future__ import annotations

import numpy as np

from amft_fast.data.batch import TokenSequence
from amft_fast.mixtures.base import Group, Mix
from amft_fast.mixtures.luffy import Luffy


class Srft(Luffy):
    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        demos, rl = [], []
        for group in groups:
            demo, advantages = self.advantages(group)
            if demo is not None:
                demos.append(demo.with_fields(shape_weight=advantages[-1]))
            right = [s.success for s in group.samples]
            weights = self.c.srft_rollout * np.exp(self._entropies(group.rollouts))
            rl += group.with_advantages(np.where(right, weights, -1.0))
        weights = self.c.srft_demo * np.exp(-self._entropies(demos))
        demos = [d.with_fields(token_weight=w) for d, w in zip(demos, weights)]
        return Mix(demos, rl, 0.5, 1.0, 1.0)

    def _entropies(self, sequences: list[TokenSequence]) -> np.ndarray:
        return np.array([h.mean() if len(h) else 0.0 for _, h in self.tools.tokens(sequences)])

"""The order in which prompts and demonstrations are taken."""

from __future__ import annotations

import numpy as np

from amft_fast.rollout.episodes import sample_seed


class Stream:
    """Endless shuffled passes over `n` indices; the order depends on the seed alone, the position is part of checkpoints."""

    def __init__(self, n: int, seed: int, name: str) -> None:
        self.n, self.key, self.position = n, sample_seed(seed, name), 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def take(self, k: int) -> list[int]:
        """The next k indices."""
        out = []
        for position in range(self.position, self.position + k):
            epoch, i = divmod(position, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng([self.key, epoch]).permutation(self.n)
            out.append(int(self._order[i]))
        self.position += k
        return out

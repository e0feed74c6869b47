"""The order in which prompts and demonstrations are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from amft_fast.interfaces import Item


def sample_seed(*parts: object) -> int:
    """The 64-bit seed of a sample, from what it is (run seed, step, prompt, sample index, turn), not from where it is drawn."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def choose(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items: a fixed pseudo-random choice by id, so that it never depends on order."""
    if limit is None or len(items) <= limit:
        return list(items)
    return sorted(items, key=lambda item: sample_seed("choose", item.id))[:limit]


class Stream:
    """Endless shuffled passes over `n` indices; the order depends on the seed alone, the position is part of checkpoints."""

    def __init__(self, n: int, seed: int, name: str) -> None:
        self.n, self.key, self.position = n, sample_seed(seed, name), 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def take(self, k: int) -> list[int]:
        """The next k indices."""
        self.position += k
        return [self.index(position) for position in range(self.position - k, self.position)]

    def index(self, position: int) -> int:
        """What stands at a position."""
        epoch, i = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.key, epoch]).permutation(self.n)
        return int(self._order[i])

    def state_dict(self) -> int:
        return self.position

    def load_state_dict(self, state: int) -> None:
        self.position = state

"""The order in which prompts and demonstrations are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


MOST_IN_A_ROW = 3  # times that count


class Pass(NamedTuple):
    """One pass, settled when it began: where it stands in the stream, how often in a row each index had been flat by then, and
    which it takes, in order."""

    number: int
    start: int
    flat: np.ndarray  # [n], uint8
    order: np.ndarray

    @property
    def end(self) -> int:
        return self.start + len(self.order)


class Passes(Stream):
    """Shuffled passes that leave out some of what has taught nothing of late.

    An index that was flat the last k times it was taken is in a pass with probability again^k, k up to 3. With `again` 1 these
    are the passes of a Stream. What is told while a pass goes on is for those that begin later: a position that is put back
    finds what stood there. Skipping what was flat is of Zheng et al. 2025 (arXiv:2506.02177).
    """

    def __init__(self, n: int, seed: int, name: str, again: float) -> None:
        super().__init__(n, seed, name)
        self.again = again
        self.flat = np.zeros(n, np.uint8)  # times in a row
        self.passes: list[Pass] = []  # the last, and those before it that may come again

    def index(self, position: int) -> int:
        while not self.passes or position >= self.passes[-1].end:
            last = self.passes[-1] if self.passes else None
            number = last.number + 1 if last else position // self.n
            self.passes.append(self._pass(number, last.end if last else number * self.n, self.flat.copy()))
        found = self._at(position)
        return int(found.order[position - found.start])

    def _at(self, position: int) -> Pass:
        return next(p for p in reversed(self.passes) if p.start <= position)

    def chances(self, begin: int, count: int) -> np.ndarray:
        """With which probability what stands at each of these positions, taken before, was in its pass; 1 where the pass is
        not known any more."""
        known = self.passes[0].start if self.passes else begin + count
        flat = [self._at(p).flat[self.index(p)] if p >= known else 0 for p in range(begin, begin + count)]
        return self.again ** np.array(flat, float)

    def _pass(self, number: int, start: int, flat: np.ndarray) -> Pass:
        rng = np.random.default_rng([self.key, number])
        order = rng.permutation(self.n)
        taken = rng.random(self.n) < self.again ** flat.astype(float)
        return Pass(number, start, flat, order[taken[order]] if taken.any() else order)

    @property
    def left_out(self) -> float:
        """The share of the indices that the last pass leaves out."""
        return 1 - len(self.passes[-1].order) / self.n if self.passes else 0.0

    def told(self, flat: Mapping[int, bool], oldest: int) -> None:
        """Whether each of these was flat; no position before `oldest` will come again."""
        for i, it_was in flat.items():
            self.flat[i] = min(self.flat[i] + 1, MOST_IN_A_ROW) if it_was else 0
        self.passes = [p for p in self.passes[:-1] if p.end > oldest] + self.passes[-1:]

    def history(self) -> dict[str, Any]:
        """What was told and which passes have begun by this position, as JSON values."""
        begun = [(p.number, p.start, _digits(p.flat)) for p in self.passes if p.start < self.position]
        return {"again": self.again, "flat": _digits(self.flat), "passes": begun}

    def load_history(self, state: dict[str, Any] | None) -> None:
        """Takes up what `history` gave; nothing where it is of another number of indices, or of another `again`."""
        if state and len(state["flat"]) == self.n and state["again"] == self.again:
            self.flat = _counts(state["flat"])
            self.passes = [self._pass(number, start, _counts(flat)) for number, start, flat in state["passes"]]


def _digits(counts: np.ndarray) -> str:
    return (counts + ord("0")).tobytes().decode()


def _counts(digits: str) -> np.ndarray:
    return np.frombuffer(digits.encode(), np.uint8) - ord("0")

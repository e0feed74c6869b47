"""Where every row of a batch is in its turn: host memory, numpy, no work of its own on the device.

A row first reads what was said to it, a token each time, and then samples. Rows that are decoded together stand at places
0, 1, …; a row that leaves is replaced by a new one, or by the last ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.rollout.sampling import uniform


class Turns:
    """Rows at their places. `room`: most of them at a time; `width`: most tokens that any samples in a turn."""

    def __init__(self, room: int, width: int, sampling: Sampling) -> None:
        self.room, self.width, self.size = room, width, 0
        self.stop = np.array(sampling.stop_token_ids or (-1,))
        self.request = np.zeros(room, np.int64)
        self.seed = np.zeros(room, np.uint64)
        self.count, self.limit, self.unread = (np.zeros(room, np.int64) for _ in range(3))
        self.tokens = np.zeros((room, width), np.int64)
        self.logprobs = np.zeros((room, width), np.float32)
        self.entropy = np.zeros(room)  # of the distributions that the turn's tokens were drawn from, summed
        self.said: dict[int, deque[int]] = {}  # what a row still reads, by its request

    def join(self, places: Sequence[int], numbers: Sequence[int], requests: Sequence[Request]) -> None:
        """New rows at these places; `numbers` name their requests."""
        self.size = max(self.size, *(place + 1 for place in places))
        self.request[places], self.unread[places] = numbers, 0
        self._begin(places, requests)

    def go_on(self, place: int, request: Request, said: list[int]) -> None:
        """This row reads what was said to it, and then answers."""
        self._begin([place], [request])
        self.said[self.request[place]], self.unread[place] = deque(said), len(said)

    def _begin(self, places: Sequence[int], requests: Sequence[Request]) -> None:
        """A turn of its own random stream and its own length."""
        if max(r.max_new_tokens for r in requests) > self.width:
            raise ValueError("a reply must not ask for more tokens than the longest first request")
        self.seed[places] = np.array([r.seed for r in requests], np.uint64)
        self.limit[places] = [r.max_new_tokens for r in requests]
        self.count[places] = 0
        self.entropy[places] = 0.0

    def uniform(self, places: np.ndarray) -> np.ndarray:
        """The number that draws each row's next token, fp64."""
        return uniform(self.seed[places], self.count[places])

    def take(
        self, places: np.ndarray, sampled: np.ndarray, logprob: np.ndarray, entropy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(the tokens that these rows read next: said to them, or sampled by them; the places whose turn ends with theirs)."""
        reading, count = self.unread[places] > 0, self.count[places]
        own = ~reading
        self.tokens[places[own], count[own]], self.logprobs[places[own], count[own]] = sampled[own], logprob[own]
        self.count[places] += own
        self.entropy[places] += np.where(own, entropy, 0.0)
        ended = own & (np.isin(sampled, self.stop) | (count + 1 >= self.limit[places]))
        if reading.any():
            sampled = sampled.copy()
            for i in np.flatnonzero(reading):
                sampled[i] = self.said[self.request[places[i]]].popleft()
            self.unread[places] -= reading
        return sampled, places[ended]

    def completion(self, place: int, version: int) -> Completion:
        """What the row at this place has sampled in its turn."""
        n = self.count[place]
        ids = self.tokens[place, :n].tolist()
        why = "stop" if ids[-1] in self.stop else "length"
        entropy = float(self.entropy[place])
        logprobs = self.logprobs[place, :n].tolist()
        return Completion(ids, logprobs, why, version, entropy if np.isfinite(entropy) else None)

    def leave(self, places: Sequence[int]) -> np.ndarray:
        """Takes rows out; the last ones come into their places. What was where, before, by place."""
        left = self.size - len(places)
        order, gone = np.arange(left), set(places)
        holes = [place for place in places if place < left]
        order[holes] = [place for place in range(left, self.size) if place not in gone]
        self.size = left
        for rows in (
            *(self.request, self.seed, self.count, self.limit, self.unread, self.tokens, self.logprobs),
            self.entropy,
        ):
            rows[holes] = rows[order[holes]]
        return order

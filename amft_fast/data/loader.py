"""Reads ahead: what a stream will hand out next is made ready by worker threads while a step runs.

The position is the stream's and counts what was taken, never what was read ahead, so that a checkpoint holds the exact place.
The work is reading, and tokenising in Rust, which lets other threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from amft_fast.data.stream import Stream

T = TypeVar("T")


class Loader(Generic[T]):
    """`make(index)` of the stream's next indices, in order, by `workers` threads (0: at the call itself).

    The stream's position may be set back or forth at any time. An exception of `make` is raised when its row is taken.
    """

    def __init__(self, stream: Stream, make: Callable[[int], T], workers: int) -> None:
        self.stream, self.make = stream, make
        self._threads = ThreadPoolExecutor(workers, "data") if workers else None
        self._ahead: dict[int, Future[T]] = {}

    def take(self, k: int) -> list[T]:
        """The next k rows; the k after them are begun."""
        begin = self.stream.position
        indices = self.stream.take(k)
        if self._threads is None:
            return [self.make(i) for i in indices]
        wanted = range(begin, begin + 2 * k)
        for position in [p for p in self._ahead if p not in wanted]:
            self._ahead.pop(position).cancel()
        for position in wanted:
            if position not in self._ahead:
                self._ahead[position] = self._threads.submit(self.make, self.stream.index(position))
        return [self._ahead.pop(position).result() for position in range(begin, begin + k)]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

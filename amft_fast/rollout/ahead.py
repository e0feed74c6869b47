"""Rollouts of the next step, drawn in a thread while this one trains (`rollout.async_steps = 1`).

They are drawn with the weights that this step began with, so they are one update old when they are trained on: the trainer then
computes `old` log-probs before its first update, and the importance weight old/behavior corrects for the age.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from amft_fast.interfaces import Sample, Turn


class Ahead:
    """At most one step's rollouts, in flight or waiting to be used."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self.future: Future | None = None

    def start(self, draw: Callable[[], list[Sample]]) -> None:
        """Begins to draw; nothing else may be asked of the engine before `wait`."""
        if self.future is None:
            self.future = self.pool.submit(draw)

    def wait(self) -> None:
        """Returns when nothing is in flight any more. Raises what the drawing raised, and then holds nothing."""
        if self.future is not None and (error := self.future.exception()) is not None:
            self.future = None
            raise error

    def drop(self) -> None:
        """What was drawn has been used, or will not be."""
        self.future = None

    def result(self) -> list[Sample] | None:
        """The rollouts that were drawn ahead, which stay until they are dropped; None when there are none."""
        self.wait()
        return None if self.future is None else self.future.result()

    def state_dict(self) -> list[dict[str, Any]] | None:
        """What waits to be used, as JSON values: its weights are gone, so it cannot be drawn again as it was."""
        drawn = self.result()
        return None if drawn is None else [asdict(sample) | sample.lists() for sample in drawn]

    def load_state_dict(self, state: list[dict[str, Any]] | None) -> None:
        self.future = None
        if state is not None:
            self.future = Future()
            lists = [(s, {"turns": [Turn(**t) for t in s["turns"]], "images": tuple(s["images"])}) for s in state]
            self.future.set_result([Sample(**(s | own)) for s, own in lists])

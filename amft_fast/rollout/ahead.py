"""Rollouts of the steps to come, drawn in threads while this one trains (`rollout.async_steps` = D: of at most D steps).

A queue in the order of the steps: what is drawn for a step is trained on in that step or never. Each entry knows where the
stream of prompts stood before it, so that prompts whose answers came to nothing are asked again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from amft_fast.interfaces import Sample, Turn


@dataclass
class Batch:
    """The rollouts of one step: being drawn, or there. `position`: of the prompts' stream before they were taken."""

    step: int
    position: int
    drawn: Future[list[Sample]]

    @property
    def whole(self) -> bool:
        return self.drawn.done() and not self.drawn.cancelled() and self.drawn.exception() is None

    def state_dict(self) -> dict[str, Any]:
        """As JSON values: the weights that drew it are gone, so it cannot be drawn again as it was."""
        samples = [kept(sample) for sample in self.drawn.result()]
        return {"step": self.step, "position": self.position, "samples": samples}


class Ahead:
    """The rollouts of at most `depth` steps to come; `len` says of how many."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.pool = ThreadPoolExecutor(depth, thread_name_prefix="rollouts-ahead")
        self.queue: deque[Batch] = deque()

    def __len__(self) -> int:
        return len(self.queue)

    def start(self, step: int, position: int, draw: Callable[[], list[Sample]]) -> None:
        """Begins to draw those of `step`, which comes after all that are in the queue."""
        self.queue.append(Batch(step, position, self.pool.submit(draw)))

    def wait(self, count: int | None = None) -> None:
        """Returns when the first `count` steps' rollouts are there, or all. Raises what the drawing of one raised."""
        for batch in list(self.queue)[:count]:
            batch.drawn.result()

    def settle(self) -> None:
        """Returns when nothing is being drawn any more, whatever came of it."""
        futures.wait([batch.drawn for batch in self.queue])

    def whole(self) -> int:
        """Of how many steps from the first on the rollouts are there."""
        done = (i for i, batch in enumerate(self.queue) if not batch.whole)
        return next(done, len(self.queue))

    def first(self) -> list[Sample]:
        """Those of the step that comes first; they stay until they are taken off."""
        return self.queue[0].drawn.result()

    def cut(self, count: int) -> list[Batch]:
        """Keeps the first `count` steps' rollouts alone; returns the others."""
        gone = list(self.queue)[count:]
        while len(self.queue) > count:
            self.queue.pop().drawn.cancel()
        return gone

    def load(self, states: Iterable[dict[str, Any]]) -> None:
        """Takes up what `Batch.state_dict` gave."""
        self.cut(0)
        for state in states:
            drawn: Future[list[Sample]] = Future()
            drawn.set_result([sample_of(s) for s in state["samples"]])
            self.queue.append(Batch(state["step"], state["position"], drawn))


def kept(sample: Sample) -> dict[str, Any]:
    """The sample as JSON values."""
    return asdict(sample) | sample.lists()


def sample_of(state: dict[str, Any]) -> Sample:
    """The sample that was kept as JSON values."""
    own = {"turns": [Turn(**t) for t in state["turns"]], "images": tuple(state["images"])}
    return Sample(**(state | own | {"versions": [tuple(run) for run in state.get("versions", ())]}))

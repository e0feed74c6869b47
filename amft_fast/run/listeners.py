"""Who is told how a run goes, while it goes: callbacks of one's own and trackers (run/trackers.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Each method is called on rank 0, after what it tells of has been written. A record is a line of the file of that name."""

    def on_start(
        self, folder: Path, step: int
    ) -> None: ...  # the first step to come: 0, or where a resumed run goes on
    def on_step(self, record: dict[str, Any]) -> None: ...  # metrics.jsonl
    def on_eval(self, record: dict[str, Any]) -> None: ...  # evals.jsonl
    def on_sample(self, record: dict[str, Any]) -> None: ...  # samples.jsonl
    def on_checkpoint(self, path: Path) -> None: ...
    def on_end(self, folder: Path, finished: bool) -> None: ...  # the report is written where the run is finished


class Listeners:
    """Several as one; each may have only some of the methods."""

    def __init__(self, each: Sequence[Any]) -> None:
        self.each = list(each)

    def tell(self, what: str, *given: Any) -> None:
        """Calls the method `what` of all that have it, in their order."""
        for listener in self.each:
            method = getattr(listener, what, None)
            if method is not None:
                method(*given)


class Told:
    """A file of records whose lines are told on."""

    def __init__(self, file: Any, tell: Callable[[dict[str, Any]], None]) -> None:
        self.file, self.tell = file, tell

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(record)
        self.tell(record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

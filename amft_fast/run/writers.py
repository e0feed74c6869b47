"""What a run writes while it goes: metrics.jsonl and the like; and its progress."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.run.listeners import Listeners, Told
from amft_fast.run.progress import Phase, Progress, phase


def plain(value: Any) -> Any:
    """A JSON value: numbers that are not finite become null, which strict readers can read."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def replace_text(path: Path, text: str) -> None:
    """Gives a file another text, on disk when this returns; a kill or a full disk leaves the old one whole.

    Raises UserError when it cannot be written.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, held: bytes) -> None:
    """`replace_text` of a file that is no text."""
    aside = path.with_name(f".{path.name}.part")
    try:
        try:
            with aside.open("wb") as f:
                f.write(held)
                f.flush()
                os.fsync(f.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}; what it held before is still there") from None


class JsonLines:
    """An append-only file of JSON objects with a `step`; on resume, lines from the resumed step on are dropped.

    Lines that are no such object are left out and named through `say`, with the whole file kept beside, but for one cut off at
    the end by a crash. Each line is with the system when `write` returns, and on disk after `sync`. Raises UserError when the
    file cannot be written, or when it or its folder was taken away.
    """

    def __init__(self, path: Path, resume_step: int, say: Callable[[str], None] = print) -> None:
        self.path = path
        try:
            held = path.read_bytes() if path.exists() else b""
            kept, damaged = _kept(held, resume_step)
            if damaged:
                beside = path.with_name(path.name + ".damaged")
                beside.write_bytes(held)
                which = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more are" if damaged[1:] else " is")
                say(f"{path}: {which} damaged and left out; the file as it was is kept as {beside.name}")
            replace_text(path, kept.decode())
            self.file = path.open("ab", buffering=0)
        except OSError as e:
            raise UserError(f"{path} cannot be read and written: {e.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(plain(record)) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line) :]
            there = os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            there = False
        except OSError as e:
            raise UserError(
                f"{self.path} cannot be written: {e.strerror}; what was saved before is as it was: make room there, then go on "
                "from the last checkpoint with --resume"
            ) from None
        if not there:
            raise UserError(
                f"{self.path} was moved or deleted while the run wrote to it, so the run has stopped; put its folder back and "
                "go on from the last checkpoint with --resume, or start again"
            )

    def sync(self) -> None:
        """Forces to disk what was written."""
        try:
            os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(f"{self.path} cannot be written: {e.strerror}") from None

    def close(self) -> None:
        self.file.close()


def _kept(held: bytes, resume_step: int) -> tuple[bytes, list[int]]:
    """The lines of steps before `resume_step`, and the numbers of those that are no records (one cut off at the end apart)."""
    kept, damaged = [], []
    lines = held.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            step = record["step"]
            if not isinstance(record, dict) or type(step) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # what follows the last line break is nothing, or what a crash has left of a line
                damaged.append(number)
            continue
        if step < resume_step and number < len(lines):
            kept.append(line + b"\n")
    return b"".join(kept), damaged


class RunFiles:
    """The files of a run that grow while it goes, from `open` to `close`."""

    metrics: Any
    evals: Any
    samples: Any
    eval_samples: Any
    progress: Any

    def __init__(self, folder: Path, cfg: Config, total: int) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.cfg, self.total, self.listeners = cfg, total, Listeners(())
        self.closing = ExitStack()

    def listen(self, listeners: Sequence[Any]) -> None:
        """From now on these are told what is written, in their order."""
        self.listeners = Listeners(listeners)

    def open(self, step: int, evaluated: int = -1) -> None:
        """Takes the files up at a step, of a run that was last evaluated at the step `evaluated` (-1: never): what was written
        of later steps and later evaluations is dropped. Raises UserError where that cannot be.

        An evaluation at step t has rows of step t - 1, like the step before it. Whether they stay is a question of its own: a
        checkpoint of step t may be older than the evaluation at t, which is then made again.
        """
        make, log = self._closed_at_the_end, self.cfg.log
        self.progress = make(Progress(self.total, step, log.every, log.progress, self.cfg.train.warmup_steps))
        self.metrics = make(self._told("metrics", step, "on_step"))
        self.evals = make(self._told("evals", evaluated, "on_eval"))
        self.samples = make(self._told("samples", step, "on_sample"))
        self.eval_samples = make(JsonLines(self.folder / "eval_samples.jsonl", evaluated, self.say))

    def _closed_at_the_end(self, part: Any) -> Any:
        self.closing.callback(part.close)
        return part

    def _told(self, name: str, step: int, event: str) -> Told:
        file = JsonLines(self.folder / f"{name}.jsonl", step, self.say)
        return Told(file, lambda record: self.listeners.tell(event, plain(record)))

    def tell(self, event: str, *given: Any) -> None:
        """Passes an event on to callbacks and trackers."""
        self.listeners.tell(event, *given)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def sync(self) -> None:
        """Forces to disk what was written of the steps so far."""
        for part in (self.metrics, self.evals, self.samples, self.eval_samples):
            part.sync()

    def close(self) -> None:
        self.closing.close()


class NoFiles(RunFiles):
    """What ranks other than 0 have instead: nothing is written and nothing said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.metrics = self.evals = self.samples = self.eval_samples = self.progress = self

    def open(self, step: int, evaluated: int = -1) -> None: ...
    def sync(self) -> None: ...
    def write(self, *record: Any) -> None: ...
    def tell(self, event: str, *given: Any) -> None: ...
    def step(self, *progress: Any) -> None: ...
    def evaluated(self, answers: int, seconds: float) -> None: ...
    def phase(self, what: str, *counted: Any) -> AbstractContextManager[Phase]:
        return phase(what, shown=False)

    def say(self, text: str) -> None: ...
    def close(self) -> None: ...

"""Every state in which a kill can leave a run: a copy of its folder at each instant at which what lies in it changes.

A kill loses what a process holds and nothing that it has given to the system. So the folder as it lies between two calls
that change it is what a kill there leaves, and one run gives all of them. What goes on from each is held against the run that
nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from runs import lines, without_times

from amft_fast.run import checkpoint, writers
from amft_fast.run.signals import StopSignal

RECORDS = ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "eval_samples.jsonl")
CHANGES = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
}  # audit events: raised before the call
_watched: list[
    tuple[Path, Callable[[], None]]
] = []  # at most one; empty while it is being copied, which raises events too


def _hook(event: str, args: tuple) -> None:
    if not _watched or event not in CHANGES:
        return
    folder, look = _watched[0]
    # A link's place is its second argument. What is opened by its number alone is nobody's here; a name without a folder, as
    # shutil.rmtree gives, may be anywhere.
    place = args[1] if event == "os.symlink" else args[0]
    if isinstance(place, str | os.PathLike) and (Path(place).is_relative_to(folder) or not os.path.isabs(place)):
        _watched.clear()
        look()
        _watched.append((folder, look))


sys.addaudithook(_hook)  # for good: Python has no way to take one away


@contextmanager
def copied_at_each_change(folder: Path, to: Path) -> Iterator[list[Path]]:
    """While this is open: copies of `folder`, one for each different state that it is in, as they come."""
    copies: list[Path] = []
    seen: set[str] = set()

    def look() -> None:
        state = repr(contents(folder))
        if folder.exists() and state not in seen:
            seen.add(state)
            copies.append(to / f"{len(copies):03d}")
            # Not the lock: a process that closes a file of its own gives up its lock on it.
            shutil.copytree(folder, copies[-1], symlinks=True, ignore=shutil.ignore_patterns("run.lock"))

    def write(file: writers.JsonLines, record: dict) -> None:
        written(file, record)
        look()

    written = writers.JsonLines.write
    _watched.append((folder, look))
    try:
        with mock.patch.object(writers.JsonLines, "write", write):
            yield copies
    finally:
        _watched.clear()
    look()


def contents(folder: Path) -> dict[str, str]:
    """What lies in a run's folder: hashes of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and name != "run.lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = ""
    return found


@contextmanager
def stopped(at: int | None = None) -> Iterator[list[tuple[str, ...]]]:
    """While this is open a run is told to stop, as by SIGTERM, when it asks for the `at`-th time whether it is to.

    Gives on whose behalf it asked each time, as `function:line` of the package's callers, the innermost first.
    """
    asked: list[tuple[str, ...]] = []
    ask = StopSignal.__call__

    def answer(stop: StopSignal) -> bool:
        if len(asked) == at:
            stop.request(signal.SIGTERM)
        frame, names = sys._getframe(1), []
        while frame is not None:
            if "amft_fast" in frame.f_code.co_filename:
                names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        asked.append(tuple(names))
        return ask(stop)

    with mock.patch.object(StopSignal, "__call__", answer):
        yield asked


def differences(folder: Path, whole: Path) -> list[str]:
    """In what a run differs from the undisturbed one, bit for bit; the times that it took apart."""
    found = []
    for name in RECORDS:
        a, b = (without_times(lines(f, name)) for f in (folder, whole))
        if a != b:
            found.append(f"{name}: steps {[r['step'] for r in a]}, undisturbed {[r['step'] for r in b]}")
            found += [f"{name}: {_apart(x, y)}" for x, y in zip(a, b) if x != y][:3]
    found += _apart_named("summary.json", *(json.loads((f / "summary.json").read_text()) for f in (folder, whole)))
    places = [f / "checkpoints" for f in (folder, whole)]
    a, b = ({p.name: os.readlink(p) if p.is_symlink() else "" for p in place.iterdir()} for place in places)
    if a != b:
        return [*found, f"checkpoints {sorted(a.items())}, undisturbed {sorted(b.items())}"]
    for name in a:
        (tensors, state), (others, other) = (checkpoint.load(place / name) for place in places)
        if tensors.keys() != others.keys():
            found.append(f"{name}: tensors {sorted(tensors.keys() ^ others.keys())}")
        found += [f"{name}: {k}" for k in tensors.keys() & others.keys() if not torch.equal(tensors[k], others[k])]
        found += _apart_named(name, state, other)
    return found


def _apart_named(name: str, a: dict, b: dict) -> list[str]:
    apart = _apart(a, b)
    return [f"{name}: {apart}"] if apart else []


def _apart(a: dict, b: dict) -> dict:
    """What two records hold apart from each other, times and (where tensors are compared) checksums left out."""
    return {
        k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k) and k not in ("wall_s", "files")
    }

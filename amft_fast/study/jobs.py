"""The runs of a study: each a process of its own on one thread, several at a time; and how long they take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amft_fast.errors import UserError
from amft_fast.methods import METHODS

SLACK = 0.05  # by which the budgets of runs that count as equal may differ


@dataclass(frozen=True)
class Method:
    """One row of the study: a label and the flags that make it."""

    label: str
    flags: tuple[str, ...]

    def sets(self, name: str) -> bool:
        """Whether the label itself gives the setting `section.field`."""
        return f"--{name}" in self.flags


def parse_method(text: str) -> Method:
    """`method[:mu][+section.field=value...]`, for example fixed:0.2 or amft:0.9+controller.signal=cosine.

    Raises UserError for an unknown method or a mu outside (0, 1).
    """
    head, *extra = text.split("+")
    name, _, mu = head.partition(":")
    if name not in METHODS:
        raise UserError(f"--methods: unknown method {name!r}; known are {', '.join(METHODS)}")
    flags = ["--train.method", name]
    if mu:
        flags += ["--controller.mu_init", mu]
    for item in extra:
        key, eq, value = item.partition("=")
        if not eq:
            raise UserError(f"--methods: after + give section.field=value, got {item!r}")
        flags += [f"--{key}", value]
    return Method(text, tuple(flags))


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in label)


@dataclass
class Job:
    """One run: its label, seed, folder and budget in tokens (None: the config's steps), and all flags that are its own.

    `arm`: the label whose runs take as long a token.
    """

    label: str
    seed: int
    folder: Path
    tokens: int | None
    flags: tuple[str, ...]
    arm: str
    process: subprocess.Popen | None = field(default=None, compare=False)
    begun: float = field(default=0.0, compare=False)

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    def summary(self) -> dict[str, Any]:
        """Of a run that is done. Raises UserError when its file is damaged."""
        path = self.folder / "summary.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}); delete the folder, and the run is made again") from None

    def check(self, setting: str | None = None, value: str | None = None) -> None:
        """Raises UserError when the run that is done in the folder had another budget, or another value of `setting`."""
        try:
            had = tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(
                f"{self.folder / 'config.toml'} cannot be read ({e}): of which settings is that run?"
            ) from None
        tokens = had.get("train", {}).get("token_budget")
        if self.tokens and tokens and abs(tokens - self.tokens) > SLACK * self.tokens:
            raise UserError(
                f"{self.folder} holds a run of {tokens:,} tokens, and those of this study have {self.tokens:,}: take another "
                "--out, give --budget, or delete it"
            )
        if setting is None:
            return
        theirs: Any = had
        for part in setting.split("."):
            theirs = theirs.get(part) if isinstance(theirs, dict) else None
        if not same_value(theirs, value):
            raise UserError(
                f"{self.folder} holds a run with {setting} {theirs}, and the sweep chooses {value} for {self.label}: take "
                "another --out, or delete it"
            )


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a setting are the same, one perhaps as it was written on a command line."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a).lower() == str(b).lower()


class Clock:
    """How long runs take: seconds a token by arm, from those that have ended."""

    def __init__(self, jobs: Sequence[Job] = ()) -> None:
        self.spent: dict[str, tuple[float, float]] = {}  # seconds and tokens of each arm
        for job in jobs:
            if job.done:
                self.add(job, job.summary()["wall_s"])

    def add(self, job: Job, seconds: float) -> None:
        before = self.spent.get(job.arm, (0.0, 0.0))
        self.spent[job.arm] = (before[0] + seconds, before[1] + job.summary()["tokens"])

    def seconds(self, jobs: Sequence[Job]) -> float | None:
        """Of these runs one after the other, at their arms' rates, at the mean rate of all where an arm has none yet; None
        before the first run has ended."""
        if not self.spent:
            return None
        every = [sum(figures) for figures in zip(*self.spent.values())]
        rates = {arm: s / max(t, 1) for arm, (s, t) in self.spent.items()}
        return sum((job.tokens or 0) * rates.get(job.arm, every[0] / max(every[1], 1)) for job in jobs)


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def run_all(
    path: str, jobs: Sequence[Job], cores: int, flags: Sequence[str], clock: Clock, later: Sequence[Job]
) -> bool:
    """Runs those of the jobs that are not done, `cores` at a time; a stop ends the children, who save. `flags` come before a
    job's own. Whether all went well. `later`: jobs that may follow, for the time left."""
    waiting, running, failed, done = [j for j in jobs if not j.done], [], [], 0
    count, later = len(waiting), [j for j in later if not j.done]
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # SIGINT is ignored in a shell's background unless it is asked for
            before[number] = signal.signal(number, _stop)
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                running.append(_start(path, waiting.pop(0), flags))
            for job in [j for j in running if j.process.poll() is not None]:
                running.remove(job)
                done += 1
                took = time.monotonic() - job.begun
                if job.process.returncode or not job.done:
                    failed.append(job)
                    state = f"failed, see {job.folder / 'log.txt'}"
                else:
                    clock.add(job, took)
                    state = f"done in {duration(took)}"
                left = clock.seconds([*waiting, *running, *later])
                left = "" if left is None else f"; about {duration(left / cores)} left"
                print(f"[{done}/{count}] {job.label} seed {job.seed}: {state}{left}", flush=True)
            time.sleep(0.2)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return not failed


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def overridden(flags: Sequence[str], by: Sequence[str]) -> list[str]:
    """The flags of the command line, without those that `by` gives again (lists would be joined), and then these.

    Both are `--name=value` or `--name`, `value`.
    """
    names = {flag.partition("=")[0] for flag in by if flag.startswith("--")}
    kept, drop = [], False
    for flag in flags:
        if flag.startswith("--"):
            drop = flag.partition("=")[0] in names
        if not drop:
            kept.append(flag)
    return [*kept, *by]


def _start(path: str, job: Job, flags: Sequence[str]) -> Job:
    job.folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if any((job.folder / "checkpoints").glob("step-*")) else ["--run.overwrite"]
    budget = ["--train.token_budget", str(job.tokens)] if job.tokens else []
    fixed = ["--run.dir", str(job.folder), "--run.seed", str(job.seed), "--run.threads", "1", "--log.progress", "false"]
    own = overridden(flags, [*budget, *job.flags])
    command = [sys.executable, "-m", "amft_fast", "train", path, *own, *fixed, *resume]
    job.begun = time.monotonic()
    with (job.folder / "log.txt").open("a") as log:
        job.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return job

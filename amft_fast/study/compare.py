"""The study: several methods, several seeds, equal compute; one table, one picture, whichever wins.

`amft-fast compare CONFIG --methods rl,fixed:0.05,amft --seeds 5` runs every method with every seed as a process of its own,
several at a time within the core budget. All get the same token budget (tokens sampled plus tokens trained on, the
controller's own included), so a method with cheap steps takes more of them. Finished runs are kept: the same command goes on
where it stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amft_fast import config_file
from amft_fast.errors import UserError
from amft_fast.methods import METHODS
from amft_fast.run.writers import replace_text


@dataclass(frozen=True)
class Method:
    """One row of the study: a label and the flags that make it."""

    label: str
    flags: tuple[str, ...]


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


@dataclass
class Job:
    method: Method
    seed: int
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()


def compare(
    path: str, methods: list[str], seeds: int, out: Path, cores: int, budget: int | None, flags: list[str]
) -> int:
    """Runs what is missing, then writes compare.json, compare.md, compare.png and compare.html under `out`."""
    rows = [parse_method(m) for m in methods]
    for row in rows:  # every mistake before the first run
        config_file.load(path, [*flags, *row.flags])
    out.mkdir(parents=True, exist_ok=True)
    jobs = [Job(m, s, out / _slug(m.label) / f"seed-{s}") for s in range(seeds) for m in rows]
    budget = budget or _token_budget(path, out, jobs, cores, flags)
    failed = _run_all(path, [j for j in jobs if not j.done], cores, [*flags, "--train.token_budget", str(budget)])
    from amft_fast.study.pages import write_comparison

    print(write_comparison(out, path, [(j.method.label, j.seed, j.folder) for j in jobs if j.done], budget))
    return 1 if failed else 0


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in label)


def _token_budget(path: str, out: Path, jobs: list[Job], cores: int, flags: list[str]) -> int:
    """The tokens that `train.steps` steps of fixed mu 0.5 take: what the config's own length means in tokens."""
    cfg = config_file.load(path, flags)
    if cfg.train.token_budget:
        return cfg.train.token_budget
    kept = out / "budget.json"
    if not kept.exists():
        reference = Job(parse_method("fixed:0.5"), 0, out / "reference")
        quiet = ["--eval.every", "0", "--checkpoint.keep_best", "false", "--eval.max_prompts", "8"]
        print(f"measuring the token budget: {cfg.train.steps} steps of fixed:0.5", flush=True)
        if not reference.done and _run_all(path, [reference], cores, [*flags, *quiet]):
            raise UserError(f"the reference run failed; see {reference.folder / 'log.txt'}")
        tokens = json.loads((reference.folder / "summary.json").read_text())["tokens"]
        replace_text(kept, json.dumps({"tokens": tokens}))
    return json.loads(kept.read_text())["tokens"]


def _run_all(path: str, jobs: list[Job], cores: int, flags: list[str]) -> list[Job]:
    """Runs the jobs, `cores` at a time on one thread each; a stop ends the children, who save. Returns those that failed."""
    waiting, running, failed, begin = list(jobs), [], [], time.monotonic()
    done = 0
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
                if job.process.returncode or not job.done:
                    failed.append(job)
                left = (time.monotonic() - begin) / done * (len(waiting) + len(running))
                state = "done" if job not in failed else f"failed, see {job.folder / 'log.txt'}"
                print(
                    f"[{done}/{len(jobs)}] {job.method.label} seed {job.seed}: {state}; {left / 60:.0f} min left",
                    flush=True,
                )
            time.sleep(0.2)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _start(path: str, job: Job, flags: list[str]) -> Job:
    job.folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if any((job.folder / "checkpoints").glob("step-*")) else ["--run.overwrite"]
    fixed = ["--run.dir", str(job.folder), "--run.seed", str(job.seed), "--run.threads", "1", "--log.progress", "false"]
    command = [sys.executable, "-m", "amft_fast", "train", path, *flags, *job.method.flags, *fixed, *resume]
    with (job.folder / "log.txt").open("a") as log:
        job.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return job

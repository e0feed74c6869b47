"""Worker processes that compare answers, with a hard limit per item: a worker that does not answer in time is killed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path

START_SECONDS = 120
"""A worker that has not loaded its libraries by then (they take one or two seconds) is given up."""
REMEMBERED = 65536
PATIENCE = 4.0
"""A pair may take so many times its seconds on the clock, on a machine that is busy with other things."""


class _Worker:
    """One process; `job` is the index it works on, `deadline` when it must have answered."""

    def __init__(self, command: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONHASHSEED": "0",
            },  # verdicts hang on no set's order
        )
        self.ready, self.job, self.deadline = False, None, time.monotonic() + START_SECONDS

    def give(self, job: int, pair: tuple[str, str], seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + PATIENCE * seconds
        self.process.stdin.write(json.dumps([*pair, seconds]).encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what it had not read yet goes nowhere
            self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """Compares pairs (answer, gold) on `workers` processes, started at first use and kept. `command` is their module, with its
    arguments: one that calls `worker.serve`. A verdict is what it says, a truth or a number.

    `seconds` bounds the processor time of each pair, and PATIENCE times that its time on the clock: past it the pair is False,
    if need be with its worker's end. A worker that dies by itself is replaced and its pair tried once more. Verdicts are
    remembered, for a policy gives the same answer again and again.

    Any thread may compare, one at a time. A process that is forked off gets workers of its own.
    """

    def __init__(
        self, workers: int, seconds: float = 4.0, command: Sequence[str] = ("amft_fast.tasks.math.worker",)
    ) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(f"need workers >= 1 and seconds > 0, got {workers} and {seconds}")
        self.size, self.seconds, self.command = workers, seconds, command
        self.killed = 0
        """Workers killed for taking too long."""
        self._workers: list[_Worker] = []
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._lock, self._process = threading.RLock(), os.getpid()
        atexit.register(self.close)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each answer is as good as its gold."""
        if self._process != os.getpid():
            # Forked off: the workers are the parent's, and its lock may be held by a thread that is not here.
            self._workers, self._lock, self._process = [], threading.RLock(), os.getpid()
        with self._lock:
            unique = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
            verdicts = dict(zip(unique, self._run(unique))) if unique else {}
            out = [verdicts[pair] if pair in verdicts else self._known[pair] for pair in pairs]
            self._known.update(verdicts)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return out

    def _run(self, pairs: list[tuple[str, str]]) -> list[bool]:
        try:
            return self._judge(pairs)
        except BaseException:  # Ctrl-C, say: what busy workers will answer belongs to nothing that comes later
            for worker in [w for w in self._workers if w.job is not None]:
                self._workers.remove(worker)
                worker.kill()
            raise

    def _judge(self, pairs: list[tuple[str, str]]) -> list[bool]:
        waiting, tries = deque(range(len(pairs))), [0] * len(pairs)
        out, open_jobs = [False] * len(pairs), len(pairs)
        deaths = 0
        while open_jobs:
            while len(self._workers) < min(self.size, open_jobs):
                self._workers.append(_Worker(self.command))
            for worker in list(self._workers):
                if worker.ready and worker.job is None and waiting:
                    job = waiting.popleft()
                    try:
                        worker.give(job, pairs[job], self.seconds)
                    except OSError:  # it died before: no fault of this pair, whose tries are for workers that had it
                        self._workers.remove(worker)
                        worker.kill()
                        waiting.appendleft(job)
            for worker, line in self._answers():
                job, late = worker.job, line is None
                if not late and line.strip() == b"ready":
                    worker.ready = True
                    continue
                if not late and line:
                    worker.job = None
                    out[job] = json.loads(line)
                    open_jobs -= 1
                    continue
                self._workers.remove(worker)
                worker.kill()
                late = late or worker.process.returncode == -signal.SIGXCPU
                deaths += not worker.ready
                if deaths > 3:
                    raise RuntimeError(
                        f"the workers that compare answers die at their start; run `python -m {' '.join(self.command)}`"
                    )
                if job is None:
                    continue
                self.killed += late
                tries[job] += 1
                if late or tries[job] > 1:
                    open_jobs -= 1
                else:
                    waiting.appendleft(job)
        return out

    def _answers(self) -> list[tuple[_Worker, bytes | None]]:
        """The workers that said something (b"": closed their pipe), and those whose time is up (None)."""
        with selectors.DefaultSelector() as selector:
            busy = [w for w in self._workers if w.job is not None or not w.ready]
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            wait = max(0.0, min(w.deadline for w in busy) - time.monotonic()) if busy else 0.0
            said = [(key.data, key.data.process.stdout.readline()) for key, _ in selector.select(wait)]
        now, heard = time.monotonic(), {id(w) for w, _ in said}
        return said + [(w, None) for w in busy if id(w) not in heard and now >= w.deadline]

    def close(self) -> None:
        """Ends the workers; the next call starts new ones."""
        if self._process != os.getpid():
            return
        held = self._lock.acquire(timeout=1.0)  # a thread that still compares must not keep the process from ending
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if held:
            self._lock.release()

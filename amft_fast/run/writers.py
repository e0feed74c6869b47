"""What a run writes while it goes: metrics.jsonl, TensorBoard files, progress on the terminal, seconds per phase."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.profiler import record_function

# The parts of a step, in order; each is timed and has an NVTX range of its name.
PHASES = ("rollout", "advantage", "utility", "update", "sync", "eval", "checkpoint")


RANGE = "amft."  # before a phase's name in a profiler's trace


class Phases:
    """Seconds per phase of one step, by CUDA events on a GPU (no host sync until they are read) and the clock elsewhere.

    A phase inside another has an NVTX range of its own, but its seconds are the outer one's alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self.depth = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._now()
        self.depth += 1
        if self.cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            with record_function(RANGE + name):
                yield
        finally:
            if self.cuda:
                torch.cuda.nvtx.range_pop()
            self.depth -= 1
            if not self.depth:
                self.spans.append((name, begin, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read."""
        out: dict[str, float] = {}
        for name, begin, end in self.spans:
            if self.cuda:
                end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
            out[name] = out.get(name, 0.0) + seconds
        self.spans.clear()
        return out


def plain(value: Any) -> Any:
    """A JSON value: numbers that are not finite become null, which strict readers can read."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


class JsonLines:
    """An append-only file of JSON objects with a `step`; on resume, lines from the resumed step on are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < resume_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut off by a crash
        aside = path.with_suffix(".part")
        aside.write_text("".join(line + "\n" for line in kept))
        os.replace(aside, path)
        self.file: TextIO = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(plain(record)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars for TensorBoard, or nothing when switched off."""

    def __init__(self, folder: Path, enabled: bool, resume_step: int) -> None:
        self.writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=resume_step or None)

    def write(self, step: int, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Progress:
    """A bar with ETA on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, total: int, start: int, every: int, enabled: bool | None) -> None:
        self.total, self.every, self.begin, self.start = total, every, time.perf_counter(), start
        self.said = -1
        self.bar = None
        if enabled if enabled is not None else sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def step(self, done: int, figures: dict[str, float | None]) -> None:
        """`done` steps are finished; `figures` are shown beside them."""
        text = " ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif done // self.every > self.said or done == self.total:
            self.said = done // self.every
            rate = (time.perf_counter() - self.begin) / max(done - self.start, 1)
            eta = rate * (self.total - done)
            self.say(f"step {done}/{self.total}  {text}  eta {eta // 60:.0f}m{eta % 60:02.0f}s")

    def say(self, text: str) -> None:
        """A line of its own, without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

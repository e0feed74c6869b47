"""Seconds per phase of a step, and the phases' names in profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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
        self.inside: Callable[[str], AbstractContextManager] = lambda name: nullcontext()  # entered in each phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._now()
        self.depth += 1
        if self.cuda:
            torch.cuda.nvtx.range_push(name)
        try:
            with record_function(RANGE + name), self.inside(name):
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

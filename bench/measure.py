"""How a call is timed, how its memory is counted, and how it is kept within its time.

Time: on a GPU between CUDA events, after the L2 cache was overwritten and a sleep that lets the host run ahead, as it does in a
training step, whose layers keep the device busy before the head; on a CPU by the wall clock.

Memory: on a GPU `torch.cuda.max_memory_allocated`. On a CPU the profiler's record of every allocation and release of
torch's allocator, summed up in order of time: exact, and blind to what other processes or earlier calls did to the resident
set. What a BLAS library allocates for itself (a few MiB of packed panels) is not in it.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

TIMING = {"cuda": "CUDA events, L2 flushed before each call", "cpu": "wall clock"}
MEMORY = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "allocations recorded by torch.profiler, summed in order"}

_flush: list[torch.Tensor] = []


class TimeUp(BaseException):
    """Not an Exception: compilers catch those and go on."""


class Deadline:
    """When to stop; `None` seconds: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` inside when the seconds are over, where the system has timers (not on Windows)."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if not hasattr(signal, "setitimer"):
        yield
        return

    def over(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def time_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.int8, device=device))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[0].zero_()
    torch.cuda._sleep(8_000_000)  # cycles, four milliseconds: a call of some hundred small operations is queued by then
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def with_peak(run: Callable[[], T], device: str) -> tuple[T, int]:
    """What a call returns, and the most memory that it held beyond what was there before it, the result included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return result, peak

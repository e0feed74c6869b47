"""`--profile.steps N`: where the time and the memory of N steps went.

Writes `profile/trace.json` (for ui.perfetto.dev; with the phases' names), on a GPU also `profile/memory.pickle` (for
pytorch.org/memory_viz), and prints the top of both: seconds by phase, by kind of operation and by operation, the share of
matrix products, MFU (their operations over all the time), and the peak by category.

Rollouts are timed, and their operations left out: each decoded token has as many as a forward pass of a whole micro-batch, and
they alone filled a trace that no viewer opens. `--profile.rollouts` records them too.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from amft_fast.doctor.memory import PEAK_FLOPS
from amft_fast.engine.phases import RANGE, Phases

# Kinds by what an operation's name holds, first match wins.
KINDS = (
    ("attention", ("scaled_dot_product", "flash", "fmha", "varlen")),
    (
        "matrix products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "gemm", "cutlass", "nvjet", "matmul"),
    ),
    ("optimizer", ("adamw", "sgd")),
    (
        "copies and gathers",
        ("copy", "memcpy", "memset", "cat", "index", "gather", "scatter", "fill_", "clone", "embedding"),
    ),
    ("softmax and loss head", ("softmax", "logprob", "policy", "slab", "logsumexp")),
)
TOP = 10
LEFT_OUT = ("rollout", "eval")  # phases that sample
# Toggled all together: torch warns when one kind is left on.
KINDS_OF_ACTIVITY = (ProfilerActivity.CPU, ProfilerActivity.CUDA, ProfilerActivity.XPU)


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(p in low for p in parts)), "element-wise and other")


class StepProfiler:
    """Profiles `steps` whole steps after `skip` others: `begin` before each step, `done` after it.

    Operations in the phases of LEFT_OUT are recorded only with `rollouts`.
    """

    def __init__(
        self, folder: Path, steps: int, skip: int, device: torch.device, phases: Phases, rollouts: bool = False
    ) -> None:
        self.folder, self.steps, self.left, self.skip = folder, steps, steps, skip
        self.cuda = device.type == "cuda"
        self.profiler: profile | None = None
        self.tokens, self.seconds = 0, 0.0
        self.rollouts, self.sampled_s, self.paused = rollouts, 0.0, False
        if not rollouts:
            phases.inside = self._inside

    @contextmanager
    def _inside(self, phase: str) -> Iterator[None]:
        """Pauses the profiler in phases that sample."""
        if self.profiler is None or self.paused or phase not in LEFT_OUT:
            yield
            return
        profiler, self.paused, begin = self.profiler, True, time.perf_counter()
        profiler.toggle_collection_dynamic(False, KINDS_OF_ACTIVITY)
        try:
            yield
        finally:
            profiler.toggle_collection_dynamic(True, KINDS_OF_ACTIVITY)
            self.paused = False
            self.sampled_s += time.perf_counter() - begin if phase == "rollout" else 0.0

    def begin(self) -> None:
        if self.left and self.skip <= 0 and self.profiler is None:
            self._start()
        self.skip -= 1

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.cuda else [])
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
            torch.cuda.reset_peak_memory_stats()
        self.profiler = profile(activities=activities, profile_memory=not self.cuda, with_flops=True)
        self.profiler.start()

    def done(
        self, record: dict[str, Any], static: dict[str, int], advance: Callable[[float], object] = lambda percent: None
    ) -> str | None:
        """After a profiled step: counts it, and after the last one writes the files and returns the report.

        `advance` is told of every part of that work that is done, in percent of it all.
        """
        if self.profiler is None:
            return None
        self.left -= 1
        self.seconds += record["seconds"]
        self.tokens += record["tokens"]
        if self.left:
            return None
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        advance(10)  # shares as measured on 6,000 operations; each part grows with their number
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        if not (self.rollouts or self.cuda):  # a GPU's memory is not recorded in the trace
            _drop_memory_events(self.folder / "trace.json")
        advance(20)
        peak = live_peak(profiler)
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        report = self.report(profiler, peak, static)
        advance(70)
        return report

    def report(self, profiler: profile, peak: int, static: dict[str, int]) -> str:
        events = [e for e in profiler.key_averages() if not e.key.startswith(RANGE)]
        phases = {
            e.key.removeprefix(RANGE): e.cpu_time_total for e in profiler.key_averages() if e.key.startswith(RANGE)
        }
        own = (lambda e: e.self_device_time_total) if self.cuda else (lambda e: e.self_cpu_time_total)
        total = sum(map(own, events)) or 1.0
        kinds: dict[str, float] = {}
        for e in events:
            kinds[kind_of(e.key)] = kinds.get(kind_of(e.key), 0.0) + own(e)
        lines = [f"profile of {self.steps} steps: {self.seconds:.2f} s, {self.tokens / self.seconds:,.0f} tokens/s"]
        lines += [] if self.rollouts else ["  what rollouts are made of is left out; --profile.rollouts records it"]
        lines += _rows("phase", {n: t / 1e6 for n, t in phases.items()}, self.seconds)
        lines += _rows("kind of operation", {n: t / 1e6 for n, t in kinds.items()}, total / 1e6)
        top = sorted(events, key=own, reverse=True)[:TOP]
        lines += _rows("operation", {e.key[:60]: own(e) / 1e6 for e in top}, total / 1e6)
        done, best = sum(e.flops for e in events), peak_flops(torch.device("cuda" if self.cuda else "cpu"))
        if best:
            rate = done / max(self.seconds - self.sampled_s, 1e-9)
            over = "the whole step" if self.rollouts else "the step but for its rollouts"
            lines.append(f"  MFU {rate / best:.1%}: {rate / 1e9:,.1f} of {best / 1e9:,.0f} GFLOP/s over {over}")
        return "\n".join([*lines, *_memory(peak, static), f"  written to {self.folder}"])


def _drop_memory_events(path: Path) -> None:
    """Takes out of a trace the records of the allocator within phases that were left out: pausing does not stop those."""
    trace = json.loads(path.read_text())
    names = {RANGE + phase for phase in LEFT_OUT}
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("name") in names and "dur" in e)

    def inside(event: dict[str, Any]) -> bool:
        at = bisect_right(spans, (event["ts"], float("inf"))) - 1
        return at >= 0 and event["ts"] <= spans[at][1]

    trace["traceEvents"] = [e for e in trace["traceEvents"] if e.get("name") != "[memory]" or not inside(e)]
    path.write_text(json.dumps(trace))


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Of a GPU in dense bf16 as its vendor states it (0: unknown); of a CPU the best of a few large products of `dtype`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for key, flops in PEAK_FLOPS.items() if key in name), 0.0)
    a, b, best = torch.randn(768, 768).to(dtype), torch.randn(768, 768).to(dtype), float("inf")
    for _ in range(10):
        begin = time.process_time()  # what others do on the machine is not this processor's limit
        a @ b
        best = min(best, (time.process_time() - begin) / torch.get_num_threads())
    return 2 * 768**3 / best


def live_peak(profiler: profile) -> int:
    """Most bytes alive at once that were made while profiling: the allocator's records, summed in order of time."""
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


def static_bytes(engine: Any, utility: Any) -> dict[str, int]:
    """Bytes that are there the whole time, by category."""
    moments = [t for s in engine.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    held = {
        "weights": list(engine.policy.parameters()),
        "masters": [g.master for g in engine.groups],
        "gradients": [g.grad for g in engine.groups],
        "optimizer moments": moments,
        "utility gradient": [t for half in utility.halves for t in half] if utility is not None else [],
    }
    seen: set[int] = set()
    out = {}
    for name, tensors in held.items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        out[name] = sum(size for at, size in storages.items() if at not in seen)
        seen |= set(storages)
    return {name: size for name, size in out.items() if size}


def _rows(title: str, seconds: dict[str, float], total: float) -> list[str]:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [f"  {title}", *(f"    {n:<60}{s:>9.3f} s {s / total:>5.0%}" for n, s in ordered)]


def _memory(peak: int, static: dict[str, int]) -> list[str]:
    """A GPU's peak holds the static part; a CPU's record begins with profiling: activations and workspace alone."""
    lines = [f"    {n:<60}{b / 2**20:>9.1f} MiB" for n, b in static.items()]
    made = max(peak - sum(static.values()), 0) if torch.cuda.is_available() else peak
    return ["  memory at its peak", *lines, f"    {'activations and workspace':<60}{made / 2**20:>9.1f} MiB"]

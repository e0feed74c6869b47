"""amft-fast doctor --plan: the plan as text, and the smallest change that makes a config fit.

Every change that is offered has been computed: it fits, by the same formulas that refused the config.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from amft_fast.config import Config
from amft_fast.doctor import installed, shapes
from amft_fast.doctor.memory import HOLES, PEAK_FLOPS, Layout, Machine, Memory, flops, saves_beside, total
from amft_fast.doctor.memory import memory as memory_of
from amft_fast.doctor.shapes import Shape
from amft_fast.errors import UserError
from amft_fast.model import ulysses

GB = 1e9
MAX_GPUS = 1024


@dataclass(frozen=True)
class Change:
    """A setting to change: words for the user, and its effect."""

    words: str
    settings: dict[str, Any]  # dotted name to value
    gpus: int | None = None

    def apply(self, cfg: Config, machine: Machine) -> tuple[Config, Machine]:
        for name, value in self.settings.items():
            cfg = _with(cfg, name.split("."), value)
        return cfg, replace(machine, gpus=self.gpus or machine.gpus)


def _with(section: Any, path: list[str], value: Any) -> Any:
    """A copy of a section with one setting changed."""
    if len(path) > 1:
        value = _with(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: value})


def set_to(name: str, value: Any) -> Change:
    return Change(f"{name} = {str(value).lower()}", {name: value})


def knobs(cfg: Config, shape: Shape, machine: Machine, more_gpus: bool = True) -> Iterator[list[Change]]:
    """Settings that lower memory, the least costly first; the values of each from mild to strong."""
    if not cfg.model.gradient_checkpointing:
        yield [set_to("model.gradient_checkpointing", True)]
    if cfg.rollout.engine == "transformers":
        yield [set_to("rollout.max_batch", value) for value in _halves(cfg.rollout.max_batch, 1)]
    elif cfg.rollout.vllm.mode == "colocate":
        now = cfg.rollout.vllm.gpu_memory_utilization
        yield [set_to("rollout.vllm.gpu_memory_utilization", x) for x in (0.6, 0.5, 0.4, 0.3, 0.2) if x < now]
    at = Layout.of(cfg, machine)
    yield [
        set_to("train.micro_batch_tokens", x) for x in _halves(cfg.train.micro_batch_tokens, at.longest // at.shared)
    ]
    if machine.device == "cpu":
        return
    yield list(_shares(cfg, shape, machine, at))
    yield list(_stages(cfg, machine))
    if cfg.engine.kind == "deepspeed" and not cfg.engine.offload:
        yield [set_to("engine.offload", True)]
    if not more_gpus:
        return
    yield list(_larger(machine))
    if cfg.rollout.engine == "transformers" or cfg.rollout.vllm.mode == "colocate":
        settings = {"rollout.engine": "vllm", "rollout.vllm.mode": "server"}
        yield [Change('rollout.engine = "vllm" and rollout.vllm.mode = "server"', settings)]


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value


def _shares(cfg: Config, shape: Shape, machine: Machine, at: Layout) -> Iterator[Change]:
    """More processes for each row, where a micro-batch is one sequence."""
    size = at.shared
    while cfg.engine.kind == "deepspeed" and at.tokens * at.shared < 2 * at.longest and 2 * size <= machine.gpus:
        size *= 2
        if not (machine.gpus % size or ulysses.undealt(shape.text.heads, shape.text.kv_heads, size)):
            tokens = min(cfg.train.micro_batch_tokens, -(-at.longest // size))
            settings = {"engine.sequence_parallel": size, "train.micro_batch_tokens": tokens}
            yield Change(" and ".join(f"{name} = {value}" for name, value in settings.items()), settings)


def _stages(cfg: Config, machine: Machine) -> Iterator[Change]:
    """Higher ZeRO stages on the same GPUs."""
    engine = cfg.engine
    if engine.kind == "deepspeed":
        for stage in range(engine.zero_stage + 1, 4):
            yield set_to("engine.zero_stage", stage)
    elif machine.gpus > 1:
        yield _zero3(machine.gpus)


def _larger(machine: Machine) -> Iterator[Change]:
    """ZeRO-3 on more GPUs."""
    gpus = machine.gpus
    while 2 * gpus <= MAX_GPUS:
        gpus *= 2
        yield _zero3(gpus)


def _zero3(gpus: int) -> Change:
    settings = {"engine.kind": "deepspeed", "engine.zero_stage": 3}
    return Change(f'engine.kind = "deepspeed" and engine.zero_stage = 3 on {gpus} GPUs', settings, gpus)


def advise(cfg: Config, shape: Shape, machine: Machine, more_gpus: bool = True) -> tuple[list[Change], Memory] | None:
    """The fewest changes that make the config fit, with the memory after them; None when none of those known does.

    `more_gpus`: whether a change may ask for GPUs beyond the machine's.
    """
    every = list(knobs(cfg, shape, machine, more_gpus))
    for count in range(1, len(every) + 1):
        for chosen in itertools.combinations(every, count):
            for changes in itertools.product(*chosen):
                changed, on = cfg, machine
                for change in changes:
                    changed, on = change.apply(changed, on)
                after = memory_of(changed, shape, on)
                if after.needed <= on.memory:
                    return list(changes), after
    return None


def refusal(cfg: Config, shape: Shape, machine: Machine, memory: Memory) -> str:
    """One sentence: what is missing, the largest part, and the change that makes it fit."""
    largest = memory.largest
    text = (
        f"--plan: the config does not fit: {size(memory.needed)} per {_unit(machine)} are needed and {size(machine.memory)} "
        f"are there; the largest part is {largest.name} ({size(largest.bytes)})"
    )
    advice = advise(cfg, shape, machine)
    if advice is None:
        return f"{text}; no setting makes it fit: take a smaller model, shorter answers (rollout.max_new_tokens) or larger GPUs"
    changes, after = advice
    host = f" and {size(after.host)} of host memory per node of 8 GPUs" if after.host else ""
    return f"{text}; set {', '.join(c.words for c in changes)}, which needs {size(after.needed)}{host}"


# ------------------------------------------------------------------------------------------------------------------ text


def report(cfg: Config, shape: Shape, machine: Machine, memory: Memory) -> str:
    """The plan as tables."""
    peak = memory.peak_phase
    lines = [_title(cfg, shape, machine), "", f"memory per {_unit(machine)}, at its highest ({peak})"]
    lines += [_row(p.name, size(p.bytes), p.why) for p in memory.static]
    lines += [_row(p.name, size(p.bytes), p.why) for p in memory.phases[peak]]
    lines.append(_row("margin", size(memory.margin), f"{size(memory.context)} and {HOLES:.0%} of the rest"))
    lines.append(_row("total", size(memory.needed), f"of {size(machine.memory)}"))
    static = total(memory.static)
    rows = ", ".join(f"{name} {size(static + total(parts))}" for name, parts in memory.phases.items())
    lines.append(f"  without margin, by phase: {rows}")
    if memory.host:
        lines.append(f"  and on the host, {_on_host(cfg)}: {size(memory.host)} per node of 8 GPUs")
    return "\n".join([*lines, "", *_compute(cfg, shape, machine)])


def _on_host(cfg: Config) -> str:
    parts = [
        ("states", cfg.engine.offload),
        ("activations", cfg.model.offload_activations),
        ("what a block may be taken back to", cfg.in_blocks),
        ("copies for a checkpoint", saves_beside(cfg)),
    ]
    return " and ".join(name for name, there in parts if there)


def _title(cfg: Config, shape: Shape, machine: Machine) -> str:
    engine = f"ZeRO-{cfg.engine.zero_stage}" if cfg.engine.kind == "deepspeed" else "engine.kind local"
    where = f"{machine.gpus} x {size(machine.memory)}" if machine.device == "cuda" else "one CPU process"
    active = f" ({_count(shape.active)} active)" if shape.text.experts else ""
    return f"{shape.name} ({shape.source}): {_count(shape.parameters)} parameters{active}, {engine}, {where}"


def size(n: float) -> str:
    """Bytes in decimal units."""
    return f"{n / GB:.1f} GB" if n >= GB / 10 else f"{n / 1e6:.1f} MB"


def _unit(machine: Machine) -> str:
    return "GPU" if machine.device == "cuda" else "process"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _row(name: str, value: str, why: str) -> str:
    return f"  {name:<28}{value:>12}   {why}".rstrip()


def _compute(cfg: Config, shape: Shape, machine: Machine) -> Iterator[str]:
    parts = flops(cfg, shape, machine)
    whole = sum(parts.values())
    response = machine.response_tokens or cfg.rollout.max_new_tokens
    unit, scale = next(((u, x) for u, x in (("TFLOP", 1e12), ("GFLOP", 1e9)) if whole >= x), ("MFLOP", 1e6))
    where = "on all GPUs" if machine.device == "cuda" else "on the CPU"
    yield (
        f"compute per step {where}, in {unit}, for prompts of {machine.prompt_tokens + machine.image_tokens} and answers "
        f"of {response} tokens"
    )
    for name, value in parts.items():
        yield _row(name, f"{value / scale:.2f}", f"{value / whole:.0%}")
    ranks = machine.gpus if cfg.engine.kind == "deepspeed" else 1
    yield _row("total", f"{whole / scale:.2f}", f"{whole / ranks / scale:.2f} per {_unit(machine)}")
    if machine.device == "cuda":
        took = seconds(whole / ranks / (machine.peak_flops * machine.mfu))
        yield (
            f"  estimate: {took} per step, were all of it done at {machine.mfu:.0%} of {machine.peak_flops / 1e12:g} TFLOP/s; "
            "decoding is bound by memory bandwidth and takes longer"
        )


def seconds(n: float) -> str:
    """A time in the unit that it has digits in."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 1e-6:.1f} µs"


# --------------------------------------------------------------------------------------------------------------- command


def machine_of(cfg: Config, args: Any) -> tuple[Machine, list[str]]:
    """The machine that the flags ask for, else the one here, and what has to be said about it."""
    texts = {name: getattr(args, name) for name in ("prompt_tokens", "response_tokens", "image_tokens", "mfu")}
    here = gpus_here()
    asked = cfg.run.device == "cuda" or any((args.gpus, args.gpu_memory, args.peak_tflops))
    if cfg.run.device == "cpu" or not (asked or here.count):
        why = "run.device is cpu" if cfg.run.device == "cpu" else "torch sees no GPU here, and none was asked for"
        notes = [f"planned for the CPU of this machine: {why} (--gpus 8 --gpu-memory 80 plans for GPUs)"]
        return Machine(gpus=1, memory=installed.memory_gib() * 2**30, device="cpu", **texts), notes
    gpus, memory = args.gpus or max(here.count, 1), args.gpu_memory * GB if args.gpu_memory else here.memory
    notes = [f"planned for {gpus} x {here.name}, as here"] if here.count and not asked else []
    if not memory:
        memory = 80 * GB
        notes.append("no GPU here and no --gpu-memory: planned for 80 GB each")
    known = next((flops for name, flops in PEAK_FLOPS.items() if name in here.name), None)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else known or PEAK_FLOPS["H100"]
    if not args.peak_tflops and not known:
        notes.append(f"no --peak-tflops: {peak / 1e12:g} TFLOP/s are an H100's")
    if cfg.engine.kind == "local" and gpus > 1:
        notes.append(f"engine.kind local trains on one GPU, {gpus - 1} of {gpus} would be idle")
    return Machine(gpus=gpus, memory=memory, peak_flops=peak, **texts), notes


class Here(NamedTuple):
    """The GPUs that torch sees: how many, and of the first its name and bytes."""

    count: int
    name: str = ""
    memory: float = 0.0


def gpus_here() -> Here:
    import torch

    if not torch.cuda.is_available():
        return Here(0)
    properties = torch.cuda.get_device_properties(0)
    return Here(torch.cuda.device_count(), properties.name, float(properties.total_memory))


def _check_shared_rows(cfg: Config, shape: Shape, machine: Machine) -> None:
    """Raises UserError where engine.sequence_parallel asks for what these GPUs or this model cannot do."""
    size = cfg.engine.sequence_parallel
    why = ulysses.undealt(shape.text.heads, shape.text.kv_heads, size)
    if machine.gpus % size:
        why = f"{machine.gpus} of them cannot be groups of {size}"
    if why:
        raise UserError(f"engine.sequence_parallel: {size} GPUs cannot share the rows of {shape.name!r}: {why}")


def run(cfg: Config, args: Any) -> str:
    """The report of a config that fits. Raises UserError with the report before it for one that does not."""
    shape = shapes.find(cfg.model.path)
    machine, notes = machine_of(cfg, args)
    if shape.vision is not None and not machine.image_tokens:
        notes.append("no --image-tokens: the vision tower counts with its parameters alone")
    _check_shared_rows(cfg, shape, machine)
    memory = memory_of(cfg, shape, machine)
    print(report(cfg, shape, machine, memory), *(f"  ! {note}" for note in notes), sep="\n", flush=True)
    if memory.needed > machine.memory:
        raise UserError(refusal(cfg, shape, machine, memory))
    return f"\nfits, with {size(machine.memory - memory.needed)} to spare"

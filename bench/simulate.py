"""What a run would do on 8 to 1,024 GPUs: a discrete-event model of rollout servers, trainer, weight sync and checkpoints.

Answers end one by one: a server decodes its rows in steps whose time follows from weights, keys and values read and from
products, and takes the next row where one has ended. The trainer takes a step's answers once they are there. Rates come from
bench/results (an H200); links and disk are assumptions, named in the output. Nothing here has been run at these sizes.

    in step    rollouts wait for the trainer's weights, the trainer for the last answer
    shared     the same GPUs draw and train in turns
    ahead      the answers of the next step are drawn meanwhile (rollout.async_steps = 1); a sync waits for the last of them
    in flight  servers take new weights in the midst of answers (rollout.in_flight), never empty; `--staleness` steps ahead
"""

from __future__ import annotations

import argparse
import heapq
import json
import pickle
import sys
import time
import timeit
import tracemalloc
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.doctor import shapes
from amft_fast.doctor.memory import PEAK_FLOPS, Machine, flops, memory
from amft_fast.doctor.shapes import Shape
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample
from amft_fast.rollout.rollouts import pack
from bench.results import RESULTS

NODE = 8  # GPUs of a machine
# Not measured: a GPU's share of links in a machine and between machines, to host memory, and the file system, bytes/s.
INSIDE, BETWEEN, TO_HOST, DISK = 400e9, 50e9, 25e9, 5e9
WIRE = 1e9  # of the samples' exchange (gloo over TCP)
WIRE_BYTES = 17  # of a token on the way: id, mask, log-prob, text
ALL_REDUCE_S = 15e-6  # of one of the two in a layer that is cut over GPUs
# The embedded engine at 1.5 B on an H200, 512 rows of 936 tokens on average (docs/performance.md, on a GPU): 7.6 ms a step.
ROWS, CONTEXT, STEP_S = 512, 872 + 64, 7.6e-3


@dataclass(frozen=True)
class Card:
    """Rates of one GPU: `update` and `products` in FLOP/s, `copy` in bytes/s; `launch`: seconds of a decoding step on top."""

    memory: float
    update: float
    products: float
    copy: float
    launch: float

    @classmethod
    def measured(cls) -> Card:
        """The H200 of bench/results."""
        machine, step = (json.loads((RESULTS / f"{n}.json").read_text()) for n in ("machine_cuda", "step_cuda_1.5b"))
        card = cls(
            memory=machine["memory_bytes"],
            update=step["rows"][0]["mfu"] * PEAK_FLOPS["H200"],
            products=machine["gemm_tflops"] * 1e12,
            copy=machine["copy_tb_per_s"] * 1e12,
            launch=0.0,
        )
        model = Server(card, shapes.find("Qwen2.5-1.5B"), 1, ROWS)
        return replace(card, launch=max(STEP_S - model.step_time(ROWS, ROWS * CONTEXT), 0.0))


@dataclass
class Server:
    """One engine over `gpus` GPUs that decodes up to `slots` rows; its clock is in tokens that each row has got."""

    card: Card
    shape: Shape
    gpus: int
    slots: int
    tokens: float = 0.0
    at: float = 0.0  # the time of `tokens`
    context: float = 0.0  # of all rows, less what they have drawn since they began
    busy: float = 0.0
    filled: float = 0.0

    def __post_init__(self) -> None:
        self.rows: list[tuple[float, int, int]] = []  # (when it ends, in tokens; its version; its length)

    def step_time(self, rows: int, context: float) -> float:
        t, cut = self.shape.text, self.gpus
        weights, kv = 2 * self.shape.parameters, 2 * 2 * t.layers * t.k
        product = 2 * self.shape.parameters * rows / self.card.products
        time_ = (max(weights / self.card.copy, product) + context * kv / self.card.copy) / cut
        return time_ + self.card.launch + (2 * t.layers * ALL_REDUCE_S if cut > 1 else 0.0)

    @property
    def pace(self) -> float:
        return self.step_time(len(self.rows), self.context + len(self.rows) * self.tokens)

    def go_on(self, now: float) -> None:
        if self.rows and now > self.at:
            self.busy += now - self.at
            self.filled += (now - self.at) * len(self.rows) / self.slots
            self.tokens += (now - self.at) / self.pace
        self.at = max(self.at, now)

    def join(self, prompt: int, length: int, version: int, prefill: float) -> None:
        heapq.heappush(self.rows, (self.tokens + length, version, length))
        self.context += prompt - self.tokens
        self.at += prefill  # the others wait
        self.busy += prefill

    def next_end(self) -> float:
        return self.at + max(self.rows[0][0] - self.tokens, 0.0) * self.pace

    def end_one(self, prompt: int) -> tuple[int, int]:
        """(version, length) of the row that ends."""
        end, version, length = heapq.heappop(self.rows)
        self.context -= prompt - (end - length)
        return version, length


@dataclass(frozen=True)
class Costs:
    """Seconds of a step's parts beside rollouts, and bytes of host memory of a rank for its samples."""

    update: float
    communication: float
    exchange: float
    sync: float
    copy: float  # of a checkpoint to host memory
    write: float
    host: float

    @property
    def train(self) -> float:
        """Collectives go on under the passes."""
        return max(self.update, self.communication) + self.exchange


@dataclass(frozen=True)
class Outcome:
    gpus: int
    servers: int  # GPUs that draw
    trainers: int
    mode: str
    step_s: float
    tokens_per_s: float  # of a GPU
    idle_servers: float
    filled: float  # share of the rows that servers could decode, while they decode any
    idle_trainers: float
    age: float  # steps between the weights that an answer began with and those that it trains
    costs: Costs


def measured_exchange(tokens: int = 200_000) -> tuple[float, float]:
    """(seconds, bytes of host memory) of a token of samples that come from other ranks, on this CPU."""
    rng = np.random.default_rng(0)
    ids, logprobs = rng.integers(1000, 150_000, tokens).tolist(), rng.normal(size=tokens).tolist()
    packed = pickle.dumps(pack([Sample([1], ids, [1] * tokens, logprobs, 0, "stop", "x", 0)]))
    seconds = min(timeit.repeat(lambda: pickle.loads(packed), timer=time.process_time, number=3, repeat=3)) / 3
    tracemalloc.start()
    kept = pickle.loads(packed)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return seconds / tokens, size / tokens


def lengths_of(cfg: Config, run: Path | None, rng: np.random.Generator, count: int) -> np.ndarray:
    """Tokens of `count` answers: drawn from those that a run has recorded, scaled to this config's bound, or log-normal as
    bench step has them."""
    bound = cfg.rollout.max_new_tokens
    if run is None:
        return np.clip(rng.lognormal(np.log(bound / 3), 0.7, count), 1, bound).astype(int)
    try:
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        theirs = config_file.load(run / "config.toml").rollout.max_new_tokens
        found = np.array([row["tokens"] for row in rows], dtype=float)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--lengths: {str(run)!r} is no run with samples.jsonl that tells tokens: {e}") from None
    return np.maximum(1, rng.choice(found, count) * bound / theirs).astype(int)


def costs_of(
    cfg: Config, shape: Shape, card: Card, trainers: int, servers: int, rate: tuple[float, float], mean: int
) -> Costs:
    """What each step costs `trainers` GPUs."""
    machine = Machine(trainers, card.memory, response_tokens=mean, peak_flops=card.update)
    work = sum(value for name, value in flops(cfg, shape, machine).items() if name != "rollouts")
    rollouts = cfg.train.prompts_per_step * cfg.rollout.num_generations
    tokens = rollouts * (machine.prompt_tokens + mean)
    micro = max(1, round(tokens / trainers / cfg.train.micro_batch_tokens))
    p, link = shape.parameters, INSIDE if trainers <= NODE else BETWEEN
    gathers = (3 if cfg.model.gradient_checkpointing else 2) * micro if cfg.engine.zero_stage == 3 else 1
    moved = (2 * p * gathers + 4 * p * micro) * (trainers - 1) / trainers
    seconds, size = rate
    state = 20 * p
    return Costs(
        update=work / trainers / card.update,
        communication=moved / link,
        exchange=tokens * (seconds + WIRE_BYTES / WIRE) if trainers > 1 else 0.0,
        sync=2 * p / (BETWEEN if servers else link),
        copy=state / trainers / TO_HOST,
        write=state / DISK,
        host=tokens * size,
    )


MODES = {"shared": (0, False), "in step": (0, False), "ahead": (1, False)}


def simulate(
    cfg: Config,
    shape: Shape,
    card: Card,
    gpus: int,
    drawing: int,
    mode: str,
    args: argparse.Namespace,
    rate: tuple[float, float],
) -> Outcome | None:
    """`steps` steps on `gpus` GPUs of which `drawing` draw (all of them where they are shared); None where it does not fit."""
    ahead, in_flight = MODES.get(mode, (args.staleness, True))
    shared = mode == "shared"
    trainers = gpus if shared else gpus - drawing
    rng = np.random.default_rng(0)
    each = next((n for n in (1, 2, 4, 8) if 2 * shape.parameters < 0.6 * n * card.memory), 8)
    engines = (gpus if shared else drawing) // each
    engine = {
        "engine": "vllm",
        "vllm": cfg.rollout.vllm.model_copy(update={"mode": "colocate" if shared else "server"}),
    }
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=engine)})
    if not engines or memory(cfg, shape, Machine(trainers, card.memory)).needed > card.memory:
        return None
    batch, prompt = cfg.train.prompts_per_step * cfg.rollout.num_generations, 512
    sample = min(engines, args.servers)  # as many are simulated, each with its share of the answers
    rows = max(1, round(batch * sample / engines))
    lengths = lengths_of(cfg, args.lengths, rng, rows * (args.steps + ahead + 1))
    costs = costs_of(cfg, shape, card, trainers, 0 if shared else drawing, rate, int(lengths.mean()))
    prefill = 2 * shape.parameters * prompt / cfg.rollout.num_generations / card.products / each
    room = (0.9 - 2 * shape.parameters / each / card.memory) * card.memory * each
    slots = int(
        min(cfg.rollout.vllm.max_num_seqs, room / (4 * shape.text.layers * shape.text.k * (prompt + lengths.mean())))
    )
    servers = [Server(card, shape, each, max(1, slots)) for _ in range(sample)]
    waiting = deque(lengths.tolist())
    started = version = 0
    ages: list[int] = []
    ready: deque[int] = deque()  # versions of the answers that are there
    now = trained = written = training = 0.0
    busy_until = float("inf")  # of the trainer; inf: it waits for answers
    draining = False
    begun = (0.0, 0.0, 0.0, 0.0)
    while version < args.steps:
        for s in servers:  # new rows, where they may begin
            while len(s.rows) < s.slots and started < (version + 1 + ahead) * rows and waiting and not draining:
                fewest = min(servers, key=lambda x: len(x.rows) / x.slots)
                fewest.go_on(now)
                fewest.join(prompt, waiting.popleft(), version, prefill)
                started += 1
        if busy_until == float("inf") and len(ready) >= rows and not draining:
            ages += [version - ready.popleft() for _ in range(rows)]
            pause = 0.0
            if cfg.checkpoint.every and version and version % cfg.checkpoint.every == 0:
                pause = costs.copy + max(written - now, 0.0)
                written = now + pause + costs.write
            busy_until = now + costs.train + pause
            training += costs.train + pause
        active = [s for s in servers if s.rows]
        first = min(active, key=Server.next_end) if active else None
        if first is not None and first.next_end() <= busy_until:
            now = max(now, first.next_end())
            first.go_on(now)
            began, _ = first.end_one(prompt)
            ready.append(began)
        elif busy_until < float("inf"):
            now = max(now, busy_until)
            draining = not in_flight and bool(active)
            busy_until = float("inf")
            trained += 1
        if trained > version and (in_flight or not any(s.rows for s in servers)):
            draining = False
            version += 1
            if version == 1:  # what comes before, the first answers of all, is left out
                begun = (now, training, sum(s.busy for s in servers), sum(s.filled for s in servers))
            for s in servers:
                s.go_on(now)
                s.at += costs.sync
            now += 0.0 if in_flight else costs.sync
    steps, now = args.steps - 1, now - begun[0]
    training -= begun[1]
    busy = sum(s.busy for s in servers) - begun[2]
    filled = sum(s.filled for s in servers) - begun[3]
    tokens = steps * batch * (prompt + float(lengths.mean()))
    idle = 1 - busy / len(servers) / now - (training / now if shared else 0.0)
    return Outcome(
        gpus,
        engines * each,
        trainers,
        mode,
        now / steps,
        tokens / now / gpus,
        max(idle, 0.0),
        filled / busy,
        max(idle if shared else 1 - training / now, 0.0),
        float(np.mean(ages)),
        costs,
    )


def best(
    cfg: Config, shape: Shape, card: Card, gpus: int, mode: str, args: Any, rate: tuple[float, float]
) -> Outcome | None:
    """The split of the GPUs with which a step is shortest."""
    shares = [gpus] if mode == "shared" else sorted({max(1, round(gpus * x / 16)) for x in (1, 2, 3, 4, 6, 8, 10, 12)})
    found = [o for n in shares if (o := simulate(cfg, shape, card, gpus, n, mode, args, rate)) is not None]
    return min(found, key=lambda o: o.step_s, default=None)


def scaled(cfg: Config, gpus: int, weak: bool) -> Config:
    """The config for more GPUs: a step's prompts and demonstrations grow with them, from 8 on."""
    factor = gpus // NODE if weak else 1
    train = cfg.train.model_copy(
        update={n: getattr(cfg.train, n) * factor for n in ("prompts_per_step", "demos_per_step")}
    )
    return cfg.model_copy(update={"train": train})


HEAD = (
    "| model | GPUs | mode | draw + train | s a step | tokens/s a GPU | servers idle | rows filled | trainer idle | age | "
    "exchange s | host GB a rank | collectives s | sync s | checkpoint s |"
)


def row(model: str, o: Outcome) -> str:
    c = o.costs
    split = f"{o.gpus}" if o.mode == "shared" else f"{o.servers} + {o.trainers}"
    return (
        f"| {model} | {o.gpus} | {o.mode} | {split} | {o.step_s:.1f} | {o.tokens_per_s:,.0f} | {o.idle_servers:.0%} | "
        f"{o.filled:.0%} | {o.idle_trainers:.0%} | {o.age:.1f} | {c.exchange:.2f} | {c.host / 1e9:.2f} | "
        f"{c.communication:.1f} | {c.sync:.2f} | {c.copy:.2f} |"
    )


def plot(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(outcomes)), layout="constrained")
    axes = figure.subplots(len(outcomes), 2, squeeze=False)
    for (left, right), (model, found) in zip(axes, outcomes.items()):
        for mode in dict.fromkeys(o.mode for o in found):
            of = [o for o in found if o.mode == mode]
            left.plot([o.gpus for o in of], [o.tokens_per_s for o in of], marker="o", label=mode)
        of = [o for o in found if o.mode == found[-1].mode]
        for name in ("update", "communication", "exchange", "sync", "copy"):
            right.plot([o.gpus for o in of], [getattr(o.costs, name) for o in of], marker="o", label=name)
        left.set(xscale="log", xlabel="GPUs", ylabel="tokens/s a GPU", title=model, ylim=(0, None))
        right.set(
            xscale="log",
            yscale="log",
            xlabel="GPUs",
            ylabel="s a step",
            title=f"{model}, {found[-1].mode}: parts of a step",
        )
        for axis in (left, right):
            axis.legend(fontsize="small")
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file; settings can be given as flags")
    parser.add_argument("--models", help="comma-separated names or folders (default: the config's)")
    parser.add_argument("--gpus", default="8,32,128,1024", help="(default %(default)s)")
    parser.add_argument(
        "--strong", action="store_true", help="the same step on more GPUs (default: a step grows with them)"
    )
    parser.add_argument(
        "--lengths", type=Path, metavar="RUN", help="run whose answers' lengths are drawn from (default: log-normal)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="simulated; the first is not counted (default %(default)s)"
    )
    parser.add_argument(
        "--servers", type=int, default=8, help="simulated at most, each with its share (default %(default)s)"
    )
    parser.add_argument(
        "--staleness", type=int, default=2, help="steps that in flight may be ahead (default %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="a PNG")
    rest, settings = config_file.split_flags(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(rest)
    try:
        if args.steps < 2 or args.servers < 1:
            raise UserError(f"--steps must be at least 2 and --servers 1, got {args.steps} and {args.servers}")
        cfg = config_file.load(args.config, [*settings, *unknown])
        card, rate = Card.measured(), measured_exchange()
        print(
            f"H200 of bench/results: {card.update / 1e12:.0f} TFLOP/s in updates, {card.products / 1e12:.0f} in products, "
            f"{card.copy / 1e12:.2f} TB/s, {card.launch * 1e3:.1f} ms a decoding step beside these. Measured here: "
            f"{rate[0] * 1e9:.0f} ns and {rate[1]:.0f} bytes of host memory a token that comes from another rank. Assumed: "
            f"{INSIDE / 1e9:.0f} and {BETWEEN / 1e9:.0f} GB/s in and between machines, {WIRE / 1e9:.0f} GB/s for samples.\n"
        )
        print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
        outcomes: dict[str, list[Outcome]] = {}
        for model in (args.models or cfg.model.path).split(","):
            shape = shapes.find(model)
            for gpus in map(int, args.gpus.split(",")):
                for mode in (*MODES, "in flight"):
                    found = best(scaled(cfg, gpus, not args.strong), shape, card, gpus, mode, args, rate)
                    if found is not None:
                        outcomes.setdefault(model.rpartition("/")[2], []).append(found)
                        print(row(model.rpartition("/")[2], found), flush=True)
        if args.plot:
            plot(outcomes, args.plot)
    except UserError as e:
        print(f"bench simulate: {e}", file=sys.stderr)
        return 2
    return 0

"""`python -m bench loss-head`: the fused loss head against everything else that computes the same loss and gradients.

Candidates take turns, so that a busy moment hits all of them, and each is judged by its median. What is timed is the
forward and the backward for dH [N, H] and dW [V, H]. Before that, the loss and parts of both gradients of the very shape
are compared with fp64; a candidate that is further off than eager in the same dtype plus a tolerance is not timed (ten
tolerances for other libraries, whose figures are shown as they are). Candidates that cannot run are listed with the reason.

The floor is three bare GEMMs: over the chunks of rows that linear_policy_loss makes (low-precision operands; logits and the
accumulated dW in fp32, dH low; on a CPU all in the run's dtype) and once whole, all in the run's dtype. 6·N·H·V FLOP count,
whatever a candidate does.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from amft_kernels.backends import triton_obstacle
from amft_kernels.chunks import default_chunk_bytes, plan_rows
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import linear_policy_loss

from bench import loss_head_report as report
from bench.measure import MEMORY, TIMING, Deadline, TimeUp, time_limit, time_once, with_peak
from bench.peers import PEERS, LeftOut, Run, eager_ce, eager_policy, first_line, from_logprobs
from bench.results import RESULTS, environment, write_json
from bench.workload import TOLERANCE, Case, Shape, Truth, loss_and_grads, make_case

MEASURED = ("kernels", "bench/*.py")
CPU_SHAPE = (2048, 512, 32768)
CPU_SWEEP = (
    *((n, 512, 32768) for n in (256, 512, 1024)),
    *((512, 512, v) for v in (8192, 16384, 65536)),
)
GPU_SHAPES = (
    (8192, 4096, 131072),
    (4096, 4096, 128256),
    (16384, 4096, 151936),
    (8192, 3584, 152064),
    (8192, 2048, 151936),
    (32768, 896, 151936),
)
GPU_SWEEP = (
    *((n, 4096, 131072) for n in (2048, 4096, 16384, 32768)),
    *((8192, 4096, v) for v in (32768, 65536, 262144)),
)
TRAINING = "linear_policy_loss, weight_grad"
PEER_SLACK = 10
EAGER_ROWS = 128  # of the small case that shows how far off eager is


@dataclass
class Candidate:
    """One way to the loss, and what was found about it."""

    kind: str  # of workload.KINDS, or "gemms"
    role: str  # ours, peer or floor
    name: str
    make: Callable[[Case], Run]
    backend: str = ""
    chunk_bytes: int | None = None
    core: bool = False  # takes part in the sweeps
    once: bool = False  # takes part at the first shape alone
    step: Callable[[], object] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None
    left_out: str = ""

    @property
    def green(self) -> bool:
        return all(self.errors[name] <= limit for name, limit in self.limits.items())  # NaN is not

    @property
    def ready(self) -> bool:
        return not self.left_out and self.green


@dataclass
class Plan:
    """What a run measures. `shapes`: each with whether it is one of a sweep, which only the core candidates take part in."""

    device: str
    dtype: torch.dtype
    shapes: list[tuple[Shape, bool]]
    chunk_bytes: list[int]
    rounds: int
    limit_s: float  # for a candidate's first call, compilation included
    deadline: Deadline
    log: Callable[[str], None]
    core_only: bool = False


# --------------------------------------------------------------------------------------------------------- candidates


def ours_policy(kind: str, backend: str, chunk_bytes: int) -> Callable[[Case], Run]:
    def make(case: Case) -> Run:
        options = {"chunk_bytes": chunk_bytes, "backend": backend, **policy_terms(kind, case)}
        return lambda: linear_policy_loss(case.hidden, case.weight, case.targets, **options).loss

    return make


def policy_terms(kind: str, case: Case) -> dict[str, torch.Tensor]:
    if kind == "ce":
        return {"nll_weight": case.token_weight}
    terms = {"pg_weight": case.token_weight, "entropy_weight": case.entropy_weight}
    return terms | {"advantages": case.advantages, "old_logprobs": case.old_logprobs}


def ours_training(kind: str, backend: str, chunk_bytes: int) -> Callable[[Case], Run]:
    """As training calls it: dW is added into a main-gradient buffer, with no copy and no cast at the end."""

    def make(case: Case) -> Run:
        buffer = torch.zeros_like(case.weight, dtype=torch.float32)
        options = {"chunk_bytes": chunk_bytes, "backend": backend, "weight_grad": buffer, **policy_terms(kind, case)}

        def run() -> torch.Tensor:
            return linear_policy_loss(case.hidden, case.weight, case.targets, **options).loss

        run.weight_grad = buffer
        return run

    return make


def ours_logprob(kind: str, backend: str, chunk_bytes: int) -> Callable[[Case], Run]:
    def make(case: Case) -> Run:
        options = {"chunk_bytes": chunk_bytes, "backend": backend, "with_entropy": kind == "policy"}
        return from_logprobs(case, kind, lambda: linear_logprob(case.hidden, case.weight, case.targets, **options))

    return make


def gemms(chunk_bytes: int | None, backend: str = "torch") -> Callable[[Case], Callable[[], None]]:
    """The floor; `chunk_bytes` None: whole, every product in the run's dtype."""

    def make(case: Case) -> Callable[[], None]:
        h_NH, w_VH = case.hidden.detach(), case.weight.detach()
        rows = group = n = case.shape[0]
        v = case.shape[2]
        if chunk_bytes is not None:
            plan = plan_rows(case.targets >= 0, v, torch.float32, chunk_bytes, backend, case.dtype)
            rows, group = plan.chunk_rows, plan.group_rows
        wide = case.dtype if chunk_bytes is None or case.device == "cpu" else torch.float32
        # Random numbers: a GPU multiplies zeros faster, for they take less power.
        grad_gV = torch.randn(group, v, device=case.device).mul_(1e-3).to(case.dtype)
        logits_rV = torch.empty(rows, v, dtype=wide, device=case.device)
        dh_NH, dw_VH = torch.empty_like(h_NH), torch.empty_like(w_VH, dtype=wide)

        def run() -> None:
            for start in range(0, n, group):
                h_gH, dh_gH = h_NH[start : start + group], dh_NH[start : start + group]
                for h_rH in h_gH.split(rows):
                    product(h_rH, w_VH.t(), logits_rV[: len(h_rH)])
                g_gV = grad_gV[: len(h_gH)]
                product(g_gV, w_VH, dh_gH)
                product(g_gV.t(), h_gH, dw_VH, accumulate=start > 0)

        return run

    return make


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    wider = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, left, right, out=out, **wider)
    else:
        torch.mm(left, right, out=out, **wider)


def our_candidates(backends: Sequence[str], sizes: Sequence[int]) -> Iterator[Candidate]:
    """Both ops for both losses. Only what users run, the first backend's linear_policy_loss, with every workspace."""
    for kind, backend, size in itertools.product(("policy", "ce"), backends, sizes):
        default, usual = size == sizes[0], backend == backends[0]
        flags = {"core": default and usual, "once": not usual}
        if default or usual:
            make = ours_policy(kind, backend, size)
            yield Candidate(kind, "ours", "linear_policy_loss", make, backend, size, **flags)
        if usual:
            make = ours_training(kind, backend, size)
            yield Candidate(kind, "ours", TRAINING, make, backend, size, **flags)
        if default:
            make = ours_logprob(kind, backend, size)
            yield Candidate(kind, "ours", "linear_logprob", make, backend, size, **flags)


def candidates(plan: Plan, sweep: bool, first: bool) -> list[Candidate]:
    """Who takes part at a shape."""
    backends = ("torch",) if triton_obstacle(plan.device, plan.dtype) else ("triton", "torch")
    found = [
        Candidate("gemms", "floor", "three GEMMs, chunks", gemms(size, backends[0]), chunk_bytes=size, core=True)
        for size in plan.chunk_bytes
    ]
    found.append(Candidate("gemms", "floor", "three GEMMs, whole", gemms(None), core=True))
    found += our_candidates(backends, plan.chunk_bytes)
    found += [Candidate(p.kind, "peer", p.name, p.make, core=p.core, once=p.once) for p in PEERS]
    return [c for c in found if (c.core or not (sweep or plan.core_only)) and (first or not c.once)]


# --------------------------------------------------------------------------------------------------------- measurement


def measure_shape(shape: Shape, sweep: bool, first: bool, plan: Plan) -> dict[str, object]:
    """One shape's entry of the results; half of the rounds will do for a sweep."""
    case = make_case(shape, plan.dtype, plan.device)
    eager = eager_errors(case)
    chosen = candidates(plan, sweep, first)
    truth = Truth(case)
    for candidate in chosen:
        prepare(candidate, case, truth, eager, plan)
    ready = [c for c in chosen if c.ready]
    for turn in range((plan.rounds + 1) // 2 if sweep else plan.rounds):
        if turn and plan.deadline.left() < 0:
            break
        start = turn % max(1, len(ready))
        for candidate in ready[start:] + ready[:start]:
            candidate.times_ms.append(time_once(candidate.step, plan.device))
    entry = report.shape_entry(case, chosen, sweep)
    del case, truth, chosen, ready
    release(plan.device)
    return entry


def eager_errors(case: Case) -> dict[str, dict[str, float]]:
    """How far off eager is in the run's dtype, from the first tokens alone: it may not have the memory for all."""
    small = case.head(EAGER_ROWS)
    truth, found = Truth(small), {}
    for kind, make in (("policy", eager_policy), ("ce", eager_ce)):
        found[kind] = truth.errors(kind, *loss_and_grads(make(small), small))
    return found | {"pg": found["policy"]}


def prepare(candidate: Candidate, case: Case, truth: Truth, eager: dict, plan: Plan) -> None:
    """The first call, with its check and its memory; fills `candidate` in, `left_out` if it cannot run."""
    plan.log(f"  {candidate.kind}: {candidate.name} {candidate.backend}".rstrip())
    limit_s = min(plan.limit_s, plan.deadline.left())
    try:
        if limit_s < 1:
            raise LeftOut(f"the time budget of {plan.deadline.seconds:.0f} s was spent")
        with time_limit(limit_s), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = candidate.make(case)
            if candidate.role == "floor":
                candidate.step = run
                run()  # its memory was made beforehand and would say nothing
            else:
                candidate.step = lambda: loss_and_grads(run, case, getattr(run, "weight_grad", None))
                if plan.device == "cuda" or candidate.once:
                    candidate.step()  # compiles, and takes workspaces that stay
                check(candidate, run, case, truth, eager)
    except LeftOut as reason:
        candidate.left_out = str(reason)
    except TimeUp:
        candidate.left_out = f"its first call, compilation included, was not done after {limit_s:.0f} s"
    except torch.OutOfMemoryError:
        candidate.left_out = f"out of memory at N, H, V = {', '.join(map(str, case.shape))}"
    except Exception as error:  # another library's, whatever it may be; our own makes the run fail
        candidate.left_out = f"failed: {type(error).__name__}: {first_line(error)}"
    if candidate.left_out:
        candidate.step = None
        release(plan.device)


def check(candidate: Candidate, run: Run, case: Case, truth: Truth, eager: dict) -> None:
    if (buffer := getattr(run, "weight_grad", None)) is not None:
        buffer.zero_()  # what it holds of the calls before
    found, peak = with_peak(candidate.step, case.device)
    slack = TOLERANCE[case.dtype] * (1 if candidate.role == "ours" else PEER_SLACK)
    candidate.errors = truth.errors(candidate.kind, *found)
    candidate.limits = {name: error + slack for name, error in eager[candidate.kind].items()}
    candidate.peak_extra_bytes = peak if candidate.green else None


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(plan: Plan, note: Callable[[dict], None] = lambda result: None) -> dict[str, object]:
    """Every shape of the plan; those that the deadline or Ctrl-C leaves no time for are named. `note` is told after each shape
    what there is."""
    shapes, skipped, why = [], [], ""
    facts = {
        "benchmark": "loss-head",
        **environment(plan.device, MEASURED),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "chunk_bytes": plan.chunk_bytes,
        "rounds": plan.rounds,
        "timing": TIMING[plan.device],
        "memory": MEMORY[plan.device],
    }

    def result() -> dict[str, object]:
        found = {**facts, "shapes": shapes, "skipped": skipped}
        return found | {"bars": report.bars(found)}

    for shape, sweep in plan.shapes:
        words = "N, H, V = {:,}, {:,}, {:,}".format(*shape)
        if plan.deadline.left() < 0:
            why = f"the time budget of {plan.deadline.seconds:.0f} s was spent"
        if not why:
            plan.log(words)
            try:
                shapes.append(measure_shape(shape, sweep, not shapes, plan))
                note(result())
                continue
            except KeyboardInterrupt:
                why = "interrupted"
        skipped.append(f"{words}: {why}")
    return result()


def write(result: dict, folder: Path, picture: bool = True) -> list[Path]:
    """JSON and Markdown, and PNG where matplotlib is there."""
    stem = folder / f"loss_head_{result['device_type']}"
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    write_json(paths[0], result)
    paths[1].write_text(report.markdown(result), encoding="utf-8")
    return paths if picture and report.plot(result, paths[2]) else paths[:2]


def exit_code(result: dict) -> int:
    """1 when a check of our own was red, or our own could not run."""
    red = [row for entry in result["shapes"] for row in entry["rows"] if row["role"] == "ours" and not row["green"]]
    failed = [
        row
        for entry in result["shapes"]
        for row in entry["left_out"]
        if row["role"] == "ours" and "budget" not in row["why"]
    ]
    return 1 if red or failed else 0


# ---------------------------------------------------------------------------------------------------------------- CLI


def parse_shape(text: str) -> Shape:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(x.strip().isdigit() and int(x) > 0 for x in numbers):
        raise argparse.ArgumentTypeError(f"a shape is N,H,V in positive numbers, got {text!r}")
    return tuple(map(int, numbers))


def parse_bytes(text: str) -> int:
    number, unit = text.rstrip("KMGiB"), text[len(text.rstrip("KMGiB")) :]
    scale = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}.get(unit)
    if scale is None or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"a size is a number of bytes, KiB, MiB or GiB such as 64MiB, got {text!r}")
    return int(number) * scale


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench loss-head", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="N,H,V", help="default: the issue's, with sweeps"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--chunk-bytes", nargs="+", type=parse_bytes, metavar="SIZE", help="such as 64MiB 1GiB")
    parser.add_argument("--rounds", type=int, help="timings of each candidate (default 5 on a CPU, else 20)")
    parser.add_argument("--threads", type=int, help="on the CPU (default: torch's)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a candidate's first call (default 60)")
    parser.add_argument("--core", action="store_true", help="only ours and eager: no other library, no compiling")
    parser.add_argument("--budget", type=float, help="seconds for everything; what is left over is skipped and named")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default bench/results)")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    arguments.chunk_bytes = arguments.chunk_bytes or [default_chunk_bytes(torch.device(arguments.device))]
    arguments.rounds = (5 if on_cpu else 20) if arguments.rounds is None else arguments.rounds
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    full, sweep = ((CPU_SHAPE,), CPU_SWEEP) if on_cpu else (GPU_SHAPES, ())
    if arguments.shapes:
        full, sweep = arguments.shapes, ()
    arguments.shapes = [(shape, False) for shape in full] + [(shape, True) for shape in sweep]
    widest = max(shape[2] for shape, _ in arguments.shapes)
    if min(arguments.chunk_bytes) < 8 * widest:
        parser.error(f"--chunk-bytes must hold a row of logits, {8 * widest} bytes, got {min(arguments.chunk_bytes)}")
    arguments.dtype = getattr(torch, arguments.dtype or ("float32" if on_cpu else "bfloat16"))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every check of our own was green."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = Plan(
        arguments.device,
        arguments.dtype,
        arguments.shapes,
        arguments.chunk_bytes,
        arguments.rounds,
        arguments.limit,
        Deadline(arguments.budget),
        log=lambda text: print(text, file=sys.stderr, flush=True),
        core_only=arguments.core,
    )
    result = run(plan, lambda found: write(found, arguments.out, picture=False))
    paths = write(result, arguments.out)
    print(report.markdown(result))
    print("written: " + ", ".join(str(path) for path in paths))
    return exit_code(result)


if __name__ == "__main__":
    raise SystemExit(main())

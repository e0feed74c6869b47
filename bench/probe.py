"""`python -m bench probe`: multi_tensor_dot against what torch offers for the same numbers.

The workload is a probed step's: three lists of ragged fp32 tensors, u, G1 and the total G, and the six products of two of
them, from which every dot and norm of the first-order probe follows. Then the same with two u, and with AdamW's diagonals.
Each candidate's numbers are compared with fp64 sums first; one that fails is not timed. On a CPU each runs with one thread and
with torch's number of them, since torch's own operations may be faster with one when the cores are busy. Candidates take
turns, so that a busy moment hits all of them, and each is judged by its best time at its better number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from amft_fast.multi_tensor import PROBE_SUMS, AdamState, backends, multi_tensor_dot, multi_tensor_dot_reference
from bench.results import commit, device_name

MEASURED = ("csrc", "amft_fast/multi_tensor.py", "bench/probe.py", "setup.py")
RESULTS = Path(__file__).parent / "results"
PRODUCTS = (("u", "u"), ("u", "g1"), ("u", "total"), ("g1", "g1"), ("g1", "total"), ("total", "total"))
THREE = (("u", "g1"), ("u", "total"), ("g1", "total"))
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 100, "clip": 0.5}
EXACT, LOOSE = 1e-12, 1e-2  # fp64 sums; and fp32 ones, which may be as bad as this and still be what a user would get
ONE_U, WIDE = "one u: dots and norms", "two u; AdamW's diagonals"
SAME_NUMBERS = ("torch.dot, six loops", "torch._foreach", "one flat copy, matmul")  # the ways that the bar is about
THREE_DOTS = "torch.dot, three loops"  # only half of the numbers


@dataclass
class Candidate:
    """One way to get the numbers `names` from `lists` lists. `times_ms` is by number of threads."""

    group: str
    name: str
    run: Callable[[], Sequence[Tensor]]
    names: Sequence[object]
    lists: int
    tolerance: float = LOOSE
    rounds: int = 1000
    error: float = math.nan
    times_ms: dict[int, list[float]] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        return self.error <= self.tolerance

    @property
    def best_threads(self) -> int:
        return min(self.times_ms, key=lambda threads: min(self.times_ms[threads]))

    @property
    def best_ms(self) -> float | None:
        return min(self.times_ms[self.best_threads]) if self.times_ms else None

    def row(self, elements: int) -> dict[str, object]:
        timed = bool(self.times_ms)
        return {
            "group": self.group,
            "name": self.name,
            "numbers": len(self.names),
            "error": self.error,
            "tolerance": self.tolerance,
            "green": self.green,
            "best_ms": self.best_ms,
            "threads": self.best_threads if timed else None,
            "median_ms": statistics.median(self.times_ms[self.best_threads]) if timed else None,
            "gb_per_s": 4 * self.lists * elements / self.best_ms / 1e6 if timed else None,
            "times_ms": self.times_ms,
        }


def ragged_sizes(elements: int, tensors: int, generator: torch.Generator) -> list[int]:
    """Sizes as uneven as a model's: from biases to embeddings, log-uniform over three decades."""
    weights = 10 ** (3 * torch.rand(tensors, generator=generator, dtype=torch.float64))
    sizes = (weights / weights.sum() * elements).long()
    sizes[-1] += elements - int(sizes.sum())
    return sizes.tolist()


def make_lists(elements: int, tensors: int, device: str) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ragged_sizes(elements, tensors, generator)
    on_device = torch.Generator(device).manual_seed(1)

    def normal(scale: float) -> list[Tensor]:
        return [torch.randn(n, generator=on_device, device=device) * scale for n in sizes]

    lists = {"u": normal(1.0), "u2": normal(1.0), "g1": normal(0.8), "total": normal(0.2), "m": normal(0.1)}
    # As in training: G holds G1, and u leans towards the gradients. So no number is a mere remainder of cancellation.
    for u, u2, g1, total in zip(lists["u"], lists["u2"], lists["g1"], lists["total"]):
        total += g1
        u += 0.1 * g1
        u2 += 0.1 * total
    lists["s"] = [x.square_() for x in normal(0.3)]
    return lists


def true_products(lists: dict[str, list[Tensor]]) -> dict[object, float]:
    """fp64: products of two fp32 numbers are exact, and sums go tensor by tensor."""
    return {
        (a, b): math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(lists[a], lists[b]))
        for a, b in PRODUCTS
    }


def ours(lists: dict[str, list[Tensor]]) -> list[Tensor]:
    sums = multi_tensor_dot([lists["u"]], lists["g1"], lists["total"])
    s = dict(zip(PROBE_SUMS, sums.unbind()))
    # (u, G) and (G1, G) are sums of two; everything else is there as it is.
    u_total, g1_total = s["u1", "g1"] + s["u1", "dg"], s["g1", "g1"] + s["g1", "dg"]
    return [s["u1", "u1"], s["u1", "g1"], u_total, s["g1", "g1"], g1_total, s["total", "total"]]


def dot_loops(lists: dict[str, list[Tensor]], pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
    return [torch.stack([torch.dot(x, y) for x, y in zip(lists[a], lists[b])]).sum() for a, b in pairs]


def foreach(lists: dict[str, list[Tensor]], pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
    out = []
    for a, b in pairs:
        if a == b:
            out.append(torch.stack(torch._foreach_norm(lists[a])).square().sum())
        else:
            out.append(torch.stack([x.sum() for x in torch._foreach_mul(lists[a], lists[b])]).sum())
    return out


def gram(flat_LN: Tensor) -> list[Tensor]:
    gram_LL = flat_LN @ flat_LN.T
    return [gram_LL[i, j] for i in range(3) for j in range(i, 3)]


def copy_and_gram(lists: dict[str, list[Tensor]], flat_LN: Tensor) -> list[Tensor]:
    for i, name in enumerate(("u", "g1", "total")):
        torch.cat(lists[name], out=flat_LN[i])
    return gram(flat_LN)


def foreach_adam(lists: dict[str, list[Tensor]]) -> list[Tensor]:
    """⟨u, P∘G1⟩ and ⟨u, P∘dG⟩ with the exact diagonal, in fp32 with torch's multi-tensor operations."""
    beta1, beta2, eps, step, clip = ADAM.values()
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    g = torch._foreach_mul(lists["total"], clip)
    m = torch._foreach_lerp(lists["m"], g, 1 - beta1)
    s = torch._foreach_mul(lists["s"], beta2)
    torch._foreach_addcmul_(s, g, g, 1 - beta2)
    root = torch._foreach_sqrt(torch._foreach_div(s, bias2))
    denom = torch._foreach_add(root, eps)
    second = torch._foreach_mul(torch._foreach_mul(m, g), (1 - beta2) / (bias1 * bias2))
    second = torch._foreach_div(torch._foreach_div(torch._foreach_div(second, root), denom), denom)
    p = torch._foreach_mul(torch._foreach_reciprocal(denom), (1 - beta1) / bias1)
    pu = torch._foreach_mul(torch._foreach_sub(p, second), lists["u"])
    products = (torch._foreach_mul(pu, x) for x in (lists["g1"], torch._foreach_sub(lists["total"], lists["g1"])))
    return [torch.stack([x.sum() for x in product]).sum() for product in products]


def candidates(lists: dict[str, list[Tensor]]) -> list[Candidate]:
    u, u2, g1, total = (lists[name] for name in ("u", "u2", "g1", "total"))
    adam = AdamState(lists["m"], lists["s"], **ADAM)
    flat_LN = torch.stack([torch.cat(x) for x in (u, g1, total)])
    two = [i for i, pair in enumerate(PROBE_SUMS) if "plain" not in pair[1] and "exact" not in pair[1]]
    exact = [PROBE_SUMS.index(("u1", "exact_g1")), PROBE_SUMS.index(("u1", "exact_dg"))]
    every = range(len(PROBE_SUMS))
    return [
        Candidate(ONE_U, "multi_tensor_dot", lambda: ours(lists), PRODUCTS, 3, EXACT),
        Candidate(ONE_U, THREE_DOTS, lambda: dot_loops(lists, THREE), THREE, 3),
        Candidate(ONE_U, SAME_NUMBERS[0], lambda: dot_loops(lists, PRODUCTS), PRODUCTS, 3),
        Candidate(ONE_U, SAME_NUMBERS[1], lambda: foreach(lists, PRODUCTS), PRODUCTS, 3),
        Candidate(ONE_U, SAME_NUMBERS[2], lambda: copy_and_gram(lists, flat_LN), PRODUCTS, 3),
        Candidate(ONE_U, "matmul, already flat", lambda: gram(flat_LN), PRODUCTS, 3),
        Candidate(ONE_U, "torch in fp64 blocks", lambda: fallback_products(lists), PRODUCTS, 3, EXACT, rounds=2),
        Candidate(WIDE, "two u", lambda: multi_tensor_dot([u, u2], g1, total)[two].unbind(), two, 4, EXACT),
        Candidate(
            WIDE, "one u, AdamW", lambda: multi_tensor_dot([u], g1, total, adam)[exact].unbind(), exact, 5, EXACT
        ),
        Candidate(WIDE, "two u, AdamW", lambda: multi_tensor_dot([u, u2], g1, total, adam).unbind(), every, 6, EXACT),
        Candidate(WIDE, "torch._foreach: two dots, AdamW", lambda: foreach_adam(lists), exact, 5, rounds=3),
    ]


def fallback_products(lists: dict[str, list[Tensor]]) -> list[Tensor]:
    s = dict(zip(PROBE_SUMS, multi_tensor_dot_reference([lists["u"]], lists["g1"], lists["total"]).unbind()))
    u_total, g1_total = s["u1", "g1"] + s["u1", "dg"], s["g1", "g1"] + s["g1", "dg"]
    return [s["u1", "u1"], s["u1", "g1"], u_total, s["g1", "g1"], g1_total, s["total", "total"]]


def check(candidate: Candidate, truth: dict[object, float]) -> None:
    got = [float(x) for x in candidate.run()]
    errors = [abs(x - truth[name]) / abs(truth[name]) for name, x in zip(candidate.names, got)]
    candidate.error = math.nan if any(math.isnan(x) for x in errors) else max(errors)


def time_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds: wall clock on a CPU, between events on a GPU, where a sleep first lets the host run ahead."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(
    all_candidates: list[Candidate], device: str, thread_counts: list[int], rounds: int, log: Callable[[str], None]
) -> None:
    for turn in range(rounds):
        for threads in thread_counts:
            torch.set_num_threads(threads)
            for candidate in all_candidates:
                if candidate.green and turn < candidate.rounds:
                    candidate.times_ms.setdefault(threads, []).append(time_once(candidate.run, device))
        log(f"round {turn + 1} of {rounds}")


def copy_candidate(elements: int, device: str) -> Candidate:
    """A plain copy of as many bytes as three lists have. Bytes read and bytes written both count: six lists."""
    source = torch.ones(3 * elements, device=device)
    target = torch.empty_like(source)
    return Candidate("", "copy", lambda: target.copy_(source), (), 6, error=0.0)


def report(all_candidates: list[Candidate], elements: int) -> dict:
    rows = [c.row(elements) for c in all_candidates]
    timed = {row["name"]: row for row in rows if row["best_ms"] is not None}
    rivals = [timed[name] for name in SAME_NUMBERS if name in timed]
    bar = {}
    if "multi_tensor_dot" in timed and rivals:
        own, rival = timed["multi_tensor_dot"], min(rivals, key=lambda row: row["best_ms"])
        bar = {
            "best_library_way": rival["name"],
            "times_faster": rival["best_ms"] / own["best_ms"],
            "times_faster_than_three_dots": timed[THREE_DOTS]["best_ms"] / own["best_ms"]
            if THREE_DOTS in timed
            else None,
            "share_of_copy_bandwidth": own["gb_per_s"] / timed["copy"]["gb_per_s"],
        }
    return {"rows": rows, "bar": bar}


def table(result: dict) -> str:
    lines = []
    for group in (ONE_U, WIDE):
        lines.append(
            f"{group:<34}{'numbers':>8}{'best ms':>10}{'median':>10}{'threads':>9}{'GB/s':>8}{'rel. error':>12}  check"
        )
        for row in (row for row in result["rows"] if row["group"] == group):
            cells = "-".rjust(10)
            if row["best_ms"] is not None:
                times = f"{row['best_ms']:>10.1f}{row['median_ms']:>10.1f}"
                cells = f"{times}{row['threads']:>9}{row['gb_per_s']:>8.1f}"
            check_word = "green" if row["green"] else f"RED, over {row['tolerance']:g}: not timed"
            lines.append(f"  {row['name']:<32}{row['numbers']:>8}{cells:<37}{row['error']:>12.1e}  {check_word}")
    if result["bar"]:
        bar = result["bar"]
        lines.append(
            f"multi_tensor_dot is {bar['times_faster']:.1f} times as fast as the best way to the same numbers, "
            f"{bar['best_library_way']!r}, at {100 * bar['share_of_copy_bandwidth']:.0f} % of a plain copy's bandwidth"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every check that asks for fp64 sums was green."""
    parser = argparse.ArgumentParser(prog="python -m bench probe", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--elements", type=int, default=50_000_000, help="in each list (default 50 M)")
    parser.add_argument("--tensors", type=int, default=400, help="in each list (default 400)")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each candidate (default 7)")
    parser.add_argument("--threads", type=int, help="the larger number of threads on the CPU (default: torch's)")
    parser.add_argument("--output", type=Path, help="default bench/results/probe_<device>.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.tensors < 1 or arguments.elements < arguments.tensors:
        parser.error("--elements must be at least --tensors, and both at least 1")

    def log(text: str) -> None:
        print(text, file=sys.stderr)

    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # the checks; on busy cores torch's operations wait for one another's threads
    lists = make_lists(arguments.elements, arguments.tensors, arguments.device)
    truth = true_products(lists)
    adam = AdamState(lists["m"], lists["s"], **ADAM)
    truth |= enumerate(
        multi_tensor_dot_reference([lists["u"], lists["u2"]], lists["g1"], lists["total"], adam).tolist()
    )
    all_candidates = candidates(lists)
    for candidate in all_candidates:
        check(candidate, truth)
    log("checked")
    all_candidates.append(copy_candidate(arguments.elements, arguments.device))
    thread_counts = sorted({1, threads}) if arguments.device == "cpu" else [threads]
    measure(all_candidates, arguments.device, thread_counts, arguments.rounds, log)

    result = {
        "benchmark": "probe",
        "device": device_name(arguments.device),
        "backend": backends()[arguments.device],
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "commit": commit(MEASURED),
        "elements": arguments.elements,
        "tensors": arguments.tensors,
        "rounds": arguments.rounds,
        **report(all_candidates, arguments.elements),
    }
    output = arguments.output or RESULTS / f"probe_{arguments.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['device']}, {result['backend']}, {arguments.tensors} tensors of {arguments.elements:,} elements in all"
    )
    print(table(result))
    print(f"written to {output}")
    return 0 if all(c.green for c in all_candidates if c.tolerance == EXACT) else 1


if __name__ == "__main__":
    raise SystemExit(main())

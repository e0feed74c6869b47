"""The maths reward against other scorers: wrong yes, wrong no, and what they cost.

Rows are cases with a verdict (JSONL: kind, gold, response, right), and the gold answers of data files: each in a box, which is
right, and in a box for the gold of another problem, which is wrong. Last come 1,000 bombs, for our reward alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from amft_fast.errors import UserError
from bench import ROOT
from bench.results import RESULTS, environment, markdown_table, write_json
from bench.reward_peers import Scorer, peers

# Golds of the public files whose texts differ and that mean the same.
SAME = ({"x=5", "5"}, {"$k=3$", "3"}, {"2,3,4", "2,4,3"})


@dataclass(frozen=True)
class Row:
    kind: str
    gold: str
    response: str
    right: bool


@dataclass
class Score:
    """Verdicts and cost of one scorer on some rows. `seconds`: processor time, its workers' included."""

    wrong_yes: list[Row]
    wrong_no: list[Row]
    rows: int
    right: int
    seconds: float
    clock: float

    def cells(self) -> list[str]:
        return [
            str(len(self.wrong_yes)),
            str(len(self.wrong_no)),
            f"{100 * len(self.wrong_no) / max(self.right, 1):.1f} %",
            f"{self.rows / max(self.clock, 1e-9):,.0f}",
            f"{self.seconds:.1f}",
        ]


HEAD = ("scorer", "wrong yes", "wrong no", "of the right ones", "rows/s", "processor s")


def cases(path: Path) -> list[Row]:
    """The rows of a file of cases. Raises UserError for a line that is none."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(Row(row["kind"], row["gold"], row["response"], bool(row["right"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--cases {path}:{i} is no JSON object with kind, gold, response and right") from None
    return rows


def golds(path: Path) -> list[str]:
    """The gold answers of a data file."""
    from amft_fast.tasks.math.data import Limits, Store, load
    from amft_fast.tasks.math.sources import Source

    store = Store()
    load(path.name, [Source(str(path))], lambda key: store, limits=Limits(1 << 60))
    return [problem.answer for problem in store]


def crossed(name: str, found: Sequence[str], limit: int) -> list[Row]:
    """Each gold against itself; then each against one further on and against its neighbour in order of the texts, where these
    are not the same."""
    rows = [Row(name, gold, f"Hence it is $\\boxed{{{gold}}}$.", True) for gold in found[:limit]]
    ordered = sorted(set(found))
    pairs = [(gold, found[(i + 7) % len(found)]) for i, gold in enumerate(found[:limit])]
    pairs += [(a, b) for a, b in pairwise(ordered)][:limit]
    return rows + [Row(name, b, f"Hence it is $\\boxed{{{a}}}$.", False) for a, b in pairs if not _alike(a, b)]


def _alike(a: str, b: str) -> bool:
    """Whether two golds are the same but for how a number is written, or are known to be."""

    def plain(text: str) -> float | str:
        text = text.strip("$ ").replace("^\\circ", "").replace(",", "")
        try:
            return float(text)
        except ValueError:
            return text

    return plain(a) == plain(b) or {a, b} in SAME


def processor_time() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(rows: Sequence[Row], judge: Callable[[Sequence[Row]], list[bool]]) -> Score:
    used, clock = processor_time(), time.perf_counter()
    verdicts = judge(rows)
    used, clock = processor_time() - used, time.perf_counter() - clock
    wrong_yes = [row for row, yes in zip(rows, verdicts, strict=True) if yes and not row.right]
    wrong_no = [row for row, yes in zip(rows, verdicts, strict=True) if row.right and not yes]
    return Score(wrong_yes, wrong_no, len(rows), sum(row.right for row in rows), used, clock)


def ours(rows: Sequence[Row]) -> list[bool]:
    """As in training, with workers that are started and ended within: their time counts."""
    from amft_fast.tasks.math.pool import Pool
    from amft_fast.tasks.math.reward import rewards

    pool = Pool(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    try:
        return [r == 1.0 for r in rewards([row.response for row in rows], [row.gold for row in rows], pool)]
    finally:
        pool.close()


def one_by_one(scorer: Scorer) -> Callable[[Sequence[Row]], list[bool]]:
    return lambda rows: [scorer(row.response, row.gold) for row in rows]


def bombs(n: int = 1000) -> list[tuple[str, str]]:
    """(response, gold) pairs, all different, each of which would take seconds or all of the memory if it were computed."""
    kinds = (
        "(10^9+{})!",
        "10^{{10^{{10+{}}}}}",
        "\\binom{{10^9+{}}}{{5\\cdot10^8}}",
        "\\prod_{{n=1}}^{{10^8+{}}} n",
        "\\sum_{{n=1}}^{{10^9+{}}} n^{{10}}",
        "9^{{9^{{9^{{{}}}}}}}",
        "e^{{e^{{e^{{e^{{{}}}}}}}}}",
        "(((x^{{99}}+{})^{{99}}+1)^{{99}}+1)^{{99}}",
        "((x+{})!)!",
        "\\prod_{{k=1}}^{{1999}} (k+{})!",
    )
    own = ("5", "x+1", "\\sqrt{2}", "n!", "y=2x")
    return [(f"\\boxed{{{kinds[i % 10].format(i + 4)}}}", own[i // 10 % 5]) for i in range(n)]


def bombed() -> tuple[float, int, int]:
    """(processor seconds, workers lost, wrong yes) of 1,000 bombs."""
    from amft_fast.tasks.math.pool import Pool
    from amft_fast.tasks.math.reward import rewards

    used, pool, pairs = processor_time(), Pool(2), bombs()
    verdicts = rewards([response for response, _ in pairs], [gold for _, gold in pairs], pool)
    pool.close()
    return processor_time() - used, pool.killed, int(sum(verdicts))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when our reward says no wrong yes, and at most 3 % wrong no; else 1."""
    shared = ROOT.parent / "shared"
    parser = argparse.ArgumentParser(prog="python -m bench reward", description=__doc__)
    parser.add_argument("--cases", type=Path, default=shared / "cases" / "math_reward.jsonl")
    parser.add_argument(
        "--files", type=Path, default=Path(os.environ.get("AMFT_MATH_DATA") or shared / "data" / "math")
    )
    parser.add_argument("--limit", type=int, default=1000, help="golds taken of each data file")
    parser.add_argument("--out", type=Path, default=RESULTS / "reward_cpu.json")
    parser.add_argument("--show", action="store_true", help="print the rows that our reward judges wrong")
    args = parser.parse_args(argv)
    sets: dict[str, list[Row]] = {}
    try:
        if args.cases.is_file():
            sets["cases"] = cases(args.cases)
        for path in sorted(args.files.glob("*.*")) if args.files.is_dir() else []:
            sets.setdefault("golds of public files", []).extend(crossed(path.name, golds(path), args.limit))
    except UserError as e:
        print(f"python -m bench reward: {e}", file=sys.stderr)
        return 2
    if not sets:
        print(
            f"python -m bench reward: neither {args.cases} nor a file in {args.files} is there; name cases with --cases, or a "
            "folder of data files with --files",
            file=sys.stderr,
        )
        return 2
    found, missing = peers()
    result: dict[str, object] = {
        "environment": environment("cpu", ["amft_fast", "bench/reward.py"]),
        "missing": missing,
    }
    red = False
    for name, rows in sets.items():
        print(f"\n{name}: {len(rows):,} rows, {sum(row.right for row in rows):,} of them right\n", flush=True)
        mine = measure(rows, ours)
        scores = {"ours": mine, **{peer: measure(rows, one_by_one(scorer)) for peer, scorer in found.items()}}
        print(markdown_table(HEAD, [[scorer, *score.cells()] for scorer, score in scores.items()]), flush=True)
        result[name] = {
            scorer: {
                "rows": score.rows,
                "right": score.right,
                "wrong_yes": len(score.wrong_yes),
                "wrong_no": len(score.wrong_no),
                "rows_per_second": score.rows / score.clock,
                "processor_seconds": score.seconds,
            }
            for scorer, score in scores.items()
        }
        red |= bool(mine.wrong_yes) or len(mine.wrong_no) > 0.03 * mine.right
        for kind, wrong in (("wrong yes", mine.wrong_yes), ("wrong no", mine.wrong_no)) if args.show else ():
            for row in wrong:
                print(f"{kind}: {row.kind}: gold {row.gold!r}, response {row.response!r}")
    seconds, killed, yes = bombed()
    print(f"\n1,000 bombs: {seconds:.1f} s of processor time, {killed} workers lost, {yes} wrong yes")
    result["bombs"] = {"bombs": 1000, "processor_seconds": seconds, "workers_lost": killed, "wrong_yes": yes}
    for peer, why in missing.items():
        print(f"{peer} is not here: {why}")
    write_json(args.out, result)
    print(f"written to {args.out}")
    return int(red or yes > 0)


if __name__ == "__main__":
    raise SystemExit(main())

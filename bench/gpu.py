"""`python -m bench gpu`, which is `make bench-gpu`: what needs a GPU, in under ten minutes, from a bare copy of the tree.

It builds csrc, then runs one process per part, each within a time of its own: the tests marked `gpu`, the machine's own rates,
the loss head, its pieces, the probe, a training step, rollouts. Nothing depends on anything before it: a part that fails, hangs
or breaks the device is written down as red, the others run, and tests that fail stand beside the figures that they are about.

Everything found so far is in OUT/gpu.json at any moment, partial results of the part in progress included; OUT/gpu.md shows it,
OUT/gpu.log holds what the processes printed. `--unpack OUT/gpu.json --out FOLDER` makes the files of the single benchmarks of
it. Needs torch, triton and numpy; parts that need more (pytest, transformers, pydantic) say so. AMFT_COMMIT names the commit
where the copy has no .git.

Without a GPU, `--device cpu` rehearses the same parts on tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import ROOT

BUDGET_S = 570.0
WRITING_S = 10.0  # kept for the last write
STARTING_S = 15.0  # kept for a part's imports and its own last write
TAIL = 6000  # characters of a part's output that gpu.json keeps; gpu.log has more
LOG = 2_000_000  # characters of gpu.log


class Part(NamedTuple):
    """One process. `least_s` is kept for it while earlier ones run, `most_s` ends it; `tests`: files whose failures make its
    figures red. In the command `{device}` stands for where it runs, `{out}` for the folder of its results, `{seconds}` for what
    it may take if it is to stop by itself; `rehearsal` is the command for a CPU (None: it has no meaning there)."""

    name: str
    command: tuple[str, ...]
    least_s: float
    most_s: float
    rehearsal: tuple[str, ...] | None = None
    tests: tuple[str, ...] = ()


def _bench(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", "bench", name, "--device", "{device}", *arguments)


_HEAD_TESTS = ("test_loss_head_gpu.py",)
_STEP_TESTS = ("test_packing.py", "test_layers.py", "test_engine.py", *_HEAD_TESTS)
_TINY_HEAD = ("--shapes", "64,16,257", "--core", "--rounds", "1", "--budget", "{seconds}", "--out", "{out}")
_WITHIN = ("--budget", "{seconds}", "--out", "{out}")
_CORE = ("--shapes", "8192,4096,131072", "--chunk-bytes", "2GiB", "1GiB", "--limit", "30", *_WITHIN)
_TINY_PIECES = ("--shape", "64,16,257", "--chunk-bytes", "64KiB", "--rounds", "1", "--out", "{out}")
_MORE = ("4096,4096,128256", "8192,3584,152064", "32768,896,151936")
_STEP = ("--rounds", "3", "--rollouts", "32", "--out", "{out}")

PARTS = {
    part.name: part
    for part in (
        Part("build", ("setup.py", "-q", "build_ext", "--inplace"), 30, 120, ("setup.py", "-q", "build_ext", "--inplace")),
        Part("machine", _bench("machine", "--out", "{out}"), 10, 40, _bench("machine", "--out", "{out}")),
        Part("tests", (), 60, 220),  # its command is made below
        Part("head", _bench("loss-head", *_CORE), 70, 170, _bench("loss-head", *_TINY_HEAD), _HEAD_TESTS),
        Part("head-core", _bench("loss-head", *_CORE, "--core"), 40, 90, _bench("loss-head", *_TINY_HEAD), _HEAD_TESTS),
        Part(
            "head-more",
            _bench("loss-head", "--shapes", *_MORE, "--core", "--rounds", "10", *_WITHIN),
            30, 120, _bench("loss-head", *_TINY_HEAD), _HEAD_TESTS,
        ),
        Part(
            "pieces", _bench("head-pieces", "--out", "{out}"), 30, 90, _bench("head-pieces", *_TINY_PIECES), _HEAD_TESTS
        ),
        Part(
            "probe",
            _bench("probe", "--output", "{out}/probe_{device}.json"),
            20, 60,
            _bench("probe", "--elements", "4000", "--tensors", "4", "--rounds", "1", "--output", "{out}/probe_{device}.json"),
            ("test_multi_tensor.py", "test_multi_tensor_build.py"),
        ),
        Part("step-1.5b", _bench("step", "--shape", "1.5b", *_STEP), 60, 200, None, _STEP_TESTS),
        Part("step-0.5b", _bench("step", "--shape", "0.5b", *_STEP), 40, 120, None, _STEP_TESTS),
        Part("scaling", _bench("scaling", "--rounds", "3", "--out", "{out}"), 20, 120, None, _STEP_TESTS),
        Part("rollout", _bench("rollout", "--out", "{out}/rollout_{device}.json"), 30, 120),
        Part(
            "counters",
            ("-m", "bench", "head-pieces", "--device", "{device}", "--counters", "--out", "{out}"),
            10, 60,
        ),
        Part("sanitizer", ("-m", "bench", "head-pieces", "--device", "{device}", "--sanitize"), 10, 60),
        Part(
            "demo",
            ("-m", "amft_fast", "train", "configs/demo.toml", "--run.device", "{device}", "--train.steps", "20")
            + ("--run.dir", "{out}/demo"),
            30, 120,
        ),
    )
}  # fmt: skip

# What runs, in the order of importance. Each must fit its budget with the least that its parts are kept (a test).
SCHEDULES = {
    "all": ("build", "machine", "head-core", "tests", "step-1.5b", "head", "probe", "pieces", "rollout"),
    "first": ("build", "machine", "tests", "head", "probe"),
    "why": ("build", "pieces", "head-more", "counters"),
    "system": ("build", "step-0.5b", "step-1.5b", "rollout", "demo", "scaling", "sanitizer"),
}


def gpu_test_files(folder: Path) -> list[Path]:
    """The files with marked tests: importing the others may need packages that a GPU machine lacks."""
    return [path for path in sorted(folder.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def tests_command() -> tuple[str, ...]:
    """The marked tests, in as many processes as pytest-xdist has; `-p bench` maps amft_kernels there too."""
    import importlib.util

    spread = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    files = (str(path.relative_to(ROOT)) for path in gpu_test_files(ROOT / "tests"))
    return ("-m", "pytest", "-q", "-m", "gpu", "-p", "bench", "-p", "no:cacheprovider", "-rf", *spread, *files)


def command_of(part: Part, device: str, out: Path, limit_s: float) -> tuple[str, ...] | None:
    """The part's arguments for Python; None where it has none on this device."""
    chosen = part.command if device == "cuda" else part.rehearsal
    if part.name == "tests" and device == "cuda":
        chosen = tests_command()
    places = {"device": device, "out": out, "seconds": max(1, int(limit_s - STARTING_S))}
    return None if not chosen else tuple(word.format(**places) for word in chosen)


# ----------------------------------------------------------------------------------------------------------- one process


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    exit_code: int | None = None  # None: not run, or cut off
    seconds: float = 0.0
    limit_s: float = 0.0
    note: str = ""
    output: str = ""
    results: dict[str, object] = field(default_factory=dict)  # by file name

    @property
    def red(self) -> str:
        """Why the part is no success; empty when it is one, or has no place here."""
        if self.exit_code == 0 or self.note.startswith("not on"):
            return ""
        return self.note or f"exit code {self.exit_code}"


Runner = Callable[[Part, Path, float, Callable[[Outcome], None]], Outcome]


def collected(folder: Path) -> dict[str, object]:
    """What a part has written so far: JSON as it is, other text as text."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".md", ".txt") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found[path.name] = text
        if path.suffix == ".json":
            with contextlib.suppress(ValueError):  # in the middle of a write
                found[path.name] = json.loads(text)
    return found


def run_part(device: str, part: Part, folder: Path, limit_s: float, partial: Callable[[Outcome], None]) -> Outcome:
    """One part in a process (and a group of processes) of its own; `partial` is told every few seconds what there is."""
    outcome = Outcome(part.name, limit_s=round(limit_s, 1))
    command = command_of(part, device, folder, limit_s)
    if command is None:
        outcome.note = f"not on a {device}"
        return outcome
    begin, log = time.monotonic(), folder / "output"
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            [sys.executable, *_flags(), *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            while child.poll() is None and time.monotonic() - begin < limit_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(min(3.0, max(0.01, begin + limit_s - time.monotonic())))
                outcome.seconds, outcome.results = round(time.monotonic() - begin, 1), collected(folder)
                partial(outcome)
            if child.poll() is None:
                outcome.note = f"not done after {limit_s:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    outcome.exit_code = None if outcome.note else child.returncode
    outcome.seconds, outcome.results = round(time.monotonic() - begin, 1), collected(folder)
    outcome.output = log.read_text(encoding="utf-8", errors="replace")
    return outcome


def _flags() -> list[str]:
    """This interpreter's own -S and the like, for the children."""
    return subprocess._args_from_interpreter_flags()


# -------------------------------------------------------------------------------------------------------------- schedule


def limits(names: Sequence[str], left_s: float) -> Iterator[tuple[str, Callable[[float], float]]]:
    """(part, what it may take of the time that is left when it starts): no more than its most, and never what is kept for
    those after it."""
    for i, name in enumerate(names):
        kept = sum(PARTS[later].least_s for later in names[i + 1 :])
        yield name, lambda left, name=name, kept=kept: min(PARTS[name].most_s, left - kept)


def run_all(
    names: Sequence[str], budget_s: float, run: Runner, note: Callable[[list[Outcome]], None], clock=time.monotonic
) -> list[Outcome]:
    """The parts in order, within the budget; `note` is told after each, and meanwhile, what there is."""
    end, done = clock() + budget_s - WRITING_S, []
    for name, limit_of in limits(names, budget_s):
        limit_s = limit_of(end - clock())
        if limit_s < 5:
            done.append(Outcome(name, note=f"no time was left: {max(0, limit_s):.0f} s of {budget_s:.0f} s"))
            continue
        with tempfile.TemporaryDirectory(prefix="amft-bench-") as folder:
            done.append(run(PARTS[name], Path(folder), limit_s, lambda outcome: note([*done, outcome])))
        note(done)
    return done


# --------------------------------------------------------------------------------------------------------------- results


def failed_tests(outcomes: Sequence[Outcome]) -> list[str]:
    """As pytest names them; the part itself where it never got to its summary."""
    tests = next((o for o in outcomes if o.name == "tests"), None)
    if tests is None or not tests.red:
        return []
    named = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.output, re.MULTILINE)
    return named or [f"tests: {tests.red}"]


def red_beside(name: str, failed: Sequence[str]) -> list[str]:
    """The failed tests that are about a part's figures; all of them when the tests did not get to their summary."""
    return [test for test in failed if test.startswith("tests:") or any(f in test for f in PARTS[name].tests)]


def summary(outcomes: Sequence[Outcome], facts: dict[str, object]) -> dict[str, object]:
    failed = failed_tests(outcomes)
    parts = [
        {
            "name": o.name,
            "exit_code": o.exit_code,
            "seconds": o.seconds,
            "limit_s": o.limit_s,
            "red": o.red,
            "note": o.note,
            "red_tests": red_beside(o.name, failed) if PARTS[o.name].tests else [],
            "output_tail": o.output[-TAIL:],
            "results": o.results,
        }
        for o in outcomes
    ]
    return {"benchmark": "gpu", **facts, "failed_tests": failed, "parts": parts}


def markdown(result: dict) -> str:
    """One line a part, then each part's own document or the end of its output."""
    lines = [
        "# Measured on a GPU",
        "",
        f"{result.get('device')}, commit {result.get('commit')}, {result.get('time')}",
        "",
    ]
    for part in result["parts"]:
        marks = [f"**RED: {part['red']}**"] if part["red"] else [part["note"]] if part["note"] else ["done"]
        if part["red_tests"]:
            marks.append(f"**RED: {len(part['red_tests'])} of its tests failed**, {part['red_tests'][0]} first")
        lines.append(f"- {part['name']}: {', '.join(marks)} ({part['seconds']:.0f} of {part['limit_s']:.0f} s)")
    for part in result["parts"]:
        documents = [text for name, text in part["results"].items() if name.endswith(".md")]
        tail = part["output_tail"][-2000:].strip()
        body = documents or ([f"```\n{tail}\n```"] if tail else [])
        lines += ["", f"## {part['name']}", "", *body] if body else []
    return "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome], facts: dict[str, object], out: Path) -> dict[str, object]:
    """gpu.json, gpu.md and gpu.log, each exchanged as a whole: whoever kills us finds the last state."""
    result = summary(outcomes, facts)
    log = "".join(f"===== {o.name}\n{o.output[-LOG // 4 :]}\n" for o in outcomes)[-LOG:]
    texts = {
        "gpu.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "gpu.md": markdown(result),
        "gpu.log": log,
    }
    for name, text in texts.items():
        unfinished = out / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(out / name)
    return result


def unpack(path: Path, folder: Path) -> list[Path]:
    """The single benchmarks' files out of a gpu.json, such as bench/results holds."""
    written = []
    for part in json.loads(path.read_text(encoding="utf-8"))["parts"]:
        for name, content in part["results"].items():
            text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            written.append(folder / name)
            written[-1].write_text(text, encoding="utf-8")
    return written


# ------------------------------------------------------------------------------------------------------------------- CLI


def facts_of(device: str, schedule: str, budget_s: float) -> dict[str, object]:
    from bench.results import environment

    measured = ("kernels", "csrc", "amft_fast", "bench/*.py", "tests")
    return {**environment(device, measured), "schedule": schedule, "budget_s": budget_s}


def main(argv: Sequence[str] | None = None) -> int:
    """0: every part was green; 1: not so; 2: there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("schedule", nargs="?", choices=tuple(SCHEDULES), default="all")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), metavar="NAME", help="these instead of a schedule")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on tiny shapes")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds for everything (default {BUDGET_S:g})")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-gpu"), help="folder for three files (default ./bench-gpu)"
    )
    parser.add_argument("--unpack", type=Path, metavar="GPU_JSON", help="only make its files in --out")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.unpack:
        print("\n".join(str(path) for path in unpack(arguments.unpack, out)))
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench gpu: torch sees no CUDA device, and all of this needs one (--device cpu rehearses).", file=sys.stderr
        )
        return 2
    names = arguments.parts or SCHEDULES[arguments.schedule]
    facts = facts_of(arguments.device, arguments.schedule, arguments.budget)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the child dies with us

    def note(outcomes: list[Outcome]) -> None:
        write(outcomes, facts, out)

    def run(part: Part, folder: Path, limit_s: float, partial: Callable[[Outcome], None]) -> Outcome:
        print(f"{part.name} (at most {limit_s:.0f} s) ...", file=sys.stderr, flush=True)
        outcome = run_part(arguments.device, part, folder, limit_s, partial)
        print(f"  {outcome.red or outcome.note or 'done'}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        return outcome

    outcomes = run_all(names, arguments.budget, run, note)
    result = write(outcomes, facts, out)
    print(markdown(result))
    return 1 if any(o.red for o in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench gpu`, which is `make bench-gpu`: all that needs a GPU, in under ten minutes on one H200.

First the tests marked `gpu`, and nothing more if one fails. Then the loss head at the shapes of GPU_SHAPES in bf16 with 1 GiB
and 2 GiB of workspace, its sweeps over N and V, and the probe's dot-product, each within what is left of the budget; what
does not fit is named, not run. Last a training step (`bench step`, `bench scaling`), which needs transformers as well. The rest
needs torch, triton, numpy, pytest and matplotlib; the package itself need not be installed.

Writes gpu.json (device, versions, commit, what ran) beside the files of the two benchmarks. Where the checkout came without
.git, AMFT_COMMIT names its commit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import ROOT
from bench.measure import Deadline
from bench.results import RESULTS, environment, write_json

MEASURED = ("kernels", "csrc", "amft_fast/multi_tensor.py", "bench/*.py", "tests")
CHUNK_BYTES = [1 << 30, 2 << 30]
ROUNDS = 20
PROBE_SECONDS, STEP_SECONDS, REST_SECONDS = 60, 120, 15  # kept for the probe, for the step; for starting and writing


def gpu_test_files(folder: Path) -> list[Path]:
    """The files with marked tests: importing the others may need packages that a GPU machine lacks."""
    return [path for path in sorted(folder.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(files: Sequence[Path], seconds: float) -> dict[str, object]:
    """The marked tests in a process of their own. `-p bench` maps amft_kernels there too."""
    options = ["-q", "-m", "gpu", "-p", "bench", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(str(path.relative_to(ROOT)) for path in files)]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, output = 124, (late.stdout or b"").decode(errors="replace") + f"\nnot done after {seconds:.0f} s"
    lines = output.strip().splitlines()
    report = {"passed": code == 0, "exit_code": code, "seconds": round(time.monotonic() - begin, 1)}
    return report | {"files": [path.name for path in files], "last_line": lines[-1] if lines else "", "output": output}


def run_loss_head(deadline: Deadline, folder: Path, log: Callable[[str], None]) -> int:
    from bench import loss_head

    shapes = [(shape, False) for shape in loss_head.GPU_SHAPES] + [(shape, True) for shape in loss_head.GPU_SWEEP]
    plan = loss_head.Plan("cuda", torch.bfloat16, shapes, CHUNK_BYTES, ROUNDS, 60.0, deadline, log)
    result = loss_head.run(plan)
    paths = loss_head.write(result, folder)
    print(paths[1].read_text(encoding="utf-8"))
    return loss_head.exit_code(result)


def run_probe(folder: Path) -> int:
    from bench import probe

    return probe.main(["--device", "cuda", "--output", str(folder / "probe_cuda.json")])


def run_step(folder: Path, left: float) -> int:
    """1.5 B first, since its bars count; the smaller one and the scaling where time is left."""
    from bench import scaling, step

    common = ["--device", "cuda", "--out", str(folder), "--rounds"]
    parts = [
        lambda: step.main(["--shape", "1.5b", *common, "5"]),
        lambda: step.main(["--shape", "0.5b", *common, "5"]),
        lambda: scaling.main([*common, "3"]),
    ]
    deadline = Deadline(left)
    codes = [part() if deadline.left() > STEP_SECONDS / 2 else 0 for part in parts]
    return max(codes)


def main(argv: Sequence[str] | None = None) -> int:
    """0: tests passed and every check of ours was green; 1: not so; 2: there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything (default 570)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default bench/results)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device, and all of this needs one.", file=sys.stderr)
        return 2

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    deadline = Deadline(arguments.budget)
    tests = run_tests(gpu_test_files(ROOT / "tests"), deadline.left() / 2)
    log(tests["output"])
    result = {
        "benchmark": "gpu",
        **environment("cuda", MEASURED),
        "budget_s": arguments.budget,
        "tests": tests,
        "parts": [],
    }
    if tests["passed"]:
        steps = {
            "loss-head": (PROBE_SECONDS + STEP_SECONDS, lambda left: run_loss_head(Deadline(left), arguments.out, log)),
            "probe": (STEP_SECONDS, lambda left: run_probe(arguments.out)),
            "step": (0, lambda left: run_step(arguments.out, left)),
        }
        result["parts"] = [run_part(name, *step, deadline, log) for name, step in steps.items()]
    else:
        log(f"bench gpu: the tests did not pass ({tests['last_line']}), so nothing was measured.")
    write_json(arguments.out / "gpu.json", result)
    return 0 if tests["passed"] and all(part["exit_code"] == 0 for part in result["parts"]) else 1


def run_part(
    name: str, reserve: float, run: Callable[[float], int], deadline: Deadline, log: Callable[[str], None]
) -> dict[str, object]:
    """One benchmark within the time that is left, less what is kept for the next."""
    left = deadline.left() - reserve - REST_SECONDS
    if left < 20:
        words = f"skipped: {max(0, left):.0f} s of the budget of {deadline.seconds:.0f} s were left for it"
        log(f"bench gpu: {name} {words}")
        return {"name": name, "exit_code": 0, "seconds": 0, "note": words}
    begin = time.monotonic()
    code = run(left)
    return {"name": name, "exit_code": code, "seconds": round(time.monotonic() - begin, 1), "note": ""}


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench head-pieces`: what the loss head is made of, each piece by itself.

The three products in every form that the head could take them: logits out of the GEMM in fp32 or in the operands' dtype, dW
written or added to, whole and over the chunks of the default workspace. Then the row kernel alone, over columns per step and
warps (`rows_launch.row_config` picks one of these by reasoning, which is what this is to check). `--counters` asks ncu for the
bytes and the L2 hit rate of one row kernel; `--sanitize` runs a small case under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from amft_kernels.backends import triton_obstacle
from amft_kernels.chunks import default_chunk_bytes, plan_rows

from bench import ROOT
from bench.loss_head import parse_bytes, parse_shape, product
from bench.measure import time_once
from bench.results import RESULTS, environment, markdown_table, mib, write_json
from bench.workload import Shape

MEASURED = ("kernels", "bench/*.py")
BLOCKS, WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
PARTS = (
    (2048, 2),
    (4096, 4),
    (4096, 8),
    (8192, 8),
    (8192, 16),
    (16384, 16),
)  # columns and warps of a program that keeps its part
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum"
Timer = Callable[[Callable[[], object]], float]


def products(shape: Shape, device: str, dtype: torch.dtype, chunk_bytes: int) -> Iterator[tuple[str, float, Callable]]:
    """(name, FLOP, call) of each form of a product; "chunks": the products of one chunk, as often as there are chunks."""
    n, h, v = shape
    h_NH, w_VH = torch.randn(n, h, device=device).to(dtype), torch.randn(v, h, device=device).to(dtype)
    backend = "torch" if triton_obstacle(device, dtype) else "triton"
    rows = plan_rows(torch.ones(n, dtype=torch.bool, device=device), v, torch.float32, chunk_bytes, backend).chunk_rows
    wide = dtype if device == "cpu" else torch.float32  # a CPU has no mixed products
    grad_NV = torch.randn(n, v, device=device).mul_(1e-3).to(dtype)
    flop = 2 * n * h * v
    for out_dtype in dict.fromkeys((dtype, wide)):
        logits_rV = torch.empty(rows, v, dtype=out_dtype, device=device)

        def logits(out=logits_rV) -> None:
            for start in range(0, n, rows):
                part = h_NH[start : start + rows]
                product(part, w_VH.t(), out[: len(part)])

        yield f"logits, out in {_short(out_dtype)}, chunks of {rows}", flop, logits
    del logits_rV
    dh_NH = torch.empty_like(h_NH)
    yield "dH, whole", flop, lambda: product(grad_NV, w_VH, dh_NH)

    def hidden_chunks() -> None:
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            product(grad_NV[part], w_VH, dh_NH[part])

    yield f"dH, chunks of {rows}", flop, hidden_chunks
    for out_dtype in dict.fromkeys((dtype, wide)):
        dw_VH = torch.zeros(v, h, dtype=out_dtype, device=device)
        for add in (False, True):
            words = f"dW, whole, {'added to' if add else 'written in'} {_short(out_dtype)}"
            yield words, flop, lambda out=dw_VH, add=add: product(grad_NV.t(), h_NH, out, accumulate=add)

    def weight_chunks(out=dw_VH) -> None:
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            product(grad_NV[part].t(), h_NH[part], out, accumulate=start > 0)

    yield f"dW, chunks of {rows}, added up in {_short(wide)}", flop, weight_chunks


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_kernels(shape: Shape, chunk_bytes: int, device: str) -> Iterator[tuple[str, float, Callable]]:
    """(name, bytes, call) of the row kernel over a whole chunk, for each configuration that a program can have. Bytes are what
    it has to move at best: fp32 logits once, bf16 gradients once."""
    from amft_kernels import rows_launch
    from amft_kernels.policy_terms import PolicyOptions, Rows
    from amft_kernels.row_math import Head

    n, _, v = shape
    n = min(n, chunk_bytes // (4 * rows_launch.padded(v)))
    logits = rows_launch.workspace(n, v, torch.device(device)).normal_()
    kept = torch.empty(n, rows_launch.padded(v), dtype=torch.bfloat16, device=device)  # the logits stay as they are
    ones = torch.ones(n, device=device)
    rows = Rows(torch.zeros(n, dtype=torch.int64, device=device), pg_weight=ones, entropy_weight=ones, advantages=ones)
    rows = rows._replace(old_logprobs=-ones)
    head = Head(torch.empty(v, 1, dtype=torch.bfloat16, device=device), None, 1.0, None)
    logprobs, entropy = torch.empty(2, n, device=device)
    configs = {
        f"{block} columns × {warps} warps, row read twice": {"BLOCK": block, "num_warps": warps}
        for block, warps in itertools.product(BLOCKS, WARPS)
        if 64 <= block // warps <= 1024  # 2 to 32 columns a thread
    }
    if rows_launch.in_parts():
        configs |= {f"{b} columns × {w} warps, in parts": rows_launch.parts_config(v, b, w) for b, w in PARTS}
    for name, config in configs.items():

        def run(config=config) -> None:
            rows_launch.policy_rows(logits, kept[:, :v], 0, rows, head, PolicyOptions(), logprobs, entropy, config)

        yield name, 6.0 * n * v, run


def timed(pieces: Iterator[tuple[str, float, Callable]], timer: Timer, note: Callable[[list], None]) -> list[dict]:
    """One entry a piece; `note` is told after each. A piece that fails is an entry that says so."""
    found: list[dict] = []
    for name, work, call in pieces:
        try:
            call()
            found.append({"name": name, "work": work, "ms": timer(call)})
        except Exception as error:
            found.append({"name": name, "work": work, "red": f"{type(error).__name__}: {error}"[:300]})
        note(found)
    return found


def document(result: dict) -> str:
    lines = ["# The loss head's pieces", "", "{} × {} × {}".format(*result["shape"]) + f", {result['device']}", ""]
    for key, unit, scale in (("products", "TFLOP/s", 1e9), ("row_kernels", "TB/s", 1e9)):
        cells = [
            [r["name"], f"{r['ms']:.2f}", f"{r['work'] / r['ms'] / scale:.3g}"]
            if "ms" in r
            else [r["name"], "red", r["red"]]
            for r in result[key]
        ]
        if cells:
            lines += [markdown_table([key.replace("_", " "), "ms", unit], cells), ""]
    return "\n".join(lines)


def under(tool: str, *options: str) -> int:
    """The small case again, in a process under one of NVIDIA's tools; 0 where the tool is missing, which is said."""
    if shutil.which(tool) is None:
        print(f"{tool} is not installed: left out")
        return 0
    command = [tool, *options, sys.executable, "-m", "bench", "head-pieces", "--device", "cuda", "--one"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def one_kernel(shape: Shape) -> int:
    """Both row kernels, each twice, as the head launches them: what ncu and compute-sanitizer look at."""
    from amft_kernels import rows_launch

    twice, once = rows_launch.row_config(shape[2]), rows_launch.parts_config(shape[2])
    names = (f"{twice['BLOCK']} columns × {twice['num_warps']} warps, row read twice",)
    names += (f"{once['BLOCK']} columns × {once['num_warps']} warps, in parts",)
    for name, _, run in row_kernels(shape, 1 << 30, "cuda"):
        if name in names:
            run()
            run()
    torch.cuda.synchronize()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a piece failed."""
    parser = argparse.ArgumentParser(prog="python -m bench head-pieces", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=parse_shape, default=(8192, 4096, 131072), metavar="N,H,V")
    parser.add_argument("--chunk-bytes", type=parse_bytes, help="default: the head's own")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--counters", action="store_true", help="bytes and L2 hit rate of one row kernel, by ncu")
    parser.add_argument("--sanitize", action="store_true", help="a small case under compute-sanitizer")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default bench/results)")
    arguments = parser.parse_args(argv)
    if arguments.one:
        return one_kernel((2048, 64, 131072))
    if arguments.counters:
        return under("ncu", "--clock-control", "none", "--kernel-name", "regex:policy_.*_kernel", "--metrics", METRICS)
    if arguments.sanitize:
        return under("compute-sanitizer", "--error-exitcode", "1")
    device, dtype = arguments.device, torch.float32 if arguments.device == "cpu" else torch.bfloat16
    size = arguments.chunk_bytes or default_chunk_bytes(torch.device(device))
    result = {
        "benchmark": "head-pieces",
        **environment(device, MEASURED),
        "shape": arguments.shape,
        "chunk_bytes": size,
    }
    result |= {"products": [], "row_kernels": []}
    path = arguments.out / f"head_pieces_{device}.json"

    def timer(call: Callable[[], object]) -> float:
        return statistics.median(time_once(call, device) for _ in range(arguments.rounds))

    def noting(key: str) -> Callable[[list], None]:
        def note(found: list) -> None:
            result[key] = found
            write_json(path, result)

        return note

    timed(products(arguments.shape, device, dtype, size), timer, noting("products"))
    obstacle = triton_obstacle(device, dtype)
    if obstacle is None:
        timed(row_kernels(arguments.shape, size, device), timer, noting("row_kernels"))
    else:
        print(f"row kernels left out: {obstacle}", file=sys.stderr)
    text = document(result)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"workspace {mib(size)}\n\n{text}")
    return 1 if any("red" in row for key in ("products", "row_kernels") for row in result[key]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench machine`: what the device does at best: bytes copied and bf16 multiply-adds per second.

Every other figure is read against these two: 8192³ in bf16 on random numbers (zeros take less power and run faster), and a copy
of 2 GiB, bytes read and written counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import time_once
from bench.results import RESULTS, environment, write_json


def rates(device: str, side: int, size: int, rounds: int) -> dict[str, float]:
    """Medians of some rounds."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(size, dtype=torch.int8, device=device).random_(0, 100)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    ms = {
        name: statistics.median([time_once(call, device) for _ in range(rounds + 2)][2:])
        for name, call in calls.items()
    }
    return {"gemm_tflops": 2 * side**3 / ms["product"] / 1e9, "copy_tb_per_s": 2 * size / ms["copy"] / 1e9}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench machine", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default bench/results)")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    found = rates(arguments.device, 8192 if on_gpu else 256, 2 << 30 if on_gpu else 1 << 20, 10)
    facts = environment(arguments.device, ("bench/*.py",))
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts["memory_bytes"], facts["multiprocessors"] = properties.total_memory, properties.multi_processor_count
    result = {"benchmark": "machine", **facts, **found}
    write_json(arguments.out / f"machine_{arguments.device}.json", result)
    print(f"{facts['device']}: {found['gemm_tflops']:.0f} TFLOP/s, copies {found['copy_tb_per_s']:.2f} TB/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What every benchmark writes down: where and on which code it ran, JSON, Markdown tables, one PNG."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import ROOT

RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "verl", "quack-kernels", "numpy")


def environment(device: str, measured: Sequence[str]) -> dict[str, object]:
    """Device, versions, time and commit. `measured`: the paths whose uncommitted changes make the commit "dirty"."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return {
        "device": device_name(device),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions | {name: version(name) for name in PACKAGES if version(name)},
        "commit": commit(measured),
    }


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """As the maker calls it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(measured: Sequence[str]) -> str:
    """The checkout's commit; AMFT_COMMIT names it for a copy that has no .git."""
    if named := os.environ.get("AMFT_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "-uno", "--", *measured) else "") if head else "unknown"
    except OSError:
        return "unknown"


def folder_name(model: Path, dtype: str | None) -> str:
    """Of a transformers folder, for the names of files: with its type where it is not fp32."""
    return model.resolve().name + (f"_{dtype}" if dtype not in (None, "fp32") else "")


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare_vllm(device: str) -> None:
    """vLLM says errors alone; on a CPU torch takes one thread, beside the engine's."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        torch.set_num_threads(1)


def write_rows(name: str, args: Namespace, measured: Sequence[str], rows: list[dict], table: Callable) -> int:
    """The rows of a benchmark with vLLM as JSON (at `args.out`, or NAME_DEVICE.json here), their table as Markdown beside it;
    returns the exit code 0."""
    path = args.out or RESULTS / f"{name.replace('-', '_')}_{args.device}.json"
    result = {"benchmark": name, **environment(args.device, measured), "vllm": version("vllm")}
    write_json(path, result | {"rounds": args.rounds, "results": rows})
    path.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
    return 0


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right, padded so that the source reads as a table too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    ]
    head = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(header, widths))]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def mib(size: float | None) -> str:
    if size is None:
        return "–"
    if size and size % 2**30 == 0:
        return f"{size >> 30} GiB"
    if size >= 10 * 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:,.{0 if size >= 10 * 2**20 else 1}f} MiB"

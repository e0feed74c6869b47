"""What learning μ costs: whole training steps of method amft against fixed μ, window by window in turn, in one process.

Both start from the same weights and data. A window is `controller.window` steps: one utility gradient and that many probed
steps for amft, as many plain steps for fixed. The check that comes first: a probed step must give the weights of a plain one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from amft_fast import config_file, run
from amft_fast.train import Trainer
from bench.results import RESULTS, environment, markdown_table, write_json


class _Quiet:
    """Stands for a run's files: this benchmark keeps nothing of the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.checkpoints = folder
        self.samples = self

    def say(self, text: str) -> None:
        pass

    def write(self, record: dict) -> None:
        pass


def make(path: str, method: str, flags: list[str], folder: Path) -> Trainer:
    cfg = config_file.load(path, ["--train.method", method, "--log.samples_every", "0", *flags])
    trainer = Trainer(cfg, run.build(cfg, lambda: False), _Quiet(folder))
    trainer.after_warmup()
    return trainer


def check(amft: Trainer, fixed: Trainer) -> float:
    """Distance of the weights after one step each, the one probed and the other plain, over the length of the step.

    In the 2-norm: AdamW's first step turns the sign of a gradient that is nearly 0 into a whole step, rounding included.
    """
    start = torch.cat([g.master for g in fixed.engine.groups])
    amft.train_step(), fixed.train_step()
    ends = [torch.cat([g.master for g in t.engine.groups]) for t in (amft, fixed)]
    return float((ends[0] - ends[1]).norm() / (ends[1] - start).norm())


def window(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Seconds of a window, and of the utility gradient in it."""
    begin = time.perf_counter()
    utility = 0.0
    for _ in range(steps):
        utility += trainer.train_step().get("time/utility", 0.0)
    return time.perf_counter() - begin, utility


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when the check is red (then nothing is timed)."""
    parser = argparse.ArgumentParser(prog="python -m bench controller", description=__doc__)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--windows", type=int, default=12, help="windows of each method, after one to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS / "controller_cpu.json")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        amft, fixed = (make(args.config, m, flags, Path(folder)) for m in ("amft", "fixed"))
        apart = check(amft, fixed)
        if not apart < 1e-3:
            print(
                f"red: a probed step and a plain one end {apart:.1e} of a step apart; nothing was timed",
                file=sys.stderr,
            )
            return 1
        steps = amft.cfg.controller.window
        for trainer in (amft, fixed):
            window(trainer, steps - 1)
        pairs = [(window(amft, steps), window(fixed, steps)[0]) for _ in range(args.windows)]
    ratios = [a / b for (a, _), b in pairs]
    share = [u / a for (a, u), _ in pairs]
    result = {
        "what": "a window of amft over a window of fixed mu, seconds",
        "config": args.config,
        "check_weights_apart": apart,
        "windows": args.windows,
        "window_steps": steps,
        "amft_ms_per_step": 1e3 * statistics.median(a for (a, _), _ in pairs) / steps,
        "fixed_ms_per_step": 1e3 * statistics.median(b for _, b in pairs) / steps,
        "extra_percent": 100 * (statistics.median(ratios) - 1),
        "extra_percent_quartiles": [100 * (q - 1) for q in statistics.quantiles(ratios, n=4)[::2]],
        "utility_percent_of_window": 100 * statistics.median(share),
        "environment": environment(str(amft.engine.device), ["amft_fast", "kernels", "bench/controller.py"]),
        "threads": torch.get_num_threads(),
    }
    write_json(args.out, result)
    rows = [
        ["amft", f"{result['amft_ms_per_step']:.0f}", f"{result['utility_percent_of_window']:.1f}"],
        ["fixed", f"{result['fixed_ms_per_step']:.0f}", "0"],
    ]
    print(markdown_table(["method", "ms per step", "utility % of it"], rows))
    low, high = result["extra_percent_quartiles"]
    print(f"\nextra: {result['extra_percent']:.1f} % (quartiles {low:.1f} to {high:.1f}); written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

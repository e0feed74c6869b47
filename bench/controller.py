"""What learning μ costs on top of a training step: the utility gradient of a window, and probed steps in place of plain ones.

Timed are whole windows of method amft (`controller.window` steps and the utility gradient that serves them), and in turn probed
and plain updates on one and the same batch, which the windows of two runs would not have: their answers differ in length. On a
CPU seconds are those of the process, so that other work on the machine tells less. The check that comes first: a probed step
must give the weights of a plain one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from amft_fast import config_file
from amft_fast.mixtures.base import Mix
from amft_fast.run.build import build
from amft_fast.trainer import Trainer
from bench.results import RESULTS, environment, markdown_table, write_json


def make(path: str, method: str, flags: list[str]) -> Trainer:
    cfg = config_file.load(path, ["--train.method", method, *flags])
    trainer = Trainer(cfg, build(cfg, lambda: False))
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


class Window(NamedTuple):
    """Seconds of a window, and of the utility gradient in it."""

    seconds: float
    utility: float


def clock(trainer: Trainer) -> float:
    """Seconds: the process's own on a CPU, the wall's elsewhere, where the update reads its figures back before it ends."""
    if trainer.engine.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def window(trainer: Trainer, steps: int) -> Window:
    """Runs `steps` steps of the trainer."""
    begin, wall = clock(trainer), time.perf_counter()
    trainer.phases.read()
    for _ in range(steps):
        trainer.train_step()
    utility = trainer.phases.read().get("utility", 0.0)
    seconds, wall = clock(trainer) - begin, time.perf_counter() - wall
    return Window(seconds, utility * seconds / wall)


def probed_and_plain(trainer: Trainer, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of updates with and without the probe, in turn, on one batch and with a learning rate of 0."""
    rl = trainer.scorer.judge(trainer.rollouts.draw(trainer.step).samples)
    sft = trainer.demos.take(trainer.cfg.train.demos_per_step)
    mu = trainer.cfg.controller.mu_init
    mix = Mix(sft, rl, mu, mu, 1 - mu)
    trainer.draw_utility()
    trainer.engine.set_lr(0.0)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for probed, into in zip((True, False), seconds):
            begin = clock(trainer)
            trainer.update(mix, trainer.utility if probed else None)
            into.append(clock(trainer) - begin)
    return seconds


def extra_percent(windows: Sequence[Window], probed: Sequence[float], plain: Sequence[float], steps: int) -> float:
    """The controller's time over that of the same steps without it."""
    total, utility = (statistics.fmean(x) for x in zip(*windows))
    sweeps = steps * (statistics.median(probed) - statistics.median(plain))
    return 100 * (utility + sweeps) / (total - utility - sweeps)


def interval(windows: Sequence[Window], probed: Sequence[float], plain: Sequence[float], steps: int) -> list[float]:
    """The 95 % interval of `extra_percent`, by resampling what was timed."""
    draw = random.Random(0)
    again = [extra_percent(*(draw.choices(x, k=len(x)) for x in (windows, probed, plain)), steps) for _ in range(1000)]
    return statistics.quantiles(again, n=40)[::38]


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when the check is red (then nothing is timed)."""
    parser = argparse.ArgumentParser(prog="python -m bench controller", description=__doc__)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--windows", type=int, default=40, help="windows of each method, after one to warm up")
    parser.add_argument("--out", type=Path, default=RESULTS / "controller_cpu.json")
    args, flags = parser.parse_known_args(argv)
    amft, fixed = (make(args.config, m, flags) for m in ("amft", "fixed"))
    apart = check(amft, fixed)
    if not apart < 1e-3:
        print(
            f"red: a probed step and a plain one end {apart:.1e} of a step apart; nothing was timed",
            file=sys.stderr,
        )
        return 1
    steps = amft.cfg.controller.window
    window(amft, steps - 1)
    windows = [window(amft, steps) for _ in range(args.windows)]
    probed, plain = probed_and_plain(amft, 2 * args.windows)
    timed = (windows, probed, plain, steps)
    extra, (low, high) = extra_percent(*timed), interval(*timed)
    result = {
        "what": "seconds that learning mu adds, in percent of the same steps without it",
        "config": args.config,
        "check_weights_apart": apart,
        "windows": args.windows,
        "window_steps": steps,
        "ms_per_step": 1e3 * statistics.fmean(w.seconds for w in windows) / steps,
        "utility_ms_per_step": 1e3 * statistics.fmean(w.utility for w in windows) / steps,
        "probed_update_ms": 1e3 * statistics.median(probed),
        "plain_update_ms": 1e3 * statistics.median(plain),
        "extra_percent": extra,
        "extra_percent_95": [low, high],
        "environment": environment(str(amft.engine.device), ["amft_fast", "kernels", "bench/controller.py"]),
        "threads": torch.get_num_threads(),
    }
    write_json(args.out, result)
    names = ("ms_per_step", "utility_ms_per_step", "probed_update_ms", "plain_update_ms")
    print(
        markdown_table(["part", "ms"], [[n.removesuffix("_ms").replace("_", " "), f"{result[n]:.1f}"] for n in names])
    )
    print(f"\nextra: {extra:.1f} % (95 % interval {low:.1f} to {high:.1f}); written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What old rollouts cost in learning: success at equal tokens, on-policy and drawn 1, 2, 4 steps ahead.

The trainer is the real one, and so are its rounds, old log-probs and importance weights (`rollout.async_steps`); only the
servers are not there: the embedded engine draws with a copy of the weights, that of the last sync. Times say nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.interfaces import Completion, Request, Sampling
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run.build import build
from amft_fast.run.evaluate import evaluate, of_config
from amft_fast.run.figures import staleness_figures
from amft_fast.trainer import Trainer
from bench.results import RESULTS, environment, markdown_table, write_json


class CopyEngine:
    """The embedded engine on weights of its own, as a server has them; asked by one thread at a time."""

    def __init__(self, model: torch.nn.Module, pad: int, max_batch: int) -> None:
        self.model, self.one = copy.deepcopy(model), threading.Lock()
        self.inner = TransformersEngine(self.model, pad, max_batch)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        with self.one:
            return self.inner.generate(requests, sampling)

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        own = dict(self.model.named_parameters())
        with self.one, torch.no_grad():
            for name, tensor in named_tensors:
                own[name].copy_(tensor)
            self.inner.version = version

    def rest(self) -> None: ...

    def health(self) -> str:
        return "ok"

    def close(self) -> None: ...


def success(cfg: Config, trainer: Trainer, parts: Any, split: str) -> tuple[float, float, float]:
    """(sampled, its standard error over prompts, greedy), in percent, by the present weights."""
    trainer.rollouts.catch_up()
    figures = evaluate(parts.rollout_engine, parts.task, parts.encoder, [split], **of_config(cfg))[split]
    return tuple(100 * figures[name] for name in ("sampled", "stderr", "greedy"))


def run(cfg: Config, depth: int, split: str) -> dict[str, Any]:
    """A run to its token budget with rollouts drawn `depth` steps ahead."""
    cfg = cfg.model_copy(
        update={
            "rollout": cfg.rollout.model_copy(update={"async_steps": depth}),  # which the config asks servers for
            "objective": cfg.objective.model_copy(update={"tis_cap": 2.0}),
        }
    )
    parts = build(cfg, lambda: False)
    parts.rollout_engine = CopyEngine(
        parts.policy.model, parts.encoder.tokenizer.pad_token_id or 0, cfg.rollout.max_batch
    )
    trainer = Trainer(cfg, parts)
    before = success(cfg, trainer, parts, split)
    trainer.after_warmup()
    ages, ess, bent = [], [], []
    while not trainer.finished:
        step = trainer.train_step()
        if step.drawn.samples:
            ages.append(staleness_figures(step.drawn.samples, step.number)["staleness_mean"])
            ess.append(step.figures["mismatch_ess"])
            bent.append(step.figures["mismatch_kl"])
    after = success(cfg, trainer, parts, split)
    return {
        "depth": depth,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "age": fmean(ages),
        "ess": fmean(ess),
        "kl": fmean(bent),
        "before": before,
        "after": after,
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["steps ahead", "steps", "tokens", "mean age", "KL to the sampler", "ESS", "sampled", "stderr", "greedy"]
    cells = [
        [
            *(
                f"{r['depth']}",
                f"{r['steps']}",
                f"{r['tokens']:,}",
                f"{r['age']:.1f}",
                f"{r['kl']:.2g}",
                f"{r['ess']:.3f}",
            ),
            *(f"{r['before'][0]:.1f} → {r['after'][0]:.1f}", f"{r['after'][1]:.1f}"),
            f"{r['before'][2]:.1f} → {r['after'][2]:.1f}",
        ]
        for r in rows
    ]
    return markdown_table(head, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench stale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file; settings can be given as flags")
    parser.add_argument("--budget", type=int, default=1_000_000, help="tokens of a run (default %(default)s)")
    parser.add_argument("--depths", default="0,1,2,4", help="steps ahead (default %(default)s)")
    parser.add_argument("--split", default="val", help="(default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/stale_cpu.json)")
    rest, settings = config_file.split_flags(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(rest)
    try:
        cfg = config_file.load(args.config, [*settings, *unknown, "--train.token_budget", str(args.budget)])
        rows = []
        for depth in map(int, args.depths.split(",")):
            rows.append(run(cfg, depth, args.split))
            print(rows[-1], flush=True)
    except UserError as e:
        print(f"bench stale: {e}", file=sys.stderr)
        return 2
    print("\n" + table(rows))
    measured = ["amft_fast", "kernels", "csrc", "bench"]
    result = {
        "benchmark": "stale",
        **environment("cpu", measured),
        "config": args.config,
        "split": args.split,
        "rows": rows,
    }
    write_json(args.out or RESULTS / "stale_cpu.json", result)
    return 0

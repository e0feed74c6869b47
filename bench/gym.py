"""Two steps on each task of reasoning-gym, from its problems to the update, and the table of docs/gym.md.

For each task: problems of three splits, made twice and compared; two steps of AMFT with a random model of a few thousand
parameters (of RL where no problem has a demonstration), with an evaluation before and after. All in this process, which runs
with a fixed hash seed as those of the task do; what takes over 60 s counts as hanging.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amft_fast.config import Config, GymConfig
from amft_fast.tasks.gym.generate import dataset, generate
from amft_fast.tasks.gym.task import GymTask

COUNTS = {"train": 4, "val": 2, "test": 2}
COMPOSITE = {"datasets": [{"name": "leg_counting"}, {"name": "basic_arithmetic", "weight": 2.0}]}
SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gym", description=__doc__)
    parser.add_argument("model", help="folder of a small checkpoint")
    parser.add_argument("--only", help="comma-separated names; default: all")
    parser.add_argument("--out", default="", help="file for the table")
    args = parser.parse_args(argv)
    if os.environ.get("PYTHONHASHSEED") != "0":
        given = sys.argv[1:] if argv is None else ["gym", *argv]
        os.execve(sys.executable, [sys.executable, "-m", "bench", *given], {**os.environ, "PYTHONHASHSEED": "0"})
    from reasoning_gym.factory import DATASETS

    names = args.only.split(",") if args.only else sorted(DATASETS)
    survey = Survey(args.model)
    rows = []
    for name in names:
        begin = time.perf_counter()
        rows.append((name, *survey.run(name)))
        print(*rows[-1], f"{time.perf_counter() - begin:.1f} s", sep="  ", flush=True)
    text = table(rows)
    print(text)
    if args.out:
        Path(args.out).write_text(text)
    return 0


class Survey:
    """One small model, trained on task after task."""

    def __init__(self, model: str) -> None:
        from amft_fast.run.build import build

        flags = {
            "run": {"threads": 1},
            "model": {"path": model, "max_position_embeddings": 32768},
            "train": {"steps": 2, "prompts_per_step": 2, "demos_per_step": 2, "lr": 1e-3, "data_workers": 0},
            "meta": {"prompts": 2, "num_generations": 2},
            "controller": {"window": 1},
            "rollout": {"num_generations": 2, "max_new_tokens": 4},
            "eval": {"every": 0, "num_samples": 1},
        }
        self.amft = Config.model_validate(flags)
        self.rl = Config.model_validate(flags | {"train": flags["train"] | {"method": "rl"}})
        self.settings = GymConfig(answer_tags=False, system_prompt="")
        empty = GymTask(
            "none", self.settings, {}, {s: [(0, "x", "x", b"")] for s in COUNTS}, lambda pairs: [0.0] * len(pairs)
        )
        self.parts = build(self.amft, lambda: False, empty)

    def run(self, name: str) -> tuple[str, str]:
        """(whether it runs, how many of the training problems have a demonstration)."""
        from amft_fast.run.evaluate import Evaluator
        from amft_fast.tasks.data.guard import Hang, within
        from amft_fast.trainer import Trainer

        options = COMPOSITE if name == "composite" else {}
        try:
            made, again = generate(name, options, 0, COUNTS), generate(name, options, 0, COUNTS)
            if [row[:3] for rows in made.values() for row in rows] != [
                row[:3] for rows in again.values() for row in rows
            ]:
                return "no: its problems differ from call to call", ""
            judge = Judge(name, options, [row[3] for split in COUNTS for row in made[split]])
            task = GymTask(name, self.settings, options, made, judge)
            demos = len(task.demos("train"))
            cfg = self.amft if demos else self.rl
            self.parts.task = task
            trainer = Trainer(cfg, self.parts)
            evaluator = Evaluator(cfg, self.parts)

            def steps() -> list[Any]:
                before = evaluator.evaluate(trainer)
                trainer.after_warmup()
                done = [trainer.train_step() for _ in range(2)]
                return [before, *done, evaluator.evaluate(trainer)]

            _, *done, _ = within(SECONDS, steps)
            trainer.demos.close()
            if any(step.bad_in_row for step in done) or not all(step.drawn.samples for step in done):
                return "no: a step was skipped", f"{demos} of {COUNTS['train']}"
            return "yes", f"{demos} of {len(task.prompts('train'))}"
        except Hang:
            return f"no: over {SECONDS:g} s", ""
        except Exception as e:
            return f"no: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:120], ""


class Judge:
    """The verifier in this process."""

    def __init__(self, name: str, options: dict[str, Any], entries: list[bytes]) -> None:
        self.made, self.entries = dataset(name, options, 0, len(entries)), entries

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [self._score(answer, int(number)) for answer, number in pairs]

    def _score(self, answer: str, number: int) -> float:
        try:
            return float(self.made.score_answer(answer, pickle.loads(self.entries[number])))
        except Exception:  # as in a worker: worth nothing
            return 0.0


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Markdown: the tasks that do not run, and those that run without a demonstration for each problem."""
    runs = [row for row in rows if row[1] == "yes"]
    lines = [
        f"{len(runs)} of {len(rows)} run.",
        "",
        "| task | runs | training problems with a demonstration |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {ran} | {demos} |"
        for name, ran, demos in rows
        if ran != "yes" or len(set(demos.split(" of "))) > 1
    ]
    return "\n".join([*lines, ""])

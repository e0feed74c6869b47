"""Some problems of the test, answered by several models: `python -m amft_fast.tasks.words.ask BASE TRAINED`.

Greedy answers, each marked as the task's reward has it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from amft_fast.config import ModelConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model.policy import load_model
from amft_fast.rollout.encoder import load_encoder
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.tasks.words.task import WordProblems


def answers(path: str, count: int, max_new_tokens: int, split: str = "test") -> list[tuple[Any, str, bool]]:
    """(problem, text, whether it is right) of the first `count` problems of a split, by the model in the folder `path`."""
    task, cfg = WordProblems(), ModelConfig(path=path)
    encoder = load_encoder(cfg)
    engine = TransformersEngine(load_model(cfg, torch.device("cpu")).eval(), encoder.tokenizer.pad_token_id or 0)
    episodes = [task.start(item) for item in task.prompts(split)[:count]]
    asked = [Request(tuple(encoder.prompt(e.messages)), 0, max_new_tokens) for e in episodes]
    said = engine.generate(asked, Sampling(0.0, stop_token_ids=encoder.stop_token_ids))
    texts = encoder.decode([c.token_ids for c in said])
    results = task.step_all(episodes, texts)
    return [(e.problem, text, r.info["success"]) for e, text, r in zip(episodes, texts, results)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m amft_fast.tasks.words.ask", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of checkpoints")
    parser.add_argument("--count", type=int, default=3, help="problems (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="of an answer (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        by_model = [answers(path, args.count, args.max_new_tokens) for path in args.models]
    except UserError as e:
        print(f"words: {e}", file=sys.stderr)
        return 2
    for rows in zip(*by_model):
        print(f"\n{rows[0][0].text}  (gold: {rows[0][0].answer})")
        for path, (_, text, right) in zip(args.models, rows):
            print(f"  {'right' if right else 'wrong'}  {path}: {' '.join(text.split())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

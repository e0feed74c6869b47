"""Rollout engines side by side: tokens per second of vLLM, of the embedded transformers engine and of transformers' generate.

All draw from the same weights at temperature 1 to the same lengths (no stop token), one thread on a CPU. The check that comes
first: greedy tokens are the same. Sampled tokens count, prompts do not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout import vllm
from amft_fast.rollout.transformers import TransformersEngine
from bench.results import markdown_table, prepare_vllm, write_rows
from bench.weight_sync import greedy_agrees, make_model, named, setup

MEASURED = ("amft_fast/rollout", "bench/rollout.py", "bench/weight_sync.py")
# model, prompts, answers per prompt, tokens of a prompt, tokens of an answer
CASES = [("demo", 48, 8, 12, 24), ("15M", 8, 4, 64, 32)]


def requests(prompts: int, group: int, prompt_len: int, length: int, vocabulary: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (prompts, prompt_len), generator=generator).tolist()
    return [Request(tuple(p), 1000 * i + k, length) for i, p in enumerate(ids) for k in range(group)]


def hf_generate(model: torch.nn.Module, asked: list[Request]) -> int:
    """transformers' own generate on the whole batch; tokens drawn."""
    ids = torch.tensor([r.prompt_ids for r in asked], device=model.device)
    n = asked[0].max_new_tokens
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=n,
        min_new_tokens=n,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].numel()


def rate(call: Callable[[], int], rounds: int) -> tuple[float, float]:
    """(median tokens per second, median milliseconds) after a call that warms up."""
    call()
    seconds, tokens = [], 0
    for _ in range(rounds):
        begin = time.perf_counter()
        tokens = call()
        seconds.append(time.perf_counter() - begin)
    return tokens / statistics.median(seconds), 1e3 * statistics.median(seconds)


def measure(case: tuple, device: str, rounds: int, folder: Path) -> dict[str, object]:
    """One case. Raises SystemExit when greedy tokens differ."""
    name, prompts, group, prompt_len, length = case
    model, path = make_model(name, folder, device)
    asked = requests(prompts, group, prompt_len, length, model.config.vocab_size)
    engine = vllm.make(setup(model, path, device, folder, "colocate", 1 << 28))
    try:
        engine.sync(named(model), 1)
        if not greedy_agrees(engine, model):
            raise SystemExit("red: vLLM does not draw the trainer's greedy tokens; no figures")

        def drawn(rollouts) -> int:
            return sum(len(c.token_ids) for c in rollouts.generate(asked, Sampling(1.0)))

        embedded = TransformersEngine(model)
        ways = {
            "vllm": lambda: drawn(engine),
            "transformers engine": lambda: drawn(embedded),
            "transformers generate": lambda: hf_generate(model, asked),
        }
        rows = {way: dict(zip(("tokens_per_s", "ms"), rate(call, rounds))) for way, call in ways.items()}
    finally:
        engine.close()
    keys = ("model", "prompts", "answers", "prompt_tokens", "answer_tokens")
    return dict(zip(keys, case)) | {"ways": rows}


def table(results: list[dict]) -> str:
    rows = [
        [
            f"{r['model']}, {r['prompts']} × {r['answers']} answers of {r['answer_tokens']}: {way}",
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['ms']:,.0f}",
            f"{figures['tokens_per_s'] / r['ways']['transformers generate']['tokens_per_s']:.2f}",
        ]
        for r in results
        for way, figures in r["ways"].items()
    ]
    return markdown_table(["rollouts", "tokens/s", "ms", "× generate"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a check is red (then nothing is written)."""
    parser = argparse.ArgumentParser(prog="python -m bench rollout", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/rollout_DEVICE.json")
    args = parser.parse_args(argv)
    prepare_vllm(args.device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            results.append(measure(case, args.device, args.rounds, Path(folder)))
            print(table(results[-1:]), flush=True)
    return write_rows("rollout", args, MEASURED, results, table)


if __name__ == "__main__":
    raise SystemExit(main())

"""What an update costs against the length of the answers, the size of a group, the vocabulary and the number of ranks.

One thing changes at a time. Group size is timed twice, with the group's prompt read once and with a prompt for each answer: the
difference is what prefix sharing is worth. Ranks are not run: for these the plan of the micro-batches says which share of the
time would go into waiting for the slowest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from amft_fast.data import packing
from amft_fast.data.batch import micro_batches
from amft_fast.interfaces import Sample
from amft_fast.objective import rollout_sequence
from bench.results import RESULTS, environment, markdown_table, write_json
from bench.step import SHAPES, seconds
from bench.step_peers import Ours, Work

MEASURED = ("amft_fast", "kernels", "bench/*.py")
TINY = (64, 192, 3, 4, 2, True)
GRID = {  # (base, values) by what changes
    "cpu": {
        "length": (32, (8, 32, 128, 512)),
        "group": (8, (1, 4, 8, 16)),
        "vocabulary": (512, (128, 512, 8192, 32768)),
    },
    "cuda": {
        "length": (2048, (512, 2048, 8192, 16384)),
        "group": (8, (1, 4, 8, 16)),
        "vocabulary": (151936, (32000, 151936, 262144)),
    },
}
PROMPT, ROLLOUTS = {"cpu": 32, "cuda": 512}, {"cpu": 128, "cuda": 32}


def make_work(device: str, length: int, group: int, vocabulary: int, unshared: bool = False) -> Work:
    """Random weights and tokens; `unshared`: prompts that differ, so that none is read once for all."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, mlp, layers, heads, kv, tied = TINY if device == "cpu" else SHAPES["0.5b"]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rng, samples = np.random.default_rng(0), []
    for i in range(ROLLOUTS[device]):
        if unshared or i % group == 0:
            prompt = rng.integers(0, vocabulary, PROMPT[device]).tolist()
        ids = rng.integers(0, vocabulary, int(rng.integers(length // 2, length + 1))).tolist()
        samples.append(Sample(prompt, ids, [1] * len(ids), [0.0] * len(ids), 0, "stop", str(i // group), i // group))
    return Work(model, samples, rng.normal(size=len(samples)), 4096 if device == "cpu" else 32768)


def timed(work: Work, device: str, rounds: int) -> dict[str, float]:
    ours = Ours(work, True)
    ours.update()
    best = min(seconds(ours.update, device) for _ in range(rounds))
    return {"ms": 1e3 * best, "tokens_per_s": work.tokens / best}


def waiting(ranks: int, sequences: int = 2048, max_tokens: int = 16384) -> float:
    """Share of the time that ranks would wait, by the planned costs, on a log-normal mix."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.9, sequences), 8, 8000).astype(int)
    samples = [
        Sample([i], [1] * int(n), [1] * int(n), [0.0] * int(n), 0, "stop", str(i), i) for i, n in enumerate(lengths)
    ]
    rl = [rollout_sequence(s, 1.0) for s in samples]
    costs = [[b.layout.cost for b in micro_batches(rl, max_tokens, True, rank=r, ranks=ranks)] for r in range(ranks)]
    slowest = sum(max(at_once) for at_once in zip(*costs))
    return 1 - sum(map(sum, costs)) / (ranks * slowest)


def run(device: str, rounds: int, log) -> list[dict]:
    grid, rows = GRID[device], []
    base = {name: value for name, (value, _) in grid.items()}
    for name, (_, values) in grid.items():
        for value in values:
            kinds = (False, True) if name == "group" else (False,)
            for unshared in kinds:
                work = make_work(device, **(base | {name: value}), unshared=unshared)
                row = {"what": name, "value": value, "shared_prompt": not unshared}
                rows.append(row | {"tokens": work.tokens} | timed(work, device, rounds))
                log(f"{name} {value}{', a prompt for each answer' if unshared else ''}: {rows[-1]['ms']:.0f} ms")
    return rows


def table(rows: list[dict], waits: dict[int, float]) -> str:
    cells = [
        [f"{r['what']} {r['value']:,}", "" if r["shared_prompt"] else "prompt per answer", f"{r['ms']:.0f}"]
        + [f"{r['tokens_per_s']:,.0f}"]
        for r in rows
    ]
    ranks = [[f"{n} ranks", "planned, not run", "", f"{w:.1%} waiting"] for n, w in waits.items()]
    return markdown_table(["changed", "", "ms", "tokens/s"], cells + ranks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(1)
    rows = run(args.device, args.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    waits = {n: waiting(n) for n in (2, 4, 8, 16)}
    result = {"benchmark": "scaling", "environment": environment(args.device, MEASURED), "rows": rows}
    write_json(
        args.out / f"scaling_{args.device}.json", result | {"waiting_by_ranks": waits, "break_even": packing.BREAK_EVEN}
    )
    print(table(rows, waits))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

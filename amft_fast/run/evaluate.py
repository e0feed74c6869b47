"""Evaluation: greedy success, sampled success and pass@k on splits of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb, sqrt
from typing import Any

from amft_fast.data.stream import sample_seed
from amft_fast.engine.world import ALONE, World
from amft_fast.errors import UserError
from amft_fast.interfaces import Item, RolloutEngine, Sample, Sampling, Task
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from `correct` of n (Chen et al., arXiv 2107.03374).

    Raises ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"need 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def choose(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items: a fixed pseudo-random choice by id, so that it never depends on order."""
    if limit is None or len(items) <= limit:
        return list(items)
    return sorted(items, key=lambda item: sample_seed("choose", item.id))[:limit]


def check_splits(name: str, splits: Sequence[str] | None, task: Task) -> list[str]:
    """The splits that the setting `name` asks for, all of the task's by default. Raises UserError for one it does not have."""
    for split in splits or ():
        if split not in task.splits:
            raise UserError(f"{name}: {split!r} is not a split of this task, which has {', '.join(task.splits)}")
    return list(task.splits if splits is None else splits)


def evaluate(
    engine: RolloutEngine,
    task: Task,
    encoder: Encoder,
    splits: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    max_prompts: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_split: Callable[[str], None] = lambda split: None,
    keep: list[Sample] | None = None,
    world: World = ALONE,
) -> dict[str, dict[str, float]]:
    """`{split: {greedy, sampled, pass_at_k, ...}}`, all fractions; the seeds are the same at each call.

    Beside them: `prompts`, `k`, `stderr` (standard error of `sampled` over prompts), `length` (tokens per sampled answer),
    `truncated`, and the mean of every float a task reports in its info. Samples are appended to `keep` when given.
    The ranks of `world` share the work, and each gets all figures.
    """
    stop = encoder.stop_token_ids
    out: dict[str, dict[str, float]] = {}
    for split in splits:
        items = choose(task.prompts(split), max_prompts)
        on_split(split)
        common = {"max_new_tokens": max_new_tokens, "seed_parts": (seed, "eval", split)}

        def draw(sampling: Sampling, k: int, items=items, common=common) -> list[Sample]:
            return world.spread(
                len(items) * k,
                lambda mine: episodes.run(
                    engine, task, items, encoder, sampling, num_generations=k, only=mine, **common
                ),
            )

        greedy = draw(Sampling(temperature=0.0, stop_token_ids=stop), 1)
        sampled = draw(Sampling(temperature=temperature, top_p=top_p, stop_token_ids=stop), num_samples)
        if keep is not None:
            keep += sampled
        out[split] = summarise(greedy, sampled, num_samples)
    return out


def summarise(greedy: list[Sample], sampled: list[Sample], k: int) -> dict[str, float]:
    """The figures of one split from its greedy samples (one per prompt) and its sampled ones (k per prompt, in order)."""
    n = len(greedy)
    if not n:
        return {"prompts": 0, "k": k, "greedy": 0.0, "sampled": 0.0, "pass_at_k": 0.0, "stderr": 0.0}
    right = [sum(s.success for s in sampled[i : i + k]) for i in range(0, len(sampled), k)]
    rates = [r / k for r in right]
    mean = sum(rates) / n
    variance = sum((r - mean) ** 2 for r in rates) / max(n - 1, 1)
    figures: dict[str, Any] = {
        "prompts": n,
        "k": k,
        "greedy": sum(s.success for s in greedy) / n,
        "sampled": mean,
        "pass_at_k": sum(pass_at_k(k, r, k) for r in right) / n,
        "stderr": sqrt(variance / n),
        "reward": sum(s.reward for s in sampled) / len(sampled),
        "length": sum(sum(s.loss_mask) for s in sampled) / len(sampled),
        "truncated": sum(s.finish_reason == "length" for s in sampled) / len(sampled),
    }
    names = {name for s in sampled for name, v in s.info.items() if isinstance(v, float)}
    for name in sorted(names):
        values = [s.info[name] for s in sampled if name in s.info]
        figures[name] = sum(values) / len(values)
    return figures

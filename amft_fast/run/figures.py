"""The figures of a step's rollouts."""

from __future__ import annotations

from typing import Any

from amft_fast.interfaces import Sample


def staleness_figures(samples: list[Sample], step: int, max_staleness: int | None = None) -> dict[str, float]:
    """How many steps older than the present weights those were that drew the tokens of a step, on the mean over tokens and at
    most; which share of the answers several versions have drawn, and which of the tokens is over `max_staleness`."""
    if not samples:
        return {}
    runs = [(step - version, count) for s in samples for version, count in s.runs]
    tokens = max(sum(count for _, count in runs), 1)
    figures = {
        "staleness_mean": sum(age * count for age, count in runs) / tokens,
        "staleness_max": max(age for age, _ in runs),
        "spanning": sum(len(s.runs) > 1 for s in samples) / len(samples),
    }
    if max_staleness is not None:
        figures["too_old"] = sum(count for age, count in runs if age > max_staleness) / tokens
    return figures


def rollout_figures(samples: list[Sample]) -> dict[str, Any]:
    """Reward, success, lengths, how informative the groups were, and the means of what the task reports in its info."""
    if not samples:
        return {}
    rewards: dict[int, list[float]] = {}
    for s in samples:
        rewards.setdefault(s.group_id, []).append(s.reward)
    n = len(samples)
    read = [s.info["answer"] for s in samples if "answer" in s.info]
    said: dict[str, list[float]] = {}  # by those that have it: a reward may not apply to every row
    for s in samples:
        for name, value in s.info.items():
            if isinstance(value, float):
                said.setdefault(name, []).append(value)
    of_task = {f"task/{name}": sum(values) / len(values) for name, values in sorted(said.items())}
    return {
        "reward": sum(s.reward for s in samples) / n,
        "reward_spread": max(s.reward for s in samples) - min(s.reward for s in samples),
        "success": sum(s.success for s in samples) / n,
        "groups_without_spread": sum(max(r) == min(r) for r in rewards.values()) / len(rewards),
        "response_length": sum(sum(s.loss_mask) for s in samples) / n,
        "truncated": sum(s.finish_reason == "length" for s in samples) / n,
        "turns": sum(len(s.turns) for s in samples) / n,
        **({"no_answer": sum(answer is None for answer in read) / len(read)} if read else {}),
        **of_task,
    }

"""From a step's device sums and its samples to the figures of metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from amft_fast.interfaces import Sample
from amft_fast.model.policy import MAXES, SUMS


@dataclass
class StepFigures:
    """What one step measured: `record` for metrics.jsonl, the guard's counters, the probe (sums, clip coefficient) or None."""

    record: dict[str, Any]
    bad_in_row: int
    bad_total: int
    probe: tuple[list[float], float] | None


def read_step(
    sums: list[torch.Tensor],
    maxes: list[torch.Tensor],
    norms: list[torch.Tensor],
    guard: torch.Tensor,
    probe: tuple[torch.Tensor, torch.Tensor] | None,
    with_reference: bool,
    with_value: bool,
) -> StepFigures:
    """Means over the step's tokens, from device sums (one entry a minibatch): the one transfer of a step from the device."""
    n, m = len(SUMS), len(MAXES)
    parts = [
        torch.stack(sums).sum(0),
        torch.stack(maxes).amax(0),
        torch.stack(norms).double().mean()[None],
        guard.double(),
    ]
    if probe is not None:
        parts += [probe[0], probe[1].reshape(1)]
    values = torch.cat(parts).tolist()
    s, x = dict(zip(SUMS, values[:n])), dict(zip(MAXES, values[n : n + m]))
    grad_norm, bad_in_row, bad_total, *probed = values[n + m :]
    sft, rl = max(s["sft_tokens"], 1), max(s["rl_tokens"], 1)
    out: dict[str, Any] = {"loss": s["loss"] / len(sums), "grad_norm": grad_norm, "skipped_total": int(bad_total)}
    if s["sft_tokens"]:
        out["sft_loss"] = s["sft_nll"] / sft
    if s["rl_tokens"]:
        out |= {
            "pg_loss": s["pg"] / rl,
            "entropy": s["entropy"] / rl,
            "clip_fraction": s["clipped"] / rl,
            "approx_kl": s["approx_kl"] / rl,
            "ratio_mean": s["ratio"] / rl,
            "ratio_max": x["ratio_max"],
            "mismatch_mean": s["mismatch"] / rl,
            "mismatch_max": x["mismatch_max"],
            "mismatch_kl": s["mismatch_kl"] / rl,
            "mismatch_ess": s["is_weight"] ** 2 / max(s["is_weight_sq"] * rl, 1e-30),
        }
        if with_reference:
            out["ref_kl"] = s["kl"] / rl
        if with_value:
            out["value_loss"] = s["value_loss"] / rl
    seen = (probed[:-1], probed[-1]) if probe is not None else None
    return StepFigures(out, int(bad_in_row), int(bad_total), seen)


def rollout_figures(samples: list[Sample]) -> dict[str, Any]:
    """Reward, success, lengths, how informative the groups were, and the means of what the task reports in its info."""
    if not samples:
        return {}
    rewards: dict[int, list[float]] = {}
    for s in samples:
        rewards.setdefault(s.group_id, []).append(s.reward)
    n = len(samples)
    said = {name for s in samples for name, value in s.info.items() if isinstance(value, float)}
    of_task = {f"task/{name}": sum(s.info.get(name, 0.0) for s in samples) / n for name in sorted(said)}
    return {
        "reward": sum(s.reward for s in samples) / n,
        "success": sum(s.success for s in samples) / n,
        "groups_without_spread": sum(max(r) == min(r) for r in rewards.values()) / len(rewards),
        "response_length": sum(sum(s.loss_mask) for s in samples) / n,
        "truncated": sum(s.finish_reason == "length" for s in samples) / n,
        "turns": sum(len(s.turns) for s in samples) / n,
        **of_task,
    }

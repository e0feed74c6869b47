"""From the device sums of a step's updates to its figures."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from amft_fast.interfaces import UpdateEngine
from amft_fast.model.policy import MAXES, SUMS


class LeftOut(NamedTuple):
    """Rollouts that no update reads, for the figures that are means over all of them: how many trained tokens, the sum of
    their r_i, and the sum of their entropies as they were drawn."""

    tokens: int = 0
    weight: float = 0.0
    entropy: float = 0.0


class Update(NamedTuple):
    """What one optimizer update left on the device: `sums` and `maxes` in the order of SUMS and MAXES, the gradient's norm
    before clipping, and, of a probed one, the probe's sums and the clip coefficient. `left_out`: the rollouts of all ranks
    that reach no gradient, which the sums know nothing of. `router_load`: `Routing.end_update`'s, of a mixture of experts."""

    sums: torch.Tensor
    maxes: torch.Tensor
    norm: torch.Tensor
    probe: tuple[torch.Tensor, torch.Tensor] | None
    left_out: LeftOut = LeftOut()
    router_load: torch.Tensor | None = None


class Measured(NamedTuple):
    """What a step's updates measured: `record` for metrics.jsonl, the updates skipped in a row, the probe or None."""

    record: dict[str, Any]
    bad_in_row: int
    probe: tuple[list[float], float] | None


def read_updates(updates: list[Update], engine: UpdateEngine, with_reference: bool, with_value: bool) -> Measured:
    """Means over the step's tokens, of all ranks: the one transfer of a step from the device. Tells the engine how many of its
    updates were skipped, which it does not read back itself."""
    n, m, world = len(SUMS), len(MAXES), engine.world
    probe = next((u.probe for u in updates if u.probe is not None), None)
    parts = [
        torch.stack([world.sum(u.sums) for u in updates]).sum(0),
        torch.stack([world.max(u.maxes) for u in updates]).amax(0),
        torch.stack([u.norm for u in updates]).double().mean()[None],
        torch.stack([engine.bad_in_row, engine.bad_total]).double(),
    ]
    loads = [u.router_load for u in updates if u.router_load is not None]
    parts += [torch.stack(loads).amax(0, keepdim=True)] if loads else []
    if probe is not None:
        parts += [probe[0], probe[1].reshape(1)]
    values = torch.cat(parts).tolist()
    s, x = dict(zip(SUMS, values[:n])), dict(zip(MAXES, values[n : n + m]))
    grad_norm, bad_in_row, bad_total, *probed = values[n + m :]
    load = probed.pop(0) if loads else None
    sft, rl = max(s["sft_tokens"], 1), max(s["rl_tokens"], 1)
    out: dict[str, Any] = {"loss": s["loss"] / len(updates), "grad_norm": grad_norm, "skipped_total": int(bad_total)}
    if load is not None:
        out["router_load_max"] = load
    if s["router_aux"]:
        out["router_aux"] = s["router_aux"] / len(updates)
    if s["sft_tokens"]:
        out["sft_loss"] = s["sft_nll"] / sft
    if s["rl_tokens"]:
        tokens, weight, entropy = (sum(column) for column in zip(*(u.left_out for u in updates)))
        # Ratios, clipping and mismatch are those of the tokens that were read: a sample of all, where some were left out.
        out |= {
            "pg_loss": s["pg"] / max(s["rl_weight"] + weight, 1e-30),
            "entropy": (s["entropy"] + entropy) / (rl + tokens),
            "left_out": tokens / (rl + tokens),
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
            out["ref_kl"] = s["kl"] / max(s["rl_weight"], 1e-30)
        if with_value:
            out["value_loss"] = s["value_loss"] / rl
    seen = (probed[:-1], probed[-1]) if probe is not None else None
    engine.skipped = int(bad_total)
    return Measured(out, int(bad_in_row), seen)

"""The objective: SFT and RL sequences with the per-token weights that make

    L(θ; μ) = μ · L_SFT + (1 − μ) · L_RL
    L_SFT   = (1 / N_sft) Σ_{i ∈ demo tokens}    w_i · (−log π_θ(y_i))
    L_RL    = (1 / N_rl)  Σ_{i ∈ rollout tokens} [ PG_i − c_H · H_i + β · KL_i ]
    PG_i    = −IS_i · min( ρ_i A_i , clip(ρ_i, 1−ε_low, 1+ε_high) A_i ),     ρ_i = exp(log π_θ − log π_old)

one sum over tokens: the weights s_i = μ w_i / N_sft, r_i = (1−μ) / N_rl and e_i = (1−μ) c_H / N_rl are all known before the
forward pass, so SFT and RL rows ride in one call of the fused loss head. N_sft and N_rl are global counts of one update (all
micro-batches, all ranks): the loss does not depend on how the tokens are cut into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amft_fast import advantages as adv
from amft_fast.config import AdvantageConfig, ObjectiveConfig
from amft_fast.data.batch import TokenSequence
from amft_fast.interfaces import Sample


@dataclass(frozen=True)
class Counts:
    """Global token counts of one update: the denominators of the two components."""

    sft: int
    rl: int


def demo_sequence(
    prompt_ids: list[int],
    response_ids: list[int],
    loss_mask: list[int] | None = None,
    images: tuple[Any, ...] = (),
) -> TokenSequence:
    """A demonstration: the tokens of the response are imitated, all of them or those where `loss_mask` is 1."""
    ids = np.asarray(prompt_ids + response_ids, np.int64)
    trained = np.arange(len(ids)) >= len(prompt_ids)
    if loss_mask is not None:
        trained[len(prompt_ids) :] = np.asarray(loss_mask, bool)
    return TokenSequence(ids, trained, images=images)


def rollout_sequence(sample: Sample, temperature: float) -> TokenSequence:
    """A rollout: the policy's own tokens are trained on, the prompt's and the verifier's are not."""
    ids = np.asarray(sample.prompt_ids + sample.response_ids, np.int64)
    trained = np.zeros(len(ids), bool)
    trained[len(sample.prompt_ids) :] = np.asarray(sample.loss_mask, bool)
    behavior = np.zeros(len(ids))
    behavior[len(sample.prompt_ids) :] = sample.behavior_logprobs
    return TokenSequence(ids, trained, images=sample.images).with_fields(
        behavior_logprobs=behavior, temperature=temperature
    )


def count_tokens(sft: list[TokenSequence], rl: list[TokenSequence]) -> Counts:
    """Trained tokens of each component on this rank; sum over ranks before use."""
    return Counts(int(sum(s.trained.sum() for s in sft)), int(sum(s.trained.sum() for s in rl)))


def token_rewards(sample: Sample) -> np.ndarray:
    """Per-token rewards [T] of the response: each turn's reward on the last of the policy's tokens of it."""
    rewards = np.zeros(len(sample.response_ids))
    for turn in sample.turns:
        rewards[turn.end - 1] += turn.reward
    return rewards


def set_advantages(sequences: list[TokenSequence], samples: list[Sample], cfg: AdvantageConfig) -> None:
    """Gives every rollout its `advantages` field (and `returns` for gae, from the `values` that the value head left there).

    Needs whole groups: under several ranks it is called on all samples of the step.
    """
    if cfg.kind != "gae" and cfg.level == "turn":
        _set_turn_advantages(sequences, samples, cfg)
        return
    if cfg.kind != "gae":
        rewards = np.array([s.reward for s in samples])
        groups = np.array([s.group_id for s in samples])
        for seq, a in zip(sequences, adv.group_advantages(rewards, groups, cfg.kind)):
            seq.fields["advantages"] = np.full(len(seq.ids), a)
        return
    all_advantages, all_returns = [], []
    for seq, sample in zip(sequences, samples):
        own = seq.trained[len(sample.prompt_ids) :]
        values = seq.fields.pop("values")[seq.trained]
        a, r = adv.gae(token_rewards(sample)[own], values, cfg.gamma, cfg.lam)
        all_advantages.append(a)
        all_returns.append(r)
    for seq, a, r in zip(sequences, adv.normalise(all_advantages), all_returns):
        for name, value in (("advantages", a), ("returns", r)):
            seq.fields[name] = np.zeros(len(seq.ids))
            seq.fields[name][seq.trained] = value


def _set_turn_advantages(sequences: list[TokenSequence], samples: list[Sample], cfg: AdvantageConfig) -> None:
    """Every turn's advantage on the policy's tokens of it."""
    rewards = [np.array([t.reward for t in s.turns]) for s in samples]
    states = [[t.state for t in s.turns] for s in samples]
    groups = np.array([s.group_id for s in samples])
    per_turn = adv.turn_advantages(rewards, states, groups, cfg.kind, cfg.turn_gamma)
    for seq, sample, advantages in zip(sequences, samples, per_turn):
        lengths = np.diff([0, *(t.end for t in sample.turns)])
        seq.fields["advantages"] = np.zeros(len(seq.ids))
        seq.fields["advantages"][len(sample.prompt_ids) :] = np.repeat(advantages, lengths)


def weigh_sft(sequences: list[TokenSequence], mu: float, count: int) -> list[TokenSequence]:
    """SFT sequences with s_i = μ w_i / N_sft; a field `token_weight` w_i is used where a method set one."""
    return [s.with_fields(nll_weight=mu / max(count, 1) * s.fields.get("token_weight", 1.0)) for s in sequences]


def weigh_rl(
    sequences: list[TokenSequence], mu: float, count: int, objective: ObjectiveConfig, value_coef: float = 0.0
) -> list[TokenSequence]:
    """RL sequences with r_i = (1−μ) / N_rl, e_i = c_H r_i and, for gae, the value loss's weight."""
    r = (1 - mu) / max(count, 1)
    weights = {"pg_weight": r, "entropy_weight": r * objective.entropy_coef}
    if value_coef:
        weights["value_weight"] = r * value_coef
    return [s.with_fields(**weights) for s in sequences]

"""The objective: SFT and RL sequences with the per-token weights that make

    L(θ; μ) = μ · L_SFT + (1 − μ) · L_RL
    L_SFT   = (1 / N_sft) Σ_{i ∈ demo tokens}    w_i · (−log π_θ(y_i))
    L_RL    = (1 / N_rl)  Σ_{i ∈ rollout tokens} [ PG_i − c_H · H_i + β · KL_i ]
    PG_i    = −IS_i · min( ρ_i A_i , clip(ρ_i, 1−ε_low, 1+ε_high) A_i ),     ρ_i = exp(log π_θ − log π_old)

one sum over tokens: the weights s_i = μ w_i / N_sft, r_i = (1−μ) / N_rl and e_i = (1−μ) c_H / N_rl are all known before the
forward pass, so SFT and RL rows ride in one call of the fused loss head. N_sft and N_rl are global counts of one update (all
micro-batches, all ranks): the loss does not depend on how the tokens are cut into micro-batches.

PG is one of several (`objective.loss`: amft_kernels.loss_forms, losses.py), and L_RL a mean over tokens as above, over
sequences, each the mean of its tokens, or over sequences times a constant (`objective.denominator`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amft_fast import advantages as adv
from amft_fast import reward_terms
from amft_fast.config import AdvantageConfig, ObjectiveConfig
from amft_fast.data.batch import TokenSequence
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample
from amft_fast.model.figures import LeftOut


@dataclass(frozen=True)
class Counts:
    """Global counts of one update: the denominators of the two components."""

    sft: int  # tokens
    rl: int
    rl_sequences: int = 0


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


def rollout_sequence(sample: Sample, temperature: float, oldest: int | None = None) -> TokenSequence:
    """A rollout: the policy's own tokens are trained on, the prompt's and the verifier's are not.

    Those that weights older than version `oldest` have drawn are 0 in the field `fresh`: the policy gradient leaves them out.
    """
    ids = np.asarray(sample.prompt_ids + sample.response_ids, np.int64)
    trained = np.zeros(len(ids), bool)
    trained[len(sample.prompt_ids) :] = np.asarray(sample.loss_mask, bool)
    behavior = np.zeros(len(ids))
    behavior[len(sample.prompt_ids) :] = sample.behavior_logprobs
    # Of what was drawn: as the engine tells, else −log p of the tokens drawn, which is right on average.
    count = max(int(trained.sum()), 1)
    drawn = -behavior if sample.entropy is None else np.full(len(ids), sample.entropy / count)
    fields = {"behavior_logprobs": behavior, "temperature": temperature, "drawn_entropy": drawn}
    if oldest is not None:
        fields["fresh"] = np.ones(len(ids))
        versions, counts = zip(*sample.runs)
        fields["fresh"][np.flatnonzero(trained)] = np.repeat(versions, counts) >= oldest
    return TokenSequence(ids, trained, images=sample.images, experts=sample.experts).with_fields(**fields)


def count_tokens(sft: list[TokenSequence], rl: list[TokenSequence]) -> Counts:
    """Trained tokens, and sequences that have one, of each component; of all ranks where the lists are."""
    trained = [int(s.trained.sum()) for s in rl]
    return Counts(int(sum(s.trained.sum() for s in sft)), sum(trained), sum(n > 0 for n in trained))


def token_rewards(sample: Sample) -> np.ndarray:
    """Per-token rewards [T] of the response: each turn's reward on the last of the policy's tokens of it."""
    rewards = np.zeros(len(sample.response_ids))
    for turn in sample.turns:
        rewards[turn.end - 1] += turn.reward
    return rewards


def set_advantages(
    sequences: list[TokenSequence],
    samples: list[Sample],
    cfg: AdvantageConfig,
    max_new_tokens: int = 1,
    kl: tuple[float, str] = (0.0, "k1"),
) -> None:
    """Gives every rollout its `advantages` field (and `returns` for gae, from the `values` that the value head left there).

    Needs whole groups: under several ranks it is called on all samples of the step. `max_new_tokens` is what penalties
    of length are measured by; `kl` (coefficient, estimate) is taken off the reward, from the field `ref_logprobs`.
    """
    off = reward_terms.penalties(samples, cfg, max_new_tokens)
    divergences = [kl[0] * reward_terms.divergence(s, kl[1]) if kl[0] else np.zeros(s.trained.sum()) for s in sequences]
    if cfg.kind == "gae":
        _set_gae(sequences, samples, cfg, off, divergences)
        return
    off = off - [d.sum() for d in divergences]
    if cfg.level == "turn":
        _set_turn_advantages(sequences, samples, cfg, off)
        return
    groups = np.array([s.group_id for s in samples])
    lengths = np.array([sum(s.loss_mask) for s in samples])
    if cfg.kind == "distill":
        values = np.zeros(len(samples))
    elif cfg.rewards:
        rewards = {name: np.array([_named(s, name) for s in samples]) + off for name in cfg.rewards}
        values = adv.several(rewards, cfg.rewards, groups, cfg.kind, lengths)
    else:
        rewards = np.array([s.reward for s in samples]) + off
        values = adv.group_advantages(rewards, groups, cfg.kind, lengths)
    for seq, a in zip(sequences, values):
        seq.fields["advantages"] = np.full(len(seq.ids), a)


def add_teacher(sequences: list[TokenSequence], coef: float) -> None:
    """On-policy distillation: the advantage of each token gains coef · (log π_T − log π), the gradient of the reverse KL to the
    teacher. From the field `teacher_logprobs`, and the log-probs that the tokens were drawn with."""
    for s in sequences:
        drawn = "old_logprobs" if "old_logprobs" in s.fields else "behavior_logprobs"
        s.fields["advantages"] = (
            s.fields["advantages"] + coef * (s.fields["teacher_logprobs"] - s.fields[drawn]) * s.trained
        )


def _named(sample: Sample, name: str) -> float:
    """What the task reports of a sample under this name; a reward that does not apply to it earns nothing."""
    value = sample.info.get(name, 0.0)
    if not isinstance(value, int | float):
        raise UserError(f"advantage.rewards: the task reports {name!r} as {type(value).__name__}, not as a number")
    return float(value)


def _set_gae(
    sequences: list[TokenSequence],
    samples: list[Sample],
    cfg: AdvantageConfig,
    off: np.ndarray,
    divergences: list[np.ndarray],
) -> None:
    all_advantages, all_returns = [], []
    for seq, sample, penalty, kl in zip(sequences, samples, off, divergences):
        own = seq.trained[len(sample.prompt_ids) :]
        values = seq.fields.pop("values")[seq.trained]
        rewards = token_rewards(sample)[own] - kl
        if len(rewards):
            rewards[-1] += penalty
        a, r = adv.gae(rewards, values, cfg.gamma, cfg.lam)
        all_advantages.append(a)
        all_returns.append(r)
    for seq, a, r in zip(sequences, adv.normalise(all_advantages), all_returns):
        for name, value in (("advantages", a), ("returns", r)):
            seq.fields[name] = np.zeros(len(seq.ids))
            seq.fields[name][seq.trained] = value


def _set_turn_advantages(
    sequences: list[TokenSequence], samples: list[Sample], cfg: AdvantageConfig, off: np.ndarray
) -> None:
    """Every turn's advantage on the policy's tokens of it; penalties are the last turn's."""
    rewards = [np.array([t.reward for t in s.turns]) for s in samples]
    for turns, penalty in zip(rewards, off):
        turns[-1] += penalty
    states = [[t.state for t in s.turns] for s in samples]
    groups = np.array([s.group_id for s in samples])
    per_turn = adv.turn_advantages(rewards, states, groups, cfg.kind, cfg.turn_gamma)
    for seq, sample, advantages in zip(sequences, samples, per_turn):
        lengths = np.diff([0, *(t.end for t in sample.turns)])
        seq.fields["advantages"] = np.zeros(len(seq.ids))
        seq.fields["advantages"][len(sample.prompt_ids) :] = np.repeat(advantages, lengths)


def weigh_sft(sequences: list[TokenSequence], mu: float, count: int) -> list[TokenSequence]:
    """SFT sequences with s_i = μ w_i / N_sft, w_i a field `token_weight` where a method set one, else 1.

    A field `shape_weight` v_i adds μ v_i / N_sft as the weight of the shaped loss S(p) (`LossForm`), a field
    `entropy_bonus` that of the entropy.
    """
    return [s.with_fields(**_imitated(s, mu / max(count, 1))) for s in sequences]


def _imitated(s: TokenSequence, unit: float) -> dict[str, np.ndarray | float]:
    weights = {"nll_weight": unit * s.fields.get("token_weight", 1.0)}
    if "shape_weight" in s.fields:
        weights["shaped_weight"] = unit * s.fields["shape_weight"]
    if "entropy_bonus" in s.fields:
        weights["entropy_weight"] = unit * s.fields["entropy_bonus"]
    return weights


def is_demo(s: TokenSequence) -> bool:
    """Whether a sequence among the rollouts is a demonstration."""
    return "token_weight" in s.fields or "shape_weight" in s.fields


def weigh_rl(
    sequences: list[TokenSequence],
    weight: float,
    counts: Counts | int,
    objective: ObjectiveConfig,
    value_coef: float = 0.0,
    max_new_tokens: int = 1,
    entropy_coef: float | None = None,
) -> list[TokenSequence]:
    """RL sequences with r_i = weight / N_rl (or another denominator's), e_i = c_H r_i and, for gae, the value loss's weight.

    `weight` is 1 − μ, of L_RL as a whole. `counts` may be N_rl alone, with the denominator `token`. A sequence with a
    field `token_weight` or `shape_weight` is a demonstration among the rollouts: it enters as `weigh_sft` has it, by
    the same denominator. `entropy_coef`: in place of the objective's. Tokens whose field `fresh` is 0 count in
    the denominator and have no weight in the policy gradient.
    """
    counts = counts if isinstance(counts, Counts) else Counts(0, counts, len(sequences))
    coef = objective.entropy_coef if entropy_coef is None else entropy_coef
    out = []
    for s in sequences:
        if objective.denominator == "token":
            size = counts.rl
        else:
            size = counts.rl_sequences * (s.trained.sum() if objective.denominator == "sequence" else max_new_tokens)
        r = weight / max(size, 1)
        if is_demo(s):
            out.append(s.with_fields(**_imitated(s, r)))
            continue
        weights = {"pg_weight": r * s.fields.get("fresh", 1.0), "entropy_weight": r * coef}
        if value_coef:
            weights["value_weight"] = r * value_coef
        out.append(s.with_fields(**weights))
    return out


def leave_out_flat(sequences: list[TokenSequence], objective: ObjectiveConfig) -> tuple[list[TokenSequence], LeftOut]:
    """Weighed RL sequences without those that reach no gradient: advantage 0 on every token (all answers of a group got one
    reward), and no entropy, KL, value or imitation term on any. What is left gives the same gradient. One sequence always
    stays: an engine wants something to do."""
    if objective.ratio_penalty or ":" in objective.loss:  # these move the policy at advantage 0 as well
        return sequences, LeftOut()
    flat = [_is_flat(s) for s in sequences]
    if sequences and all(flat):
        flat[min(range(len(sequences)), key=lambda i: len(sequences[i].ids))] = False
    gone = [s for s, yes in zip(sequences, flat) if yes]
    tokens = sum(int(s.trained.sum()) for s in gone)
    weight, entropy = (sum(float(s.fields[n][s.trained].sum()) for s in gone) for n in ("pg_weight", "drawn_entropy"))
    return [s for s, yes in zip(sequences, flat) if not yes], LeftOut(tokens, weight, entropy)


def _is_flat(s: TokenSequence) -> bool:
    if is_demo(s) or "ref_logprobs" in s.fields:
        return False
    zero = ("advantages", "entropy_weight", "value_weight")
    return not any(s.fields[name][s.trained].any() for name in zero if name in s.fields)

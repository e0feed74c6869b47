"""Losses that need a statistic of the sequence or the batch before the head is called, as coefficients c of −c · ∇log π.

Once the policy's present log-probs are known (a forward pass; none on the first update after a rollout, where they are the old
ones), each of these is a constant per token, and takes the place of its advantage: the loss head then needs no ratio. With
w = π/π_old, sums over a sequence of T tokens, and A its advantage:

    gspo      c = A s,  s = exp(mean log w);  0 where the clip of s acts                        (arXiv 2507.18071)
    gmpo      c = A exp(mean log w'),  log w' clipped to ±gmpo_clip on the side A moves to; 0 on tokens where it acts
                                                                                                (arXiv 2507.20673)
    vespo     c = A exp(λ + k log W − λ W),  W = exp(Σ log w);  (k, λ) by the sign of A         (arXiv 2602.10693)
    kl_cov    c = A w − β sign(log w) on the share of tokens of highest covariance, else A w    (arXiv 2505.22617)
    clip_cov  as grpo; a share of the tokens, drawn by lot from those whose covariance lies in bounds, is left out (the same)

The covariance of a token is (log π − its mean)(A − its mean), means over the update's tokens. On the first update W = s
= 1, and all of them are A but for clip_cov.

Beside these what leaves tokens or whole sequences out, or weighs them, whatever the loss: importance weights between
trainer and rollout engine by sequence, sequence masks, and the share of tokens of highest entropy. They are factors of
the advantage.
"""

from __future__ import annotations

import numpy as np

from amft_fast.config import ObjectiveConfig
from amft_fast.data.batch import TokenSequence
from amft_fast.data.stream import sample_seed

LIMIT = 20.0  # of log-ratios, as in the loss head


def fold(sequences: list[TokenSequence], o: ObjectiveConfig, seed: tuple[object, ...] = ()) -> list[TokenSequence]:
    """The sequences with `advantages` that stand for all of the above.

    Each has the fields advantages, behavior_logprobs and, where they are asked for, `present_logprobs` and `present_entropy`;
    old_logprobs where the policy has moved since. All sequences of the update, of all ranks: batches have statistics.
    `seed` decides the lots. Sequences without a trained token go.
    """
    if not (o.reads_entropy or o.reads_logprobs):
        return sequences
    sequences = [s for s in sequences if s.trained.any()]
    if not sequences:
        return []
    tokens = [_Tokens(s) for s in sequences]
    weights = [_correction(t, o) * _mask(t, o) for t in tokens]
    coefficients = [_coefficients(t, o) for t in tokens]
    if o.loss == "kl_cov":
        chosen = highest(_covariances(tokens), o.cov_share or 2e-3)
        coefficients = [c - o.kl_cov_coef * np.sign(t.log_ratio) * k for c, t, k in zip(coefficients, tokens, chosen)]
    if o.loss == "clip_cov":
        left_out = _by_lot(_covariances(tokens), o.clip_cov_bounds, o.cov_share or 2e-4, seed)
        coefficients = [c * ~k for c, k in zip(coefficients, left_out)]
    if o.reads_entropy:
        chosen = highest([s.fields["present_entropy"][s.trained] for s in sequences], o.entropy_share)
        coefficients = [c * k for c, k in zip(coefficients, chosen)]
    return [_with_advantages(s, c * w) for s, c, w in zip(sequences, coefficients, weights)]


class _Tokens:
    """The trained tokens of a sequence, each [T]."""

    def __init__(self, s: TokenSequence) -> None:
        def of(name: str, default: np.ndarray | None = None) -> np.ndarray:
            return s.fields[name][s.trained] if name in s.fields else default

        self.advantages, self.behavior = of("advantages"), of("behavior_logprobs")
        self.present = of("present_logprobs", of("old_logprobs", self.behavior))
        self.old = of("old_logprobs", self.present)
        self.log_ratio = np.clip(self.present - self.old, -LIMIT, LIMIT)
        self.moved = "old_logprobs" in s.fields


def _coefficients(t: _Tokens, o: ObjectiveConfig) -> np.ndarray:
    """c of the losses of one sequence; the advantage itself of all others."""
    a = t.advantages
    if not t.moved:
        return a
    if o.loss == "gspo":
        s = np.exp(t.log_ratio.mean())
        clipped = np.where(a >= 0, s > 1 + o.clip_high, s < 1 - o.clip_low)
        return a * s * ~clipped
    if o.loss == "gmpo":
        clipped = np.where(a >= 0, t.log_ratio > o.gmpo_clip, t.log_ratio < -o.gmpo_clip)
        log_ratio = np.where(clipped, np.sign(a) * o.gmpo_clip, t.log_ratio)
        return a * np.exp(log_ratio.mean()) * ~clipped
    if o.loss == "vespo":
        log_w = np.clip(t.log_ratio.sum(), np.log(1e-8), LIMIT)
        phi = [np.exp(lam + k * log_w - lam * np.exp(log_w)) for k, lam in (o.vespo_positive, o.vespo_negative)]
        return a * np.where(a >= 0, *phi)
    if o.loss == "kl_cov":
        return a * np.exp(t.log_ratio)
    return a


def _correction(t: _Tokens, o: ObjectiveConfig) -> np.ndarray | float:
    """What the head does not correct for by itself: by sequence, and by token where it is given no old log-probs."""
    if not o.corrects or (o.correction_level == "token" and not (o.whole and o.loss != "clip_cov" and t.moved)):
        return 1.0
    log_weight = t.old - t.behavior
    if o.correction_level == "sequence":
        log_weight = np.full_like(log_weight, log_weight.sum())
    weight = np.exp(np.clip(log_weight, -LIMIT, LIMIT))
    if o.correction == "tis":
        weight = np.minimum(weight, o.tis_cap)
    else:
        low, high = o.icepop_bounds if o.correction == "icepop" else (0.0, o.tis_cap)
        weight = weight * ((weight >= low) & (weight <= high))
    # The loss of a whole sequence stands on each of its tokens, and so does their mean weight on its gradient.
    return np.full_like(weight, weight.mean()) if o.loss in ("gspo", "gmpo") else weight


def _mask(t: _Tokens, o: ObjectiveConfig) -> np.ndarray | float:
    """1 where a sequence is kept, else 0."""
    keep: np.ndarray | float = 1.0
    behind = (t.behavior - t.present).mean()  # of the sampler's log-prob: how much likelier the sequence was
    if o.sequence_ratio_bounds is not None:
        low, high = o.sequence_ratio_bounds
        keep = float(low <= np.exp(np.clip(-behind, -LIMIT, LIMIT)) <= high)
    if o.sequence_kl_max is not None:
        keep = keep * ((t.advantages >= 0) | (behind <= o.sequence_kl_max))
    return keep


def _covariances(tokens: list[_Tokens]) -> list[np.ndarray]:
    logp, a = (np.concatenate([getattr(t, name) for t in tokens]) for name in ("present", "advantages"))
    return [(t.present - logp.mean()) * (t.advantages - a.mean()) for t in tokens]


def highest(values: list[np.ndarray], share: float) -> list[np.ndarray]:
    """Which elements are among the `share` of largest values of all (at least one is, and all ties of the smallest are)."""
    flat = np.sort(np.concatenate(values))
    threshold = flat[-max(1, int(np.floor(share * len(flat) + 1e-9)))]
    return [v >= threshold for v in values]


def _by_lot(
    values: list[np.ndarray], bounds: tuple[float, float], share: float, seed: tuple[object, ...]
) -> list[np.ndarray]:
    """A share of all elements (at least one), drawn from those inside the bounds."""
    flat = np.concatenate(values)
    inside = np.flatnonzero((flat > bounds[0]) & (flat < bounds[1]))
    count = min(max(1, int(share * len(flat))), len(inside))
    lots = np.random.default_rng(sample_seed(*seed, "clip_cov"))
    chosen = np.zeros(len(flat), bool)
    chosen[lots.choice(inside, count, replace=False)] = True
    return np.split(chosen, np.cumsum([len(v) for v in values])[:-1])


def _with_advantages(s: TokenSequence, advantages: np.ndarray) -> TokenSequence:
    full = np.zeros(len(s.ids))
    full[s.trained] = advantages
    return s.with_fields(advantages=full)


class EntropyBonus:
    """c_H, the weight of the entropy bonus: fixed, or steered to `entropy_target` a step at a time (arXiv 2505.22312)."""

    def __init__(self, o: ObjectiveConfig) -> None:
        self.o, self.coef = o, o.entropy_coef

    def observe(self, entropy: float | None) -> None:
        """What a step measured: the mean entropy of its rollouts."""
        target = self.o.entropy_target
        if target is not None and entropy is not None and np.isfinite(entropy):
            step = self.o.entropy_step if entropy < target else -self.o.entropy_step
            self.coef = min(max(self.coef + step, 0.0), self.o.entropy_coef_max)

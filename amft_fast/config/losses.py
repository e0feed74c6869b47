"""The policy gradient and its advantages."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import File, Section

# The head knows the first from a token's log-prob alone; the second need a statistic of the sequence or batch first
# (losses.py).
TOKEN_LOSSES = ("grpo", "cispo", "sapo", "dppo", "dro")


WHOLE_LOSSES = ("gspo", "gmpo", "vespo", "clip_cov", "kl_cov")


Pair = tuple[float, float]


class ObjectiveConfig(Section):
    """The loss of the exploration part; its maths is in objective.py and losses.py."""

    loss: File = "grpo"
    """The policy gradient: grpo (clipped), cispo, sapo, dppo, dro; by sequence gspo, gmpo, vespo; by the batch's covariance of
    log-prob and advantage clip_cov, kl_cov; or a function of one's own, FILE.py:NAME or MODULE:NAME. docs/methods.md."""
    denominator: Literal["token", "sequence", "constant"] = "token"
    """What L_RL is a mean over. token: all tokens of the update; sequence: sequences, each the mean of its tokens (GRPO, GSPO,
    SAPO); constant: sequences times rollout.max_new_tokens (Dr.GRPO)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range: the ratio is held above 1 - clip_low (grpo, clip_cov; gspo: the sequence's)."""
    clip_high: float = Field(0.2, gt=0)
    """Upper clip range: the ratio is held below 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of tokens with a negative advantage, as a multiple of it (grpo, clip_cov)."""
    ratio_cap: float | None = Field(None, gt=0)
    """Cap of the ratio as a constant weight; default: 5 for cispo, 20 for dppo."""
    sapo_tau_positive: float = Field(1.0, gt=0)
    """Temperature of sapo's gate for positive advantages."""
    sapo_tau_negative: float = Field(1.05, gt=0)
    """The same for all others."""
    dppo_bound: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability may have moved with the advantage's sign before dppo drops it."""
    ratio_penalty: float = Field(0.0, ge=0)
    """Weight of log(ratio)^2 / 2, added to any loss: dro's regulariser."""
    gmpo_clip: float = Field(0.4, gt=0)
    """gmpo: clip range of a token's log-ratio."""
    vespo_positive: Pair = (2.0, 3.0)
    """vespo: k and lambda of the weight exp(lambda + k log w - lambda w) for advantages of 0 and more."""
    vespo_negative: Pair = (3.0, 2.0)
    """The same for negative advantages."""
    cov_share: float | None = Field(None, gt=0, le=1)
    """Share of the tokens that clip_cov leaves out (default 2e-4), or that kl_cov holds back (default 2e-3)."""
    clip_cov_bounds: Pair = (1.0, 5.0)
    """clip_cov: covariances between which tokens are drawn by lot."""
    kl_cov_coef: float = Field(1.0, ge=0)
    """kl_cov: weight of |log ratio| on the tokens of highest covariance."""
    entropy_share: float = Field(1.0, gt=0, le=1)
    """Share of an update's tokens, those of highest entropy, that the policy gradient acts on (0.2 in arXiv
    2506.01939); costs a forward pass."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus in L_RL. Where no answer earns anything, the bonus alone drives the policy."""
    entropy_target: float | None = Field(None, ge=0)
    """Entropy in nats per token that the weight of the bonus is steered to, from entropy_coef on: up a step below it, down one
    above it."""
    entropy_step: float = Field(1e-3, gt=0)
    """The step of entropy_target."""
    entropy_coef_max: float = Field(0.1, gt=0)
    """Largest weight that entropy_target may reach."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the estimate of KL(policy || reference); the reference is the policy after the warm-up."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """The estimate: k1 -d, k2 d^2 / 2, k3 exp(d) - d - 1, with d = log-prob of the reference less the policy's. As a
    loss k1 has a gradient of mean 0 and k2 that of the KL."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it is counted: as a term of the loss, or off the reward of a sample (gae: of each token)."""
    tis_cap: float | None = Field(None, ge=0)
    """Cap of the importance weight between trainer and rollout engine; 0: off; default: 2 with vLLM, off with
    the transformers engine, whose log-probs are the trainer's."""
    correction: Literal["tis", "mis", "icepop"] = "tis"
    """What that weight does. tis: it is held at tis_cap; mis: it counts 0 above tis_cap; icepop: 0 outside icepop_bounds."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether it is a token's, or the product over a sequence."""
    icepop_bounds: Pair = (0.5, 5.0)
    """Outside them icepop leaves a token, or a sequence, out."""
    sequence_ratio_bounds: Pair | None = None
    """Leave out sequences whose geometric mean of policy over sampler is outside these bounds."""
    sequence_kl_max: float | None = Field(None, ge=0)
    """Leave out sequences of negative advantage on which the sampler's log-prob exceeds the policy's by more than this on the
    mean (DeepSeek-V3.2)."""
    max_staleness: int | None = Field(None, ge=0)
    """Steps of age from above which a token has no weight in the policy gradient (it counts in the denominator); below
    rollout.async_steps. Default: all tokens that are drawn ahead have theirs."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if ":" not in self.loss and self.loss not in TOKEN_LOSSES + WHOLE_LOSSES:
            known = TOKEN_LOSSES + WHOLE_LOSSES
            close = difflib.get_close_matches(self.loss, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"those are {', '.join(known)}"
            raise ValueError(f"loss must be a known one, FILE.py:NAME or MODULE:NAME, got {self.loss!r}; {hint}")
        for name in ("vespo_positive", "vespo_negative"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be k > 0 and lambda > 0, got {list(getattr(self, name))}")
        for name in ("icepop_bounds", "sequence_ratio_bounds", "clip_cov_bounds"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name} must be the lower and the upper bound, got {list(bounds)}")
        return self

    @property
    def whole(self) -> bool:
        """Whether the loss is one of whole sequences or of the batch."""
        return self.loss in WHOLE_LOSSES

    @property
    def reads_entropy(self) -> bool:
        """Whether the loss asks for the entropy of each token, at the present weights."""
        return self.entropy_share < 1

    @property
    def reads_logprobs(self) -> bool:
        """Whether the loss asks for the present log-probs of whole sequences."""
        masks = self.sequence_ratio_bounds is not None or self.sequence_kl_max is not None
        return self.whole or masks or (self.corrects and self.correction_level == "sequence")

    @property
    def corrects(self) -> bool:
        """Whether what the rollout engine drew is corrected for."""
        return bool(self.tis_cap) or self.correction == "icepop"


GROUP_KINDS = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce++_baseline", "maxrl")  # the baseline is the group's


class AdvantageConfig(Section):
    """How rewards become advantages; see advantages.py."""

    kind: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce++", "opo", "gpg", "reinforce++_baseline", "maxrl", "gae", "distill"
    ] = "grpo"
    """The estimator; distill: none, a token's advantage is the teacher's alone."""
    teacher: File = ""
    """A transformers model, folder or hub name, with the policy's tokenizer, for on-policy distillation: its log-prob less the
    policy's is added to each token's advantage."""
    teacher_coef: float = Field(1.0, gt=0)
    """Weight of what the teacher adds."""
    rewards: dict[str, float] = {}
    """Rewards that are normalised one by one (by kind, in their group) and added up with these weights, then brought to the
    batch's spread (GDPO): names of what a task reports of a sample. Default: the one reward of the task."""
    level: Literal["trajectory", "turn"] = "trajectory"
    """What a turn's tokens are credited with, in tasks of several turns. trajectory: the sample's whole reward; turn: the
    reward from that turn on, compared with the group's turns in the same state. gae credits tokens by itself."""
    turn_gamma: float = Field(1.0, ge=0, le=1)
    """Discount per turn of the rewards of later turns (level turn); 0 credits a turn with its own reward alone."""
    truncated: Literal["kept", "masked"] = "kept"
    """What becomes of answers that were cut at rollout.max_new_tokens. masked: no token of them is trained on; their rewards
    count in their group all the same."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before rollout.max_new_tokens over which the reward falls by overlong_penalty (DAPO); 0: off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What an answer of rollout.max_new_tokens loses by overlong_buffer."""
    length_penalty: float = Field(0.0, ge=0)
    """What an answer of rollout.max_new_tokens loses where the whole group is right; in proportion to length and to the
    group's share of right answers (at least one of them)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token (gae)."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of the generalised advantage estimate (gae)."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss in L_RL (gae)."""
    value_lr: float = Field(5e-6, gt=0)
    """Learning rate of the value head (gae)."""

    @model_validator(mode="after")
    def _check(self) -> AdvantageConfig:
        by_turn = ("grpo", "dr_grpo", "rloo", "reinforce++", "gae")
        if self.level == "turn" and self.kind not in by_turn:
            raise ValueError(f"level turn is there for kind {', '.join(by_turn[:-1])}, got {self.kind!r}")
        if self.kind == "distill" and not self.teacher:
            raise ValueError("kind distill needs a teacher, got none")
        if self.kind == "gae" and self.teacher:
            raise ValueError("teacher adds to advantages by answer: kind must not be gae")
        if self.rewards and (self.kind == "gae" or self.level == "turn"):
            raise ValueError("rewards are normalised by sample: kind must not be gae, nor level turn")
        return self

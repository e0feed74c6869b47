"""The loop, how imitation and exploration are mixed, and what learns it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import Rows, Section
from amft_fast.config.losses import Pair
from amft_fast.methods import METHODS


class TrainConfig(Section):
    """The method and the size of a step."""

    method: Literal[tuple(METHODS)] = "amft"
    """amft learns mu; fixed, linear, cosine and chord_mu are schedules of mu; sft, rl and sft_then_rl are what they
    say; the rest mixes in ways of its own: docs/methods.md."""
    steps: int = Field(200, ge=1, le=10**9)
    """Steps after the warm-up. A step draws rollouts once and makes `minibatches_per_rollout` updates."""
    token_budget: int | None = Field(None, ge=1)
    """End after so many tokens instead of `steps`: tokens sampled plus tokens trained on, the controller's own included.
    Schedules and evaluations are then spread over the budget as they are over `steps` otherwise."""
    warmup_steps: int = Field(0, ge=0, le=10**9)
    """Updates on demonstrations alone before the first step; the entropy target is measured after them."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of the policy."""
    sft_lr: float | None = Field(None, gt=0)
    """Learning rate of updates that only imitate: the warm-up, method sft, first stage of sft_then_rl. Default: lr."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over the steps after its warm-up, down to a tenth of the peak."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0; they begin again where the optimizer's state is back to nothing."""
    sft_share: float = Field(0.3, gt=0, lt=1)
    """Share of the steps that sft_then_rl spends on demonstrations."""
    sft_stop: Literal["share", "saturation"] = "share"
    """When sft_then_rl turns to RL. share: after sft_share; saturation: once the loss of held-out demonstrations has stopped
    falling, at the latest after sft_share."""
    sft_check_every: int = Field(10, ge=1)
    """Steps between looks at that loss, on at most meta.prompts demonstrations of the split val."""
    sft_patience: int = Field(3, ge=1)
    """Looks in a row without gain after which it has stopped."""
    sft_tolerance: float = Field(0.005, ge=0, lt=1)
    """Share of the best loss so far by which a look must be under it to be a gain."""
    prompts_per_step: Rows = 64
    """Prompts per rollout; each is answered rollout.num_generations times."""
    demos_per_step: Rows = 64
    """Demonstrations per step, shared out over the minibatches."""
    minibatches_per_rollout: Rows = 1
    """Optimizer updates per rollout. With 1 the ratio is 1 and the clip never acts."""
    micro_batch_tokens: int = Field(16384, ge=1, le=2**31 - 1)
    """Bound on the tokens (padding included) of one forward pass; changes memory and speed, never the result."""
    packing: bool | None = None
    """Pack sequences into rows without padding, a prompt's answers sharing its tokens; default: where attention allows it."""
    skip_flat: bool = True
    """Leave rollouts that reach no gradient (a group's rewards are all equal) out of the update; changes speed, never the
    gradient."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the policy."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices (not on norms and biases)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping by global norm."""
    data_workers: int = Field(2, ge=0, le=256)
    """Threads that read and tokenise the next step's demonstrations while a step runs; 0: none."""
    max_bad_steps: int = Field(5, ge=1)
    """Stop, with the state saved, after so many updates in a row whose loss or gradient was not finite."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for name in ("prompts_per_step", "demos_per_step"):
            if getattr(self, name) % self.minibatches_per_rollout:
                raise ValueError(
                    f"{name} must be divisible by minibatches_per_rollout, "
                    f"got {getattr(self, name)} and {self.minibatches_per_rollout}"
                )
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas must lie in [0, 1), got {list(self.adam_betas)}")
        return self


class MixtureConfig(Section):
    """Constants of the methods that mix imitation and exploration in ways of their own; see mixtures/ and docs/methods.md."""

    demo_reward: float = 1.0
    """What a demonstration in its prompt's group counts as having earned (luffy, srft)."""
    luffy_gamma: float = Field(0.1, gt=0)
    """gamma of the weight p / (p + gamma) of a demonstration's tokens (luffy, srft)."""
    srft_demo: float = Field(0.5, ge=0)
    """Weight of a demonstration, times exp(-entropy) (srft)."""
    srft_rollout: float = Field(0.1, ge=0)
    """Weight of a right rollout, times exp(entropy) (srft)."""
    chord_mu: Pair = (0.9, 0.05)
    """First and last mu of chord_mu."""
    chord_steps: int = Field(200, ge=1)
    """Steps over which chord_mu falls; then it is held."""
    chord_phi_mu: float = Field(0.1, gt=0, lt=1)
    """mu of chord_phi."""
    hpt_gate: int = Field(0, ge=0)
    """Right answers up to which a prompt is imitated and not explored (hpt; 2 for Llama in the paper)."""
    hpt_demo_weight: float = Field(1.0, gt=0)
    """Weight of imitation there (hpt; 0.3 for a model of 1.5 B in the paper)."""
    relift_buffer: int = Field(128, ge=1)
    """Unsolved prompts that make an update on their demonstrations (relift)."""
    relift_entropy: float = Field(0.001, ge=0)
    """Weight of the entropy bonus in that update (relift)."""
    uft_pieces: int = Field(5, ge=1, le=1000)
    """Pieces of a demonstration, the first of which are the hint (uft)."""
    uft_probability: Pair = (0.95, 0.05)
    """Chance of each piece, at the start and when hints end (uft)."""
    uft_share: float = Field(0.6, gt=0, le=1)
    """Share of the run with hints (uft)."""
    uft_hint_weight: float = Field(0.001, ge=0)
    """Weight of the hint's likelihood (uft)."""
    prefix_share: Pair = (0.95, 0.05)
    """Share of the demonstration that is the prefix, at the start and the end (prefix_rft)."""
    prefix_entropy_share: float = Field(0.2, gt=0, le=1)
    """Share of a prefix's tokens, those of highest entropy, that are trained on (prefix_rft)."""
    gac_every: int = Field(5, ge=1)
    """Steps between measurements of the gradients' noise (gac): each costs the backward pass of a step."""
    gac_memory: float = Field(0.8, ge=0, lt=1)
    """Decay per measurement of what was measured before (gac)."""
    gac_max_step: float = Field(0.1, gt=0, le=1)
    """Bound on mu's move at a measurement (gac)."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        for name in ("chord_mu", "uft_probability", "prefix_share"):
            if not all(0 <= x <= 1 for x in getattr(self, name)):
                raise ValueError(f"{name} must lie in [0, 1], got {list(getattr(self, name))}")
        return self


class ControllerConfig(Section):
    """The mixing weight mu of L = mu L_SFT + (1 - mu) L_RL, and how it is learned; see controller.py."""

    mu_init: float = Field(0.5, gt=0, lt=1)
    """Where mu starts; method `fixed` holds it there."""
    mu_min: float = Field(0.02, gt=0, lt=1)
    """Lower bound of a learned mu."""
    mu_max: float = Field(0.98, gt=0, lt=1)
    """Upper bound of a learned mu."""
    schedule_start: float = Field(0.9, ge=0, le=1)
    """First mu of the methods linear and cosine."""
    schedule_end: float = Field(0.1, ge=0, le=1)
    """Last mu of the methods linear and cosine."""
    signal: Literal["blocks", "lot", "balanced", "cosine", "rms", "raw", "random"] = "blocks"
    """How mu is learned. blocks: 1 as long as imitation shows on held-out prompts, then 0 (controller/blocks.py); lot: a
    control that decides by lot at the same moments. The others move mu by the probe's dot-products over windows
    (controller/windows.py); random is a control with the sign of balanced drawn by lot."""
    imitation_share: float = Field(0.06, gt=0, le=1)
    """Share of the run's compute of the first block of imitation (blocks)."""
    confidence: float = Field(2.0, ge=0)
    """Standard errors by which the first block of imitation must have raised held-out rewards and the likelihood of held-out
    demonstrations, taken together, to stay; by which they must have fallen for a later one to be taken back; and rewards for
    one of exploring (blocks)."""
    look_prompts: int | None = Field(None, ge=2, le=2**20)
    """Held-out prompts of a look, with `meta.num_generations` answers each (blocks); default: twice `train.prompts_per_step`,
    between 32 and 64."""
    look_demos: int | None = Field(None, ge=8, le=2**20)
    """Held-out demonstrations whose likelihood a look reads (blocks), where the task has some; default: eight times
    `train.prompts_per_step`, between 32 and 256."""
    min_alive: float = Field(0.1, ge=0, le=1)
    """Share of the held-out prompts whose answers earned differently, or are all right, under which nothing is explored
    (blocks)."""
    solved: float = Field(0.9, ge=0, le=1)
    """Share of right answers over which imitation that has shown before goes on (blocks)."""
    space: Literal["mu", "logit"] = "logit"
    """Whether steps are taken in mu itself or in its logit."""
    window: int = Field(5, ge=1)
    """Steps over which the signal is averaged before mu moves once; one utility gradient serves them all."""
    start_step: int = Field(0, ge=0)
    """Steps after the warm-up before the first window."""
    eta_mu: float = Field(15.0, ge=0)
    """Gain from the signal to mu (or its logit)."""
    max_step: float = Field(0.7, gt=0)
    """Bound on the signal's part of one move."""
    eta_entropy: float = Field(0.2, ge=0)
    """Gain from the entropy's shortfall H* - H (nats per token) to mu (or its logit)."""
    snr_gate: float = Field(1.5, ge=0)
    """Signal-to-noise ratio under which the signal moves nothing: its step is scaled by max(0, 1 - (snr_gate / SNR)^2).
    0: no gate."""
    noise_memory: float = Field(0.7, ge=0, lt=1)
    """Decay per window of the running estimate of the signal's standard error."""

    @model_validator(mode="after")
    def _check(self) -> ControllerConfig:
        if not self.mu_min < self.mu_max:
            raise ValueError(f"mu_min must be below mu_max, got {self.mu_min} and {self.mu_max}")
        return self


class MetaConfig(Section):
    """The utility gradient, whose products with the two gradients tell mu where to go; see meta_gradient.py."""

    utility: Literal["reward", "nll", "hybrid"] = "reward"
    """reward: policy gradient on rollouts of held-out prompts; nll: likelihood of held-out demonstrations; hybrid: reward,
    and the demonstration where no rollout of a prompt succeeds."""
    prompts: int = Field(128, ge=2, le=2**20)
    """Validation prompts that the utility is taken on."""
    num_generations: int = Field(8, ge=2, le=2**20)
    """Rollouts per validation prompt."""
    refresh_share: float = Field(0.125, gt=0, le=1)
    """Share of the cached rollouts redrawn for each new utility gradient, oldest first; 1: all of them."""
    memory: float = Field(0.8, ge=0, lt=1)
    """Decay of the utility gradient from window to window. 0: taken anew on the whole cache, with importance weights. Above 0
    only the groups just drawn enter, and the past lives on as an exponential average: much cheaper, somewhat staler."""
    min_ess: float = Field(0.3, ge=0, le=1)
    """Relative effective sample size of the cache's importance weights under which it is redrawn whole."""
    is_cap: float = Field(2.0, gt=0)
    """Cap of the token-level importance weights of cached rollouts."""
    demo_weight: float = Field(1.0, gt=0)
    """Weight of a demonstration against a rollout group in the hybrid utility."""
    precondition: Literal["auto", "none", "plain", "exact"] = "auto"
    """The optimizer's Jacobian in the signals raw and rms: none (SGD), AdamW's plain or exact diagonal; auto: by optimizer."""

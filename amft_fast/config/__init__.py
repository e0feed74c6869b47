"""The typed configuration: one TOML file, overridden by dotted flags (`--controller.mu_init 0.7`). Imports no torch.

Every section is a pydantic model that refuses unknown keys; the text under a field is its help. The sections are in the files
of this room, what must hold between them is here. config_file.py turns a file and flags into a `Config`.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from amft_fast.config.kinds import (
    FILE,
    MAX_FLOAT,
    MAX_INT,
    File,
    FilePath,
    Rows,
    Seconds,
    Section,
    Seed,
    Temperature,
    Tokens,
    check_shares,
    check_text,
    clean_path,
)
from amft_fast.config.losses import GROUP_KINDS, TOKEN_LOSSES, WHOLE_LOSSES, AdvantageConfig, ObjectiveConfig, Pair
from amft_fast.config.model import EngineConfig, LoraConfig, ModelConfig
from amft_fast.config.record import TRACKERS, CheckpointConfig, EvalConfig, LogConfig, ProfileConfig, RunConfig
from amft_fast.config.rollouts import RolloutConfig, VllmConfig
from amft_fast.config.tasks import (
    MAX_TARGET,
    PLUG_INS,
    SHIPPED,
    DataConfig,
    GeneralPointsConfig,
    GymConfig,
    MathConfig,
    TaskConfig,
    VerifiersConfig,
    VirlConfig,
)
from amft_fast.config.training import ControllerConfig, MetaConfig, MixtureConfig, TrainConfig
from amft_fast.methods import METHODS

# fmt: off
__all__ = [
    "FILE", "GROUP_KINDS", "MAX_FLOAT", "MAX_INT", "MAX_TARGET", "PLUG_INS", "SHIPPED", "TOKEN_LOSSES", "TRACKERS",
    "WHOLE_LOSSES", "AdvantageConfig", "CheckpointConfig", "Config", "ControllerConfig", "DataConfig",
    "EngineConfig", "EvalConfig", "File", "FilePath", "GeneralPointsConfig", "GymConfig", "LogConfig", "LoraConfig",
    "MathConfig", "MetaConfig", "MixtureConfig", "ModelConfig", "ObjectiveConfig", "Pair", "ProfileConfig",
    "RolloutConfig", "Rows", "RunConfig", "Seconds", "Section", "Seed", "TaskConfig", "Temperature", "Tokens",
    "TrainConfig", "VerifiersConfig", "VirlConfig", "VllmConfig", "check_shares", "check_text", "clean_path",
]
# fmt: on


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    controller: ControllerConfig = Field(default_factory=ControllerConfig)
    meta: MetaConfig = Field(default_factory=MetaConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        c = self.controller
        learned = METHODS[self.train.method].learned
        if learned and not self.in_blocks and not c.mu_min <= c.mu_init <= c.mu_max:
            raise ValueError(
                f"controller.mu_init must lie in [mu_min, mu_max] = [{c.mu_min}, {c.mu_max}], got {c.mu_init}"
            )
        if self.advantage.kind in GROUP_KINDS and self.rollout.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations must be at least 2 for advantage.kind {self.advantage.kind!r}, whose baseline is "
                f"the rest of the group, got {self.rollout.num_generations}; reinforce++ and gae work with 1"
            )
        if self.ask_again < 1 and self.advantage.kind not in GROUP_KINDS:
            raise ValueError(
                f"rollout.ask_again passes over prompts whose answers all earned the same, and with advantage.kind "
                f"{self.advantage.kind!r} these teach as well: leave it at 1, got {self.ask_again}"
            )
        self._check_loss()
        self._check_mixture()
        self._check_shared_rows()
        self._check_adapter()
        if self.rollout.engine == "vllm" and self.objective.tis_cap is None and ":" not in self.objective.loss:
            self.objective = self.objective.model_copy(update={"tis_cap": 2.0})
        split = self.checkpoint.metric.partition("/")[0]
        if self.checkpoint.keep_best and self.eval.every and split not in self.eval.schedule_splits:
            raise ValueError(
                f"checkpoint.metric must name a split that is evaluated on the schedule {self.eval.schedule_splits}, "
                f"got {self.checkpoint.metric!r}"
            )
        return self

    @property
    def prompts_of_a_look(self) -> int:
        """Held-out prompts that a μ learned in blocks is judged by."""
        return self.controller.look_prompts or min(64, max(32, 2 * self.train.prompts_per_step))

    @property
    def demos_of_a_look(self) -> int:
        """Held-out demonstrations whose likelihood a μ learned in blocks is judged by."""
        return self.controller.look_demos or min(256, max(32, 8 * self.train.prompts_per_step))

    @property
    def in_blocks(self) -> bool:
        """Whether mu is learned by blocks of imitation (controller/blocks.py)."""
        return METHODS[self.train.method].learns_from_utility and self.controller.signal in ("blocks", "lot")

    @property
    def takes_utility(self) -> bool:
        """Whether mu is learned from dot-products with the utility gradient (controller/windows.py)."""
        return METHODS[self.train.method].learns_from_utility and not self.in_blocks

    @property
    def ask_again(self) -> float:
        """The probability with which a prompt whose answers all earned the same is in the next pass over the prompts."""
        if self.rollout.ask_again is not None:
            return self.rollout.ask_again
        return 0.5 if self.in_blocks and self.advantage.kind in GROUP_KINDS else 1.0

    @property
    def sends_adapter(self) -> bool:
        """Whether rollout engines are given the adapter alone."""
        return self.rollout.engine == "vllm" and self.rollout.vllm.adapter_only

    @property
    def off_policy(self) -> bool:
        """Whether the policy may have moved since its rollouts were drawn, so that ratios differ from 1."""
        return self.train.minibatches_per_rollout > 1 or self.rollout.async_steps > 0

    def _check_adapter(self) -> None:
        if not self.sends_adapter:
            return
        if not self.model.lora.rank:
            raise ValueError("rollout.vllm.adapter_only sends an adapter: it needs model.lora.rank above 0, got 0")
        if self.rollout.in_flight:
            raise ValueError(
                "rollout.in_flight changes whole weights under answers that are under way: leave rollout.vllm.adapter_only off"
            )

    def _check_shared_rows(self) -> None:
        if self.engine.sequence_parallel == 1:
            return
        if self.rollout.engine == "vllm" and self.rollout.vllm.router_replay:
            raise ValueError(
                "engine.sequence_parallel gives each GPU a part of a row, and rollout.vllm.router_replay is for whole ones: "
                "turn one of them off"
            )
        if self.train.packing is False or self.model.attention in ("sdpa", "eager"):
            raise ValueError(
                "engine.sequence_parallel shares packed rows: it needs train.packing and model.attention auto or one of "
                f"flash_attention, got train.packing {str(self.train.packing).lower()} and model.attention "
                f"{self.model.attention}"
            )

    def _check_loss(self) -> None:
        o = self.objective
        if o.loss == "kl_cov" and not self.off_policy:
            raise ValueError(
                "objective.loss kl_cov holds back how far tokens have moved: it needs train.minibatches_per_rollout "
                "above 1, got 1"
            )
        if o.loss == "dro" and self.off_policy and not o.ratio_penalty:
            raise ValueError(
                "objective.loss dro needs objective.ratio_penalty above 0, which alone keeps the policy near, got 0"
            )
        if o.max_staleness is not None and o.max_staleness >= self.rollout.async_steps:
            raise ValueError(
                "objective.max_staleness must be below rollout.async_steps, or there is nothing to leave out, got "
                f"{o.max_staleness} and {self.rollout.async_steps}"
            )
        if self.advantage.overlong_buffer >= self.rollout.max_new_tokens:
            raise ValueError(
                f"advantage.overlong_buffer must be below rollout.max_new_tokens, got {self.advantage.overlong_buffer} and "
                f"{self.rollout.max_new_tokens}"
            )
        if o.correction == "mis" and o.tis_cap == 0:
            raise ValueError("objective.correction mis needs objective.tis_cap above 0, got 0")
        if ":" in o.loss and o.corrects:
            raise ValueError(
                "objective.loss of one's own is given the sampler's log-probs: leave objective.tis_cap and correction alone"
            )
        if (o.whole or ":" in o.loss) and o.ratio_penalty:
            raise ValueError(
                f"objective.ratio_penalty goes with {', '.join(TOKEN_LOSSES)}, got objective.loss {o.loss!r}"
            )

    def _check_mixture(self) -> None:
        method = METHODS[self.train.method]
        if not method.mixture:
            return
        if self.advantage.kind == "gae":
            raise ValueError(
                f"train.method {method.name!r} compares answers to one prompt: advantage.kind must not be gae"
            )
        if method.mixture in ("luffy", "srft", "hpt", "superrl", "relift"):
            unsolved = f"the prompts that no answer solves, from which train.method {method.name!r} learns by imitation"
            if self.rollout.dynamic_sampling:
                raise ValueError(f"rollout.dynamic_sampling replaces {unsolved}: leave it off")
            if self.ask_again < 1:
                raise ValueError(f"rollout.ask_again passes over {unsolved}: leave it at 1, got {self.ask_again}")
        if method.mixture in ("luffy", "srft") and self.rollout.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations must be at least 2 for train.method {method.name!r}, whose group is all but "
                "one rollouts "
                f"and a demonstration, got {self.rollout.num_generations}"
            )

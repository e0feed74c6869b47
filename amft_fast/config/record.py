"""Where a run lives, and what it writes down: evaluations, logs, profiles, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import FilePath, Rows, Section, Seed, Temperature


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Annotated[FilePath, Field(min_length=1)] = "runs/run"
    """Folder of the run; made if missing. A run that is already there is refused unless `--resume` or `overwrite`."""
    seed: Seed = 0
    """Seed of everything: data order, samples, new parameters."""
    overwrite: bool = False
    """Delete an earlier run in `dir` instead of refusing to start."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when there is one."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads for torch; default: OMP_NUM_THREADS, else as many as make a pass of the model faster, timed at the start
    (on a GPU torch's own choice). How sums are rounded depends on it: set it where two runs must be equal to the last bit."""


class EvalConfig(Section):
    """Evaluation at the start, after the warm-up, on a schedule and at the end."""

    at_start: bool = True
    """Evaluate before the first step; without it the results show no change."""
    after_warmup: bool = False
    """Evaluate after the warm-up as at the start and the end: what imitation alone has brought."""
    every: int = Field(20, ge=0)
    """Steps between evaluations of `schedule_splits` during training; 0: only at the start and the end."""
    splits: list[str] | None = None
    """Splits of whole evaluations, at the start, after the warm-up and at the end; default: all that the task has."""
    schedule_splits: list[str] = ["val"]
    """Splits evaluated on the schedule."""
    num_samples: Rows = 8
    """Sampled answers per prompt; sampled success is their mean, pass@k is taken with k = num_samples."""
    temperature: Temperature = 1.0
    """Temperature of the sampled answers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampled answers."""
    max_prompts: int | None = Field(None, ge=1)
    """Upper bound on the prompts per split; default: all of them."""
    schedule_max_prompts: int | None = Field(128, ge=1)
    """The same for the scheduled evaluations."""
    schedule_num_samples: Rows = 4
    """Sampled answers per prompt in the scheduled evaluations."""


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


class LogConfig(Section):
    """What a run writes besides metrics.jsonl."""

    to: list[Literal[TRACKERS]] = ["tensorboard"]
    """Trackers that are told of steps, evaluations, kept completions, settings and the report: tensorboard (files under `tb/`),
    wandb, trackio, mlflow; where these keep a run, their own environment variables say."""
    project: str = Field("amft-fast", min_length=1)
    """The project of wandb and trackio, mlflow's experiment; the run is called after its folder."""
    samples_every: int = Field(20, ge=0)
    """Steps between the completions kept in samples.jsonl; 0: none."""
    samples: int = Field(8, ge=1)
    """Completions kept each time."""
    implicit_reward: bool = False
    """Log the mean path-level log pi/pi_ref of demonstrations and rollouts against the policy after the warm-up (two forward
    passes more a step)."""
    progress: bool | None = None
    """Show progress bars; default: only on a terminal, plain lines otherwise."""
    every: int = Field(10, ge=1)
    """Steps between plain progress lines."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_runs(cls, values: Any) -> Any:
        """Their config.toml says log.tensorboard, which `to` has taken the place of."""
        if isinstance(values, dict) and isinstance(values.get("tensorboard"), bool):
            on = values["tensorboard"]
            values = {"to": ["tensorboard"] if on else []} | {k: v for k, v in values.items() if k != "tensorboard"}
        return values


class ProfileConfig(Section):
    """Where the time and memory of a few steps went (profiling.py)."""

    steps: int = Field(0, ge=0)
    """Steps to profile; the report is printed and the traces are written to `profile/` in the run's folder."""
    skip: int = Field(2, ge=0)
    """Steps before the first profiled one."""
    rollouts: bool = False
    """Record the operations of rollouts too: several megabytes for each token that is decoded."""


class CheckpointConfig(Section):
    """What is saved, and what is kept."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only at the end and on a signal."""
    background: bool = True
    """Write them beside the steps, which wait for a copy to host memory alone: of masters, moments and utility gradient, 12 to
    20 bytes for each parameter of a process. false: the steps wait for the disk."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best `metric` as well, in `checkpoints/best`."""
    metric: str = "val/sampled"
    """Evaluation figure that decides: split/greedy, split/sampled or split/pass_at_k. Higher is better."""
    export: bool = True
    """At the end write the policy as a plain transformers folder under `model/`."""

"""Small whole runs: their settings, and what they leave in their folders."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import CopyTask

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.engine.parts import Part, Tensors
from amft_fast.interfaces import Task
from amft_fast.run import launch
from amft_fast.run.build import build
from amft_fast.trainer import Step, Trainer

TIMES = ("seconds", "tokens_per_s", "rollout_tokens_per_s", "update_tokens_per_s", "wall_s")


def cfg_for(folder: Path, model: Path, *flags: str) -> Config:
    """Four steps of method fixed after two of warm-up, with evaluations, checkpoints and samples at every second."""
    base = [
        *("--run.dir", str(folder), "--model.path", str(model), "--train.steps", "4", "--train.warmup_steps", "2"),
        *("--train.lr", "0.01", "--train.prompts_per_step", "4", "--train.demos_per_step", "4"),
        *("--rollout.num_generations", "4", "--rollout.max_new_tokens", "4", "--log.to", "[]"),
        *("--eval.every", "2", "--eval.num_samples", "2", "--checkpoint.every", "2", "--log.samples_every", "2"),
        *("--run.threads", "1", "--checkpoint.export", "false", "--train.method", "fixed"),
    ]
    return config_file.load(None, base + list(flags))


def train(cfg: Config, resume: bool = False, task: Task | None = None) -> int:
    """A run of `CopyTask`, or of another task; its exit code."""
    return launch.train(cfg, resume, task or CopyTask())


def trainer_of(cfg: Config, task: Task | None = None) -> Trainer:
    """A trainer with its parts and nothing around it: no evaluations, records, checkpoints or report."""
    return Trainer(cfg, build(cfg, lambda: False, task or CopyTask()))


def steps(trainer: Trainer, count: int) -> list[Step]:
    """The next steps, with what comes after the warm-up."""
    done = []
    for _ in range(count):
        if trainer.step == trainer.cfg.train.warmup_steps:
            trainer.after_warmup()
        done.append(trainer.train_step())
    return done


def taken_up(trainer: Trainer, task: Task | None = None) -> Trainer:
    """Another trainer with this one's state, as a checkpoint would have carried it."""
    state = json.loads(json.dumps(trainer.state_dict())) | {"step": trainer.step}
    tensors = {
        name: Part(v.data.clone(), v.start, v.shape) if isinstance(v, Part) else v.detach().clone()
        for name, v in trainer.tensors().items()
    }
    other = trainer_of(trainer.cfg, task)
    other.load(state, Tensors.of(tensors))
    return other


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a run's file."""
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    """What two equal runs have in common."""
    return [{k: v for k, v in r.items() if k not in TIMES and not k.startswith("time/")} for r in records]


def assert_close(got: list[dict], want: list[dict], rel: float = 1e-4) -> None:
    """Every figure of every step, of runs on other numbers of processes."""
    assert len(got) == len(want) and all(a.keys() == b.keys() for a, b in zip(got, want))
    for a, b in zip(got, want):
        for key, value in b.items():
            if isinstance(value, float):
                # Weights are within 1.5e-5 after three steps (`scale_worker.Shake`), and figures hang on them smoothly. A
                # signal-to-noise ratio divides by a difference, which magnifies rounding.
                assert a[key] == pytest.approx(value, rel=1e-2 if "snr" in key or "gate" in key else rel, abs=1e-5), (
                    b["step"],
                    key,
                )
            else:
                assert a[key] == value, (b["step"], key)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> None:
    """Returns when `condition` holds; fails with the output of a process that ended before, or still runs at the limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(process.communicate()[0])
        time.sleep(0.01)

"""The run around the steps: it evaluates, records, saves, and stops when it is told to."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amft_fast.config import Config
from amft_fast.engine.parts import Tensors
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Task
from amft_fast.run.evaluate import Evaluator
from amft_fast.run.profiling import StepProfiler, static_bytes
from amft_fast.run.progress import LONG
from amft_fast.run.recorder import Recorder, what_was_bad
from amft_fast.run.saver import Saver
from amft_fast.run.writers import RunFiles
from amft_fast.trainer import Parts, Step, Trainer


class Loop:
    """One run. `run` returns when all steps are done, and raises InterruptedError when a stop was asked for."""

    def __init__(self, cfg: Config, parts: Parts, files: RunFiles) -> None:
        self.cfg, self.files = cfg, files
        self.world, self.phases, self.should_stop = parts.engine.world, parts.phases, parts.should_stop
        self.evaluator = Evaluator(cfg, parts)
        self.trainer = Trainer(cfg, parts)
        self.recorder = Recorder(cfg, parts, files)
        self.profiler = None
        if cfg.profile.steps:
            folder, p = files.folder / "profile", cfg.profile
            self.profiler = StepProfiler(folder, p.steps, p.skip, parts.engine.device, self.phases, p.rollouts)
        self.origin = {"seed": cfg.run.seed, "task": cfg.task.name, "data": fingerprint(parts.task)}
        told = partial(files.tell, "on_checkpoint")
        self.saver = Saver(files.checkpoints, cfg.checkpoint, self.world, files.sync, told)
        self.saved_step = -1
        self.wall_before = 0.0
        self.started = time.perf_counter()

    @property
    def wall(self) -> float:
        """Seconds of work so far, over all resumptions."""
        return self.wall_before + time.perf_counter() - self.started

    def run(self) -> None:
        """Trains to the end, or until a stop was asked for; either way the state is saved."""
        trainer = self.trainer
        if self.evaluator.best_step == self.saved_step:  # a kill may have come before its link
            self.saver.mark_best(self.saved_step)
        try:
            while True:
                if self.evaluator.due(trainer):
                    self.evaluate()
                if trainer.finished:
                    break
                if self.checkpoint_due():
                    self.save(wait=False)
                if self.asked_to_stop():
                    raise InterruptedError
                if trainer.step == self.cfg.train.warmup_steps:
                    self.after_warmup()
                step = self.take_step()
                if step.failure is not None:
                    raise step.failure
        except InterruptedError:
            self.save()
            raise
        except RolloutFailure as e:
            raise UserError(f"{e}; the state is saved in {self.save()}, go on with --resume") from e
        self.save()

    def asked_to_stop(self) -> bool:
        """Whether some rank was asked to. Raises UserError when the checkpoint that is being written beside has failed."""
        stop, failed = self.world.max(torch.tensor([float(self.should_stop()), float(self.saver.failed)])).tolist()
        if failed:
            self.saver.wait()
        return bool(stop)

    def after_warmup(self) -> None:
        """H* and what else a method wants of the policy after its warm-up."""
        trainer, cfg = self.trainer, self.cfg
        drawn = None
        if trainer.controller.needs_entropy_target and trainer.entropy_target is None:
            prompts = min(cfg.train.prompts_per_step, len(trainer.rollouts.prompts))
            drawn = len(self.world.share(prompts * cfg.rollout.num_generations))
        with self.files.progress.phase("measuring H*" if drawn else "after the warm-up", drawn, "answers") as phase:
            trainer.rollouts.on_answer = phase.advance
            trainer.after_warmup()
        trainer.rollouts.on_answer = lambda: None

    def take_step(self) -> Step:
        """One step and its record, profiled where `profile.steps` asks for it. Raises UserError after too many updates in a
        row that were not finite."""
        if self.profiler is not None:
            self.profiler.begin()
        rollouts, number = self.trainer.rollouts, self.trainer.step + 1
        with self.files.progress.phase(f"in step {number}", None, "answers drawn", LONG) as phase:
            rollouts.on_answer = phase.advance
            try:
                step = self.trainer.train_step()
            finally:
                rollouts.on_answer = lambda: None
        record = self.recorder.step(step, self.trainer, self.evaluator.answers_left())
        if self.profiler is not None:
            with self.files.progress.phase("reading the profile", 100, "%") as phase:
                static = static_bytes(self.trainer.engine, self.trainer.utility)
                report = self.profiler.done(record, static, phase.advance)
            if report is not None:
                self.files.say(report)
        if step.bad_in_row >= self.cfg.train.max_bad_steps:
            raise UserError(
                f"stopped after {step.bad_in_row} updates in a row whose {what_was_bad(step)} was not finite "
                f"(train.max_bad_steps); the state is saved in {self.save()}. Lower train.lr or train.max_grad_norm and go on "
                "with --resume"
            )
        return step

    def evaluate(self) -> None:
        """Evaluates, writes it down, and keeps the checkpoint when it is the best so far."""
        trainer, files, evaluator = self.trainer, self.files, self.evaluator
        answers, begin = evaluator.answers(evaluator.whole(trainer) is not None), time.perf_counter()
        mine = answers / self.world.size
        trainer.rollouts.catch_up()
        with self.phases("eval"), files.progress.phase(f"evaluating at {trainer.step}", mine, "answers") as phase:
            result, whole, kept = evaluator.evaluate(trainer, phase.advance)
        files.progress.evaluated(answers, time.perf_counter() - begin)
        place = {"step": trainer.step - 1, "at": trainer.step, "tokens": trainer.tokens, "wall_s": self.wall}
        for row in kept:
            files.eval_samples.write({"step": trainer.step - 1, "at": trainer.step, **row})
        files.evals.write({**place, "full": whole, **result})
        figures = {f"{split}/{k}": v for split, row in result.items() for k, v in row.items()}
        success = (f"{split} {row['greedy']:.1%}/{row['sampled']:.1%}" for split, row in result.items())
        files.say(f"eval at {trainer.step}: " + "  ".join(success))
        if not whole and trainer.step > self.cfg.train.warmup_steps and self.evaluator.is_best(figures):
            self.save(wait=False, best=True)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint_due(self) -> bool:
        every, step = self.cfg.checkpoint.every, self.trainer.step
        return every > 0 and step > 0 and step % every == 0 and self.saved_step != step

    def save(self, wait: bool = True, best: bool = False) -> Path:
        """The whole state: a run resumed from it goes on as if it had never stopped. `wait`: until it is on disk; `best`: as
        the best so far."""
        with self.phases("checkpoint"):
            tensors = self.trainer.tensors()
            if self.world.main:
                tensors["rng.cpu"] = torch.get_rng_state()
            own = {"wall_s": self.wall, "alarms": self.recorder.alarms.state_dict()} | self.origin
            state = self.trainer.state_dict() | self.evaluator.state_dict() | own
            path = self.saver.save(self.trainer.step, tensors, state, best, wait)
            self.saved_step = self.trainer.step
        return path

    def load(self, state: dict[str, Any], tensors: Tensors) -> None:
        """Takes up the state of a checkpoint. Raises UserError for that of another run, ValueError for another model's."""
        for name, here in self.origin.items():
            if state.get(name, here) != here:  # a checkpoint of format 2 does not say
                what = f"{name} {state[name]!r}, the config says {here!r}" if name != "data" else "other training data"
                raise UserError(
                    f"--resume: the checkpoint is of {what}; give back what it was, or begin anew with another --run.dir"
                )
        self.trainer.load(state, tensors)
        self.evaluator.load_state_dict(state)
        if "alarms" in state:
            self.recorder.alarms.load_state_dict(state["alarms"])
        torch.set_rng_state(tensors["rng.cpu"])
        self.saved_step, self.wall_before = self.trainer.step, state["wall_s"]


def fingerprint(task: Task) -> str:
    """Of the training data: the ids of at most 10,000 prompts, spread evenly, and the numbers of prompts and demonstrations.

    What a run has drawn so far means nothing for other data.
    """
    prompts = task.prompts("train")
    ids = [prompts[i].id for i in range(0, len(prompts), max(1, len(prompts) // 10_000))]
    text = json.dumps([len(prompts), len(task.demos("train")), ids])
    return hashlib.sha256(text.encode()).hexdigest()

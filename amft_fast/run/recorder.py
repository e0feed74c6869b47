"""What a run says and writes of its steps: records, completions, progress, and the warnings that a person should see."""

from __future__ import annotations

import math
from typing import Any

from amft_fast.config import Config
from amft_fast.controller import Controller, MetaController
from amft_fast.engine.phases import PHASES
from amft_fast.run import answers
from amft_fast.run.alarms import Alarms
from amft_fast.run.figures import rollout_figures, staleness_figures
from amft_fast.run.writers import RunFiles
from amft_fast.trainer import Parts, Step, Trainer

SHOWN = ("mu", "success", "sft_loss", "entropy", "grad_norm")  # beside the progress


class Recorder:
    """Turns steps into lines of metrics.jsonl and of the terminal."""

    def __init__(self, cfg: Config, parts: Parts, files: RunFiles) -> None:
        self.cfg, self.files = cfg, files
        self.task, self.phases = parts.task, parts.phases
        self.mismatch_warnings = 0
        self.alarms = Alarms(cfg)

    def step(self, step: Step, trainer: Trainer, answers_left: int) -> dict[str, Any]:
        """Writes and says what there is to a step, after which evaluations draw so many answers more; returns its record."""
        record = self.record(step, trainer.entropy_target)
        alarms = self.alarms.look(record)
        if alarms:
            record["alarms"] = alarms
        self.files.metrics.write(record)
        self._keep_samples(step)
        cfg, clock, moved = self.cfg.train, trainer.step - self.cfg.train.warmup_steps, 1.0
        if cfg.token_budget is not None and clock > 0:
            clock, moved = trainer.clock, cfg.steps * step.tokens / max(cfg.token_budget - trainer.warmup_tokens, 1)
        shown, aside = {k: record.get(k) for k in SHOWN}, record.get("time/utility", 0.0)
        self.files.progress.step(clock, moved, step.seconds, answers_left, shown, aside)
        for text in alarms.values():
            self.files.say(f"alarm at step {step.number}: {text}")
        self._warn_of_mismatch(record)
        self._warn_at_bound(step, trainer.controller)
        if step.bad_in_row:
            self.files.say(
                f"step {step.number}: the {what_was_bad(step)} was not finite, the update was skipped "
                f"({step.bad_in_row} in a row)"
            )
        return record

    def record(self, step: Step, entropy_target: float | None) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        samples = step.drawn.samples
        record = {"step": step.number, "phase": "warmup" if step.warmup else "train", "mu": step.mu, "lr": step.lr}
        record |= step.figures | rollout_figures(samples) | step.drawn.figures
        if self.cfg.rollout.async_steps:
            record |= staleness_figures(samples, step.number, self.cfg.objective.max_staleness)
        record |= {"entropy_target": entropy_target, "tokens": step.tokens, "tokens_per_s": step.tokens / step.seconds}
        times = {k: v for k, v in self.phases.read().items() if k in PHASES}
        record |= {"seconds": step.seconds, **{f"time/{k}": v for k, v in times.items()}}
        # What is drawn ahead is drawn while the step before trains: the time waited for it says nothing of its speed.
        sampled = 0 if self.cfg.rollout.async_steps else record.get("tokens_sampled", 0)
        for phase, tokens in (("rollout", sampled), ("update", record["tokens_trained"])):
            if tokens and times.get(phase):
                record[f"{phase}_tokens_per_s"] = tokens / times[phase]
        return record

    def _warn_of_mismatch(self, record: dict[str, Any]) -> None:
        """Says when engine and trainer disagree on log-probs: at the first such step, then at every fiftieth."""
        apart = record.get("mismatch_mean", 0.0)
        if self.cfg.rollout.async_steps == 0 and apart > self.cfg.rollout.mismatch_warn:
            if self.mismatch_warnings % 50 == 0:
                self.files.say(
                    f"step {record['step']}: rollout engine and trainer differ by {apart:.3g} in log-prob on the mean (largest "
                    f"{record['mismatch_max']:.3g}), over rollout.mismatch_warn; objective.tis_cap bounds what that does"
                )
            self.mismatch_warnings += 1

    def _warn_at_bound(self, step: Step, controller: Controller) -> None:
        moved = "controller/mu_next" in step.figures
        if moved and isinstance(controller, MetaController) and controller.at_bound == 3:
            self.files.say(
                f"step {step.number}: mu has sat at its bound {controller.value:g} for 3 windows: the controller would go "
                "further than controller.mu_min and mu_max allow"
            )

    def _keep_samples(self, step: Step) -> None:
        """A few completions of this step for the report: the first group, then one of each following."""
        every, samples = self.cfg.log.samples_every, step.drawn.samples
        if not samples or not every or step.number % every:
            return
        groups = {s.group_id: s for s in reversed(samples)}
        shown = list(groups.values())[::-1][: self.cfg.log.samples]
        items = answers.find(self.task.prompts("train"), (s.prompt_id for s in shown))
        for s in shown:
            self.files.samples.write({"step": step.number, **answers.kept(self.task, items[s.prompt_id], s)})


def what_was_bad(step: Step) -> str:
    """Which of the two was not finite, in a step whose update was skipped."""
    return "loss" if not math.isfinite(step.figures["loss"]) else "gradient"

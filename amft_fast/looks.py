"""Looks at what is held out: the prompts and demonstrations that a controller is told of, drawn and read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from amft_fast.config import Config
from amft_fast.controller import Controller, Switch
from amft_fast.data.batch import TokenSequence
from amft_fast.data.stream import choose
from amft_fast.errors import UserError
from amft_fast.held_out import HeldOut
from amft_fast.interfaces import Demo, Item, Sample, Task
from amft_fast.rollout.rollouts import Rollouts
from amft_fast.scoring import Scorer


class Look(NamedTuple):
    """One of them."""

    samples: list[Sample]  # the answers, prompt by prompt
    held_out: HeldOut
    tokens: int  # sampled, and read of demonstrations


class Looks:
    """Which prompts and demonstrations of the split `val` a controller of μ is judged by (none, where it asks for none)."""

    def __init__(
        self,
        cfg: Config,
        controller: Controller,
        task: Task,
        encode: Callable[[Demo], TokenSequence],
        rollouts: Rollouts,
        scorer: Scorer,
    ) -> None:
        self.cfg, self.rollouts, self.scorer = cfg, rollouts, scorer
        self.prompts = held_out_prompts(cfg, task, cfg.prompts_of_a_look) if cfg.in_blocks else []
        switches = isinstance(controller, Switch)
        count = cfg.meta.prompts if switches else cfg.demos_of_a_look if cfg.in_blocks else 0
        demos = choose(task.demos("val"), count) if count else []
        if switches and not demos:
            raise UserError("train.sft_stop saturation looks at demonstrations of the split val, and the task has none")
        self.demos = [encode(demo) for demo in demos]

    def take(self, step: int, reads_demos: bool = True) -> Look:
        """Answers to the prompts at the present weights, and how likely the demonstrations are."""
        cfg, place = self.cfg, ("held out", step)
        samples = self.rollouts.sample(self.prompts, cfg.rollout.temperature, place, cfg.meta.num_generations)
        demos, tokens = self.read() if reads_demos else ([], 0)
        held_out = HeldOut.of(samples, len(self.prompts), demos)
        return Look(samples, held_out, tokens + held_out.sampled)

    def read(self) -> tuple[list[np.ndarray], int]:
        """The log-probs of each demonstration's tokens, and the tokens that were read for them."""
        read = self.scorer.tokens(self.demos) if self.demos else []
        return [logprobs for logprobs, _ in read], sum(len(s.ids) for s in self.demos)


def held_out_prompts(cfg: Config, task: Task, count: int) -> list[Item]:
    """The prompts of `val` that μ is learned on."""
    items = choose(task.prompts("val"), count)
    if len(items) < 2:
        raise UserError(f"method {cfg.train.method!r} needs at least 2 validation prompts, the task has {len(items)}")
    return items

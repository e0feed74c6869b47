"""The rollouts of a run: which prompts they answer, when they are drawn, and with which weights.

`Rollouts` owns the order of the prompts, what is drawn ahead, and the rollout engine's weights. The engine only completes what
it is asked, the task only judges.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from amft_fast.config import Config
from amft_fast.data.stream import Stream
from amft_fast.engine.phases import Phases
from amft_fast.engine.world import World
from amft_fast.errors import RolloutFailure
from amft_fast.interfaces import Item, RolloutEngine, Sample, Sampling, Task
from amft_fast.rollout import episodes
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.dynamic import draw_with_spread
from amft_fast.rollout.encoder import Encoder


class Drawn(NamedTuple):
    """The samples of a step, group by group, and the figures of how they were drawn."""

    samples: list[Sample]
    figures: dict[str, float]


def pack(samples: list[Sample]) -> list[Sample]:
    """The same samples with their tokens in arrays: 13 bytes a token instead of 80, and unpickled without a look at each.

    What many ranks hold of each other; lists and arrays are read alike.
    """
    prompts: dict[int, array] = {}  # one for all answers to a prompt
    return [
        replace(
            s,
            prompt_ids=prompts.setdefault(id(s.prompt_ids), array("i", s.prompt_ids)),
            response_ids=array("i", s.response_ids),
            loss_mask=array("b", s.loss_mask),
            behavior_logprobs=array("d", s.behavior_logprobs),
        )
        for s in samples
    ]


class Rollouts:
    """Draws the rollouts of each step. All ranks hold all samples; each draws and judges its share."""

    def __init__(
        self, cfg: Config, engine: RolloutEngine, task: Task, encoder: Encoder, world: World, phases: Phases
    ) -> None:
        self.cfg, self.engine, self.task, self.encoder = cfg, engine, task, encoder
        self.world, self.phases = world, phases
        self.prompts = task.prompts("train")
        self.stream = Stream(len(self.prompts), cfg.run.seed, "prompts")
        self.on_answer: Callable[[], object] = lambda: None  # told of each answer drawn on this rank
        self.ahead = Ahead() if cfg.rollout.async_steps else None
        self.generations = cfg.rollout.num_generations  # answers to each prompt of a step
        self.hint: Callable[[Item, int, int], list[int]] | None = (
            None  # (item, number, step): what an answer begins with
        )

    # ------------------------------------------------------------------------------------------------------- a step's

    def draw(self, step: int) -> Drawn:
        """G answers to each of the step's prompts, judged by the task; those that were drawn ahead, where they were."""
        cfg, count = self.cfg.rollout, self.cfg.train.prompts_per_step
        if self.ahead is not None:
            with self.phases("rollout"):
                parts = self.world.together(self.ahead.result)
            if parts[0] is not None:
                return Drawn([sample for part in parts for sample in part], {})

        def draw(items: list[Item], redraw: int) -> list[Sample]:
            # A prompt that comes again in the same step must not draw the same samples again.
            purpose = ("train", step, redraw) if redraw else ("train", step)
            return self.sample(items, cfg.temperature, purpose, self.generations)

        if cfg.dynamic_sampling:
            return Drawn(*draw_with_spread(draw, self._take, count, cfg.max_redraws))
        return Drawn(draw(self._take(count), 0), {})

    def _take(self, count: int) -> list[Item]:
        return [self.prompts[i] for i in self.stream.take(count)]

    def draw_ahead(self, step: int | None) -> None:
        """All rollouts of this step are there: those of `step`, the next, begin in a thread (None: there is no next), or the
        engine may rest until it is given new weights."""
        if self.ahead is None:
            self.engine.rest()
            return
        self.ahead.drop()
        if step is None:
            return
        cfg = self.cfg.rollout
        items = self._take(self.cfg.train.prompts_per_step)
        mine = self.world.share(len(items) * self.generations)
        self.ahead.start(lambda: self._episodes(items, cfg.temperature, ("train", step), self.generations, mine))

    # ----------------------------------------------------------------------------------------------------- any others

    def sample(self, items: list[Item], temperature: float, purpose: tuple, num_generations: int) -> list[Sample]:
        """`num_generations` answers to each item; `purpose` is part of their seeds. A failure of one rank is raised on all."""
        with self.phases("rollout"):
            return self.world.spread(
                len(items) * num_generations,
                lambda mine: self._episodes(items, temperature, purpose, num_generations, mine),
            )

    def _episodes(
        self, items: list[Item], temperature: float, purpose: tuple, num_generations: int, mine: range
    ) -> list[Sample]:
        """This rank's samples of all that are drawn; those of a step may begin with a hint."""
        hint = None
        if purpose[0] == "train" and self.hint is not None:
            hint = partial(self.hint, step=purpose[1])
        samples = episodes.run(
            self.engine,
            self.task,
            items,
            self.encoder,
            Sampling(temperature=temperature, stop_token_ids=self.encoder.stop_token_ids),
            num_generations=num_generations,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
            seed_parts=(self.cfg.run.seed, *purpose),
            only=mine,
            hint=hint,
            on_answer=lambda: self.on_answer(),
        )
        return samples if self.world.size == 1 else pack(samples)

    # -------------------------------------------------------------------------------------------------------- weights

    def sync(self, params: Iterator[tuple[str, torch.Tensor]], version: int) -> RolloutFailure | None:
        """The new weights to the rollout engine, once nothing is drawn with the old ones.

        A failure is returned, not raised: the step is done by then, and its record is written first. So it is when a stop has
        broken off what was being drawn ahead; the loop asks for a stop itself.
        """
        try:
            if self.ahead is not None:
                try:
                    self.world.together(self.ahead.wait)
                except (InterruptedError, RolloutFailure) as e:  # its prompts are drawn again by the next step
                    self.ahead.drop()
                    self.stream.position -= self.cfg.train.prompts_per_step
                    if isinstance(e, RolloutFailure):
                        raise
            self.world.together(lambda: self._send(params, version))
        except RolloutFailure as e:
            return e
        return None

    def _send(self, params: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        try:
            self.engine.sync(params, version)
        except RolloutFailure:
            for _ in params:  # other ranks go on gathering them
                pass
            raise

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand, and what was drawn ahead on any rank. Every rank must call it."""
        drawn = None
        if self.ahead is not None:
            parts = self.world.together(self.ahead.state_dict)
            drawn = None if parts[0] is None else [sample for part in parts for sample in part]
        return {"prompt_position": self.stream.position, "ahead": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.position = state["prompt_position"]
        if self.ahead is not None:
            drawn = state.get("ahead")
            mine = self.world.share(len(drawn or []))
            self.ahead.load_state_dict(None if drawn is None else drawn[mine.start : mine.stop])

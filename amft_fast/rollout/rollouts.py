"""The rollouts of a run: which prompts they answer, when they are drawn, and with which weights.

`Rollouts` owns the order of the prompts, what is drawn ahead, and which weights the rollout engine has. The engine only
completes what it is asked, the task only judges.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from amft_fast.config import Config
from amft_fast.data.stream import Passes
from amft_fast.engine.phases import Phases
from amft_fast.engine.world import World
from amft_fast.errors import RolloutFailure
from amft_fast.interfaces import Item, RolloutEngine, Sample, Sampling, Task, UpdateEngine
from amft_fast.rollout import episodes
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.dynamic import by_group, draw_with_spread, flat_prompts
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


def sent(cfg: Config, engine: UpdateEngine) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    """What rollout engines are given after each update: whole weights, or the adapter alone."""
    return engine.named_factors if cfg.sends_adapter else engine.named_full_params


class Rollouts:
    """Draws the rollouts of each step. All ranks hold all samples; each draws and judges its share.

    With `rollout.async_steps` = D they are drawn ahead in rounds, and weights go to the engine between two of these alone. A
    round begins when the rollouts that are there have been taken, at step t with the weights of t: those of the steps t + 1
    to t + D, all together, the first step's first. So none is trained on that is older than D steps, and which weights drew
    what hangs on no clock. With `rollout.in_flight` there are no rounds: weights go to the engine after every step, under
    answers that go on with them, and at step t those of t + D begin. Whatever else is drawn (looks, evaluations, H*,
    utilities) waits until nothing is drawn ahead any more and is of the present weights.
    """

    def __init__(
        self,
        cfg: Config,
        engine: RolloutEngine,
        task: Task,
        encoder: Encoder,
        world: World,
        phases: Phases,
        weights: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    ) -> None:
        self.cfg, self.engine, self.task, self.encoder = cfg, engine, task, encoder
        self.world, self.phases, self.weights = world, phases, weights
        self.version = 0  # of the policy
        self.sent: int | None = 0  # version that the engine has; None: other weights than any version now
        self.prompts = task.prompts("train")
        self.stream = Passes(len(self.prompts), cfg.run.seed, "prompts", cfg.ask_again)
        self.places = {item.id: i for i, item in enumerate(self.prompts)} if cfg.ask_again < 1 else {}
        self.flat: dict[str, bool] = {}  # whether all answers to a prompt of this step earned the same
        self.on_answer: Callable[[], object] = lambda: None  # told of each answer drawn on this rank
        depth = cfg.rollout.async_steps
        self.ahead = Ahead(depth) if depth else None
        self.judging = Lock() if depth > 1 else nullcontext()  # tasks are asked by one thread at a time
        self.generations = cfg.rollout.num_generations  # answers to each prompt of a step
        # What answers begin with, as of now: a function (item, number, step).
        self.hints: Callable[[], Callable[[Item, int, int], list[int]] | None] = lambda: None

    # ------------------------------------------------------------------------------------------------------- a step's

    def draw(self, step: int) -> Drawn:
        """G answers to each of the step's prompts, judged by the task; those that were drawn ahead, where they were."""
        cfg, count, figures = self.cfg.rollout, self.cfg.train.prompts_per_step, {}
        begin = self.ahead.queue[0].position if self.ahead else self.stream.position
        self.flat = {}

        def draw(items: list[Item], redraw: int) -> list[Sample]:
            # A prompt that comes again in the same step must not draw the same samples again.
            purpose = ("train", step, redraw) if redraw else ("train", step)
            drawn = self.sample(items, cfg.temperature, purpose, self.generations)
            self.flat |= flat_prompts(drawn)
            return drawn

        if self.ahead:
            with self.phases("rollout"):
                self._wait(1)
                parts = self.world.together(self.ahead.first)
            samples = [sample for part in parts for sample in part]
            self.flat = flat_prompts(samples)
        elif cfg.dynamic_sampling:
            samples, figures = draw_with_spread(draw, self._take, count, cfg.max_redraws)
        else:
            samples = draw(self._take(count), 0)
        if self.places:
            figures["passed_over"] = self.stream.left_out
            if not cfg.dynamic_sampling:
                figures["success_all"] = self._success_of_all(samples, begin)
        return Drawn(samples, figures)

    def _success_of_all(self, samples: list[Sample], begin: int) -> float:
        """Success as if no prompt had been passed over: each, from this position on, weighs as many as it stands for."""
        success = [np.mean([s.success for s in group]) for group in by_group(samples)]
        return float(np.average(success, weights=1 / self.stream.chances(begin, len(success))))

    def _take(self, count: int) -> list[Item]:
        return [self.prompts[i] for i in self.stream.take(count)]

    def draw_none(self) -> Drawn:
        """This step asks for none. What was drawn ahead would be too old, or of weights taken back, when it is used: it
        goes, and its prompts come again."""
        if not self.ahead:
            return Drawn([], {})
        self.ahead.settle()
        gone = self.ahead.whole()
        samples = [s for batch in list(self.ahead.queue)[:gone] for s in batch.drawn.result()]
        tokens = sum(self.world.together(lambda: sum(sum(s.loss_mask) for s in samples)))
        self._keep(0)
        return Drawn([], {"dropped_tokens": float(tokens)})

    def draw_ahead(self, step: int, last: int) -> None:
        """All rollouts of this step are there: those of later ones, up to step `last`, begin in threads; or the engine may rest
        until it is given new weights."""
        if self.ahead is None:
            self.engine.rest()
            return
        if self.ahead and self.ahead.queue[0].step <= step:
            self.ahead.queue.popleft()
        if not self.ahead:
            self.catch_up()
        elif not self.cfg.rollout.in_flight:
            return
        begun = self.ahead.queue[-1].step if self.ahead else step
        for later in range(begun + 1, last + 1):
            self._start(later)

    def _start(self, step: int) -> None:
        """Those of `step` begin in a thread, with the weights that the engine has."""
        position, items = self.stream.position, self._take(self.cfg.train.prompts_per_step)
        mine, hints = self.world.share(len(items) * self.generations), self.hints()
        temperature, purpose, count = self.cfg.rollout.temperature, ("train", step), self.generations
        self.ahead.start(step, position, lambda: self._episodes(items, temperature, purpose, count, mine, hints))

    def _wait(self, count: int | None = None) -> None:
        """Returns when the first `count` steps' rollouts drawn ahead are there, or all. Where that fails or is broken off
        on some rank, what is not there is forgotten and its prompts come again."""
        try:
            self.world.together(lambda: self.ahead.wait(count))
        except (InterruptedError, RolloutFailure):
            self._keep(min(self.world.together(self.ahead.whole)))
            raise

    def _keep(self, count: int) -> None:
        if gone := self.ahead.cut(count):
            self.stream.position = gone[0].position

    # ----------------------------------------------------------------------------------------------------- any others

    def sample(self, items: list[Item], temperature: float, purpose: tuple, num_generations: int) -> list[Sample]:
        """`num_generations` answers to each item, by the present weights; `purpose` is part of their seeds. A failure of one
        rank is raised on all."""
        with self.phases("rollout"):
            self.catch_up()
            hints = self.hints() if purpose[0] == "train" else None
            return self.world.spread(
                len(items) * num_generations,
                lambda mine: self._episodes(items, temperature, purpose, num_generations, mine, hints),
            )

    def _episodes(
        self,
        items: list[Item],
        temperature: float,
        purpose: tuple,
        num_generations: int,
        mine: range,
        hints: Callable[[Item, int, int], list[int]] | None,
    ) -> list[Sample]:
        """This rank's samples of all that are drawn; those of a step may begin with a hint."""
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
            hint=None if hints is None else partial(hints, step=purpose[1]),
            on_answer=lambda: self.on_answer(),
            judging=self.judging,
        )
        return samples if self.world.size == 1 else pack(samples)

    # -------------------------------------------------------------------------------------------------------- weights

    def sync(self, version: int) -> RolloutFailure | None:
        """A step has made the policy's weights those of `version`. They go to the rollout engine once nothing is drawn with the
        old ones, in the midst of a round not at all, in flight at once.

        A failure is returned, not raised: the step is done by then, and its record is written first. So it is when a stop has
        broken off what was being drawn ahead; the loop asks for a stop itself.
        """
        self.version, in_flight = version, self.cfg.rollout.in_flight
        self._told()
        if self.ahead and len(self.ahead) > 1 and not in_flight:
            return None
        try:
            if self.ahead and not in_flight:
                with self.phases("rollout"), suppress(InterruptedError):
                    self._wait()
            with self.phases("sync"):
                self._send()
        except RolloutFailure as e:
            return e
        return None

    def _told(self) -> None:
        """The step is done: later passes over the prompts know what it has found flat."""
        if self.places:
            oldest = self.ahead.queue[0].position if self.ahead else self.stream.position
            self.stream.told({self.places[name]: flat for name, flat in self.flat.items()}, oldest)
        self.flat = {}

    def replace(self) -> None:
        """The policy's weights have been put back to earlier ones: what is drawn from now on is of these."""
        self.sent = None
        self.catch_up()

    def catch_up(self) -> None:
        """Returns when nothing is drawn ahead any more and the engine has the present weights."""
        if self.ahead:
            with self.phases("rollout"):
                self._wait()
        self._send()

    def _send(self) -> None:
        if self.sent != self.version:
            self.world.together(self._sync_engine)
            self.sent = self.version

    def _sync_engine(self) -> None:
        params = self.weights()
        try:
            self.engine.sync(params, self.version)
        except RolloutFailure:
            for _ in params:  # other ranks go on gathering them
                pass
            raise

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand, and what was drawn ahead on any rank. Every rank must call it.

        In flight it waits for nothing: prompts that are not answered yet are asked again after a resume.
        """
        history = {"prompt_history": self.stream.history()} if self.places else {}
        if self.ahead is None:
            return {"prompt_position": self.stream.position, "ahead": []} | history
        if not self.cfg.rollout.in_flight:
            self.ahead.settle()
        count = min(self.world.together(self.ahead.whole))
        batches = list(self.ahead.queue)
        parts = self.world.together(lambda: [batch.state_dict() for batch in batches[:count]])
        drawn = [states[0] | {"samples": [s for part in states for s in part["samples"]]} for states in zip(*parts)]
        position = batches[count].position if count < len(batches) else self.stream.position
        return {"prompt_position": position, "ahead": drawn} | history

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Takes up what `state_dict` gave before `step`, and gives the engine the present weights."""
        self.stream.position = state["prompt_position"]
        self.stream.load_history(state.get("prompt_history"))
        drawn, depth = state.get("ahead") or [], self.cfg.rollout.async_steps
        if drawn and "samples" not in drawn[0]:  # of one step, in checkpoints of earlier versions
            before = self.stream.position - self.cfg.train.prompts_per_step
            drawn = [{"step": step, "position": before, "samples": drawn}]
        fits = [b["step"] - s["weight_version"] <= depth for b in drawn for s in b["samples"]]
        if drawn and not all(fits):  # drawn under a greater depth
            self.stream.position, drawn = drawn[0]["position"], []
        if self.ahead is not None:
            for batch in drawn:
                mine = self.world.share(len(batch["samples"]))
                batch["samples"] = batch["samples"][mine.start : mine.stop]
            self.ahead.load(drawn)
        self.version, self.sent = step, None
        self._sync_engine()
        self.sent = step

"""The AMFT loop's step, top to bottom as the paper has it (run/loop.py repeats it, evaluates, records and saves).

warm up on demos; H* ← entropy of the warmed-up policy on its own rollouts
for each step:
    rollouts ← engine.generate(prompts, G per prompt);  A ← advantages(rewards)
    which demonstrations and rollouts enter, with which weights (mixtures/; all, by μ, unless a method says else)
    after a block of one of the two, a look at held-out prompts: on, or back and μ ← the other (controller/blocks.py)
    with a windowed signal, at the start of a window:  u ← ∇(−U) on held-out prompts, in two independent halves
    backward SFT micro-batches · μ      probe: ⟨u, g_SFT⟩
    backward RL micro-batches · (1−μ)   probe: ⟨u, g_RL⟩
    optimizer.step();  engine.sync(weights)
    at the end of a window:  μ moves (controller/windows.py)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from amft_fast import controller, gradient_noise, mixtures, objective
from amft_fast.config import Config
from amft_fast.data.batch import TokenSequence
from amft_fast.data.loader import Loader
from amft_fast.data.stream import Stream
from amft_fast.engine.parts import Part, Tensors
from amft_fast.engine.phases import Phases
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Demo, Item, RolloutEngine, Sample, Task, UpdateEngine
from amft_fast.looks import Looks, held_out_prompts
from amft_fast.losses import EntropyBonus
from amft_fast.meta_gradient import Utility, UtilityGradient
from amft_fast.mixtures.base import Group, Mix, groups_of
from amft_fast.mixtures.demos import DemoOfPrompt
from amft_fast.model.figures import LeftOut, Update, read_updates
from amft_fast.model.policy import MAXES, SUMS, Policy
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.rollouts import Drawn, Rollouts, sent
from amft_fast.scoring import Scorer

T = TypeVar("T")
KEPT = "kept."  # before the names of what a block may be taken back to, in a checkpoint


@dataclass
class Parts:
    """What a trainer works with (run/build.py makes it)."""

    task: Task
    encoder: Encoder
    policy: Policy
    engine: UpdateEngine
    rollout_engine: RolloutEngine
    phases: Phases
    should_stop: Callable[[], bool]
    teacher: nn.Module | None = None  # of on-policy distillation, frozen


class Step(NamedTuple):
    """What one step did and measured; run/recorder.py makes a line of metrics.jsonl of it."""

    number: int  # from 0, the warm-up's included
    warmup: bool
    mu: float
    lr: float
    drawn: Drawn
    figures: dict[str, Any]  # of the updates, the scorer and the controller
    bad_in_row: int  # updates skipped in a row up to here because something was not finite
    tokens: int  # sampled plus trained on, the controller's own included
    seconds: float
    failure: RolloutFailure | None  # the rollout engine did not take the new weights; the step itself is done


class Looked(NamedTuple):
    """What a controller was told before an update: figures of it, and the tokens it took."""

    figures: dict[str, float]
    tokens: int


class Trainer:
    """The method: its parts, its state, its step."""

    def __init__(self, cfg: Config, parts: Parts) -> None:
        self.cfg, self.phases, self.should_stop = cfg, parts.phases, parts.should_stop
        self.engine, self.policy, self.encoder = parts.engine, parts.policy, parts.encoder
        self.controller = controller.make(cfg)
        self.scorer = Scorer(cfg, parts.engine, parts.policy, parts.teacher)
        self.scorer.before_batch = self._stop_if_asked
        self.undoable = False  # whether what is under way can be broken off
        self.demonstrations = parts.task.demos("train")
        order = Stream(max(len(self.demonstrations), 1), cfg.run.seed, "demos")
        self.demos = Loader(order, self._demo, cfg.train.data_workers)
        tools = mixtures.Tools(DemoOfPrompt(parts.task, self._encoded), self.scorer.tokens)
        self.plain, self.mixture = mixtures.Mixture(cfg, tools), mixtures.make(cfg, tools)
        self._check_needs(parts.task)
        self.rollouts = Rollouts(
            cfg,
            parts.rollout_engine,
            parts.task,
            parts.encoder,
            parts.engine.world,
            parts.phases,
            sent(cfg, parts.engine),
        )
        self.rollouts.generations = self.mixture.generations
        self.rollouts.hints = lambda: copy(self.mixture).hint  # threads read no progress that the next step changes
        self.looks = Looks(cfg, self.controller, parts.task, self._encoded, self.rollouts, self.scorer)
        self.kept: Any = None  # weights and moments that a block may be taken back to
        self.updates = 1  # of a step that imitates
        self.utility_gradient = self._make_utility(parts.task) if cfg.takes_utility else None
        self.step = 0
        self.entropy_target: float | None = None  # H*
        self.entropy_bonus = EntropyBonus(cfg.objective)  # c_H
        self.tokens = self.warmup_tokens = 0
        self.mus: list[float] = []  # the first and the last
        self.looked = Looked({}, 0)  # before a step that is not done yet

    def _check_needs(self, task: Task) -> None:
        """What the method needs must be there, before any time is spent."""
        cfg = self.cfg.train
        imitates = (
            cfg.warmup_steps > 0 or not self.mixture.streams or any(self.controller.mu(t) > 0 for t in range(cfg.steps))
        )
        if imitates and not self.demonstrations:
            raise UserError(f"train.method {cfg.method!r} (or its warm-up) needs demonstrations and the task has none")
        draws = any(self.controller.mu(t) < 1 for t in range(cfg.steps))
        if draws and not task.prompts("train"):
            raise UserError(
                f"train.method {cfg.method!r} draws answers to judge, and the task has no training prompts (of mathematics: no "
                "problem with a gold answer); method sft needs demonstrations alone"
            )

    def _make_utility(self, task: Task) -> UtilityGradient:
        cfg = self.cfg
        items = held_out_prompts(cfg, task, cfg.meta.prompts)
        demos = {d.id: d for d in task.demos("val")} if cfg.meta.utility != "reward" else {}
        temperature = cfg.rollout.temperature
        return UtilityGradient(cfg.meta, items, demos, self.encoder, self.engine, self.scorer.batches, temperature)

    def _demo(self, i: int) -> TokenSequence:
        return self._encoded(self.demonstrations[i])

    def _encoded(self, demo: Demo) -> TokenSequence:
        return objective.demo_sequence(*self.encoder.demo(demo))

    # ------------------------------------------------------------------------------------------------------ the clock

    @property
    def total(self) -> int:
        return self.cfg.train.warmup_steps + self.cfg.train.steps

    @property
    def finished(self) -> bool:
        budget = self.cfg.train.token_budget
        return self.step >= self.total if budget is None else self.tokens >= budget

    @property
    def clock(self) -> float:
        """The position of the run on a scale of `train.steps`: steps after the warm-up, or the token budget's used share."""
        cfg = self.cfg.train
        if cfg.token_budget is None:
            return self.step - cfg.warmup_steps
        if self.step < cfg.warmup_steps:
            return -1
        used = (self.tokens - self.warmup_tokens) / max(cfg.token_budget - self.warmup_tokens, 1)
        return min(used, 1.0) * cfg.steps

    def clock_of(self, tokens: int) -> float:
        """By how much that many tokens beside the steps move the clock on: where steps are counted, by nothing."""
        cfg = self.cfg.train
        if cfg.token_budget is None:
            return 0.0
        return tokens / max(cfg.token_budget - self.warmup_tokens, 1) * cfg.steps

    # ------------------------------------------------------------------------------------------------------- the step

    def train_step(self) -> Step:
        """Rollouts, advantages, `minibatches_per_rollout` updates, new weights to the rollout engine, μ's move."""
        begin = time.perf_counter()
        self.look(self.step - self.cfg.train.warmup_steps)
        with self.undone_on_stop():
            return self._train_step(begin)

    def _train_step(self, begin: float) -> Step:
        cfg = self.cfg.train
        t = self.step - cfg.warmup_steps  # negative in the warm-up
        looked = (
            self.look_at_validation(self.looked)
            if self.looks.demos and self.controller.wants_validation(t, self.clock)
            else self.looked
        )
        mu = 1.0 if t < 0 else self.controller.mu(self.clock)
        lr = self.learning_rate(t, mu)
        mixture = self.plain if t < 0 else self.mixture
        mixture.progress = max(self.clock, 0) / cfg.steps
        drawn = self.rollouts.draw(self.step) if mu < 1 else self.rollouts.draw_none()
        fresh = self.controller.starts_window(t)
        u = self.draw_utility() if fresh else self.utility
        self.rollouts.draw_ahead(self.step, self.last_ahead(mu))
        updates = self.updates if mu == 1 and t >= 0 else 1  # a step has the compute of one that explores
        sft = self.demos.take(cfg.demos_per_step * updates) if mu > 0 and mixture.streams else []
        with self.phases("advantage"):
            groups = groups_of(drawn.samples, self.scorer.judge(drawn.samples, mixture.kind, self.step))
            m = updates if updates > 1 else cfg.minibatches_per_rollout
            mixes = [mixture.mix(_share(sft, k, m), _share(groups, k, m), mu) for k in range(m)] + mixture.extra()
            sft, rl = ([s for mix in mixes for s in mix[part]] for part in (0, 1))
            scored = self.scorer.figures(sft, [s for group in groups for s in group.rollouts])
        if self.controller.wants_noise(t):
            looked = self.look_at_noise(sft, groups)

        self.engine.set_lr(lr)
        done = []
        for k, mix in enumerate(mixes):
            probe = u if k == 0 and self.controller.probes(t) else None
            with self.phases("update"):
                done.append(self.update(mix, probe, k))
        mu = fmean(mix.mu for mix in mixes)
        self.step += 1
        failure = self.rollouts.sync(self.step)

        measured = read_updates(done, self.engine, self.cfg.objective.kl_coef > 0, self.policy.value_head is not None)
        figures = measured.record | scored | looked.figures
        if t >= 0:
            dots, clip = measured.probe or (None, 1.0)  # ⟨u, g_SFT⟩, ⟨u, g_RL⟩ and the norms, of the first update
            figures |= self.controller.observe(t, dots, clip, lr, figures.get("entropy"), self.entropy_target)
            if groups:
                self.controller.explored(any(g.solved or np.ptp(g.rewards) > 0 for g in groups))
            self.mus = [*(self.mus[:1] or [mu]), mu]
            if self.cfg.objective.entropy_target is not None:
                figures["entropy_coef"] = self.entropy_bonus.coef
            self.entropy_bonus.observe(figures.get("entropy"))
        if fresh:
            figures |= {f"controller/{name}": value for name, value in u.figures.items()}
        counts = self.count_tokens(sft, rl, drawn)
        figures |= counts
        tokens = sum(counts.values()) + looked.tokens + int(u.figures.get("tokens", 0) if fresh else 0)
        self.looked = Looked({}, 0)
        self.tokens += tokens
        seconds, number = time.perf_counter() - begin, self.step - 1
        return Step(number, t < 0, mu, lr, drawn, figures, measured.bad_in_row, tokens, seconds, failure)

    @contextmanager
    def undone_on_stop(self) -> Iterator[None]:
        """What a stop or a failing rollout engine breaks off in here leaves all as it was: on resume it is done again, and the
        same comes of it.

        A stop may come while answers are drawn and, up to the optimizer's step, between micro-batches. Several processes, and
        one that draws ahead, finish their updates.
        """
        places = self.rollouts.stream, self.demos.stream
        positions, rng = [p.position for p in places], torch.get_rng_state()
        states = [(part, deepcopy(part.state_dict())) for part in (self.controller, self.mixture)]
        self.undoable = self.engine.world.size == 1 and self.rollouts.ahead is None
        try:
            yield
        except (InterruptedError, RolloutFailure):
            for place, position in zip(places, positions):
                place.position = min(position, place.position)  # before: what was drawn ahead has been given up
            for part, state in states:
                part.load_state_dict(state)
            torch.set_rng_state(rng)
            self.engine.zero_grad()
            raise
        finally:
            self.undoable = False

    def _stop_if_asked(self) -> None:
        if self.undoable and self.should_stop():
            raise InterruptedError("stopped between micro-batches")

    def draw_utility(self) -> Utility:
        """u ← ∇(−U) at the present weights, on the held-out prompts (meta_gradient.py)."""

        def draw(items: list[Item], step: int) -> list[Sample]:
            cfg = self.cfg
            return self.rollouts.sample(items, cfg.rollout.temperature, ("utility", step), cfg.meta.num_generations)

        with self.phases("utility"):
            return self.utility_gradient.compute(self.step, draw)

    def look(self, t: int) -> None:
        """The controller is told what held-out prompts earn, where it asks before step t, and its verdict is carried out.

        What it was told stays told when the step breaks off later on: the look is not taken again.
        """
        if not self.looks.prompts or not self.controller.wants_look(t, self.clock):
            return
        with self.phases("utility"):
            with self.undone_on_stop():
                look = self.looks.take(self.step, self.controller.reads_demos)
            verdict, figures = self.controller.looked(look.held_out, self.clock + self.clock_of(look.tokens))
            self.looked, self.updates = Looked(figures, look.tokens), self.updates_of_a_step(look.samples)
            if verdict == "keep":
                self.kept = self.engine.snapshot()
            elif verdict == "back":
                self.engine.restore(self.kept)
                self.rollouts.replace()

    def updates_of_a_step(self, samples: list[Sample]) -> int:
        """How many updates that imitate cost as many tokens as a step that explores, by answers like those to come."""
        cfg = self.cfg
        answer = fmean(len(s.prompt_ids) + len(s.response_ids) + sum(s.loss_mask) for s in samples)
        demo = fmean(len(self._demo(i).ids) for i in range(min(len(self.demonstrations), 64)))
        explores = cfg.train.prompts_per_step * cfg.rollout.num_generations * answer
        return max(1, round(explores / (cfg.train.demos_per_step * demo)))

    def look_at_validation(self, so_far: Looked) -> Looked:
        """The controller is told how likely held-out demonstrations are now."""
        with self.phases("utility"):
            logprobs, tokens = self.looks.read()
        return Looked(so_far.figures | self.controller.validated(logprobs), so_far.tokens + tokens)

    def look_at_noise(self, sft: list[TokenSequence], groups: list[Group]) -> Looked:
        """The controller is told how noisy the two gradients of this step are, from halves of its demonstrations and
        prompts."""
        halves, tokens = [], 0
        with self.phases("utility"):
            for half in (0, 1):
                rl = [s for group in groups[half::2] for s in group.rollouts]
                weighed_sft, weighed_rl = self.weigh(Mix(sft[half::2], rl, 0.5, 1.0, 1.0), 0)
                tokens += sum(len(s.ids) for s in weighed_sft + weighed_rl)
                halves.append((weighed_sft, self.without_flat(weighed_rl)[0]))
            noise = gradient_noise.measure(halves, self.sweep, self.engine)
        return Looked(self.controller.noise(*noise), tokens)

    @property
    def utility(self) -> Utility | None:
        """The u of the present window."""
        return self.utility_gradient.current if self.utility_gradient is not None else None

    def update(self, mix: Mix, u: Utility | None = None, k: int = 0) -> Update:
        """One optimizer update on L = μ L_SFT + (1−μ) L_RL, the k-th since the rollouts were drawn.

        Plain: SFT and RL rows ride in the same calls of the head. With `u`: two sweeps, one for each gradient, and the probe's
        dot-products of both with u.
        """
        sft, rl = self.weigh(mix, k)
        rl, left_out = self.without_flat(rl)
        routing = self.policy.routing
        routing.begin_update()
        if u is None:
            (sums, maxes), probe = self.sweep(sft + rl), None
        else:
            sft_sums, sft_maxes = self.sweep(sft)
            self.engine.end_sweep("sft")
            rl_sums, rl_maxes = self.sweep(rl)
            self.engine.end_sweep("rl")
            sums, maxes, probe = sft_sums + rl_sums, torch.maximum(sft_maxes, rl_maxes), self.engine.probe(u.halves)
        return Update(sums, maxes, self._optimize(), probe, left_out, routing.end_update(self.engine.world))

    def _optimize(self) -> Any:
        self.undoable = False
        return self.engine.step()

    def weigh(self, mix: Mix, k: int) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """The sequences of L_SFT and L_RL with the weights of each token, as the k-th update takes them."""
        cfg = self.cfg
        value_coef = cfg.advantage.value_coef if self.policy.value_head is not None else 0.0
        rl = self.scorer.fold(mix.rl, k > 0, (cfg.run.seed, self.step, k))
        counts = objective.count_tokens(mix.sft, rl)
        sft = objective.weigh_sft(mix.sft, mix.sft_weight, counts.sft)
        longest, bonus = cfg.rollout.max_new_tokens, self.entropy_bonus.coef
        rl = objective.weigh_rl(rl, mix.rl_weight, counts, cfg.objective, value_coef, longest, bonus)
        return sft, rl

    def without_flat(self, rl: list[TokenSequence]) -> tuple[list[TokenSequence], LeftOut]:
        """Weighed RL sequences without those that reach no gradient, unless the config says else. Routers are balanced on
        all."""
        every = not self.cfg.train.skip_flat or self.cfg.model.router_aux_coef
        return (rl, LeftOut()) if every else objective.leave_out_flat(rl, self.cfg.objective)

    def sweep(self, sequences: list[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward over all micro-batches of these sequences; statistics as device sums and maxima."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.engine.device)
        maxes = torch.zeros(len(MAXES), dtype=torch.float64, device=self.engine.device)
        for batch in self.scorer.batches(sequences):
            out = self.engine.backward(batch)
            sums += out.sums
            maxes = torch.maximum(maxes, out.maxes)
        return sums, maxes

    def learning_rate(self, t: int, mu: float) -> float:
        """The learning rate of step t after the warm-up (negative: in it).

        The warm-up and what follows it are two stages, each with its own rise over `lr_warmup_steps` and its own schedule;
        updates that only imitate have their own peak, `sft_lr`. Moments that a verdict has emptied again rise again.
        """
        cfg = self.cfg.train
        peak = cfg.sft_lr if mu == 1 and cfg.sft_lr else cfg.lr
        done, progress = (t, self.clock / cfg.steps) if t >= 0 else (self.step, self.step / cfg.warmup_steps)
        risen = min(done, self.engine.attempts) + 1
        ramp = min(1.0, risen / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
        shape = {
            "constant": 1.0,
            "linear": 1 - 0.9 * progress,
            "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * progress)),
        }[cfg.lr_schedule]
        return peak * ramp * shape

    def last_ahead(self, mu: float) -> int:
        """The last step whose rollouts may be drawn while this one trains; this one where none will be needed.

        A token budget may run past `train.steps`. Whether this step is the last is not known before it has been counted,
        so what was drawn ahead last may go unused.
        """
        if mu == 1:
            return self.step
        last = self.step + self.cfg.rollout.async_steps
        return last if self.cfg.train.token_budget is not None else min(last, self.total - 1)

    @staticmethod
    def count_tokens(sft: list[TokenSequence], rl: list[TokenSequence], drawn: Drawn) -> dict[str, int]:
        """Tokens of a step: sampled (what dynamic sampling threw away and what was drawn ahead in vain included), and
        trained on, prompts included."""
        in_vain = sum(drawn.figures.get(name, 0) for name in ("dynamic/tokens", "dropped_tokens"))
        sampled = sum(sum(s.loss_mask) for s in drawn.samples) + int(in_vain)
        return {"tokens_sampled": sampled, "tokens_trained": sum(len(s.ids) for s in sft + rl)}

    def after_warmup(self) -> None:
        """Before the first step after the warm-up: H*, where a controller asks for it, and the reference of the KL term."""
        with self.undone_on_stop():
            self._after_warmup()

    def _after_warmup(self) -> None:
        self.warmup_tokens = self.tokens
        if self.controller.needs_entropy_target and self.entropy_target is None:
            cfg = self.cfg
            prompts = list(self.rollouts.prompts[: cfg.train.prompts_per_step])
            samples = self.rollouts.sample(prompts, 1.0, ("entropy target",), cfg.rollout.num_generations)
            self.entropy_target = self.scorer.entropy([objective.rollout_sequence(s, 1.0) for s in samples])
        if self.scorer.reference is None:
            self.scorer.keep_reference()

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All but tensors, as JSON values; `step` is the checkpoint's own. Every rank must call it."""
        utility = self.utility_gradient.state_dict() if self.utility_gradient else {"utility_weight": 0.0, "cache": []}
        return {
            "method": self.cfg.train.method,
            **self.rollouts.state_dict(),
            "demo_position": self.demos.stream.state_dict(),
            "controller": self.controller.state_dict(),
            **utility,
            "entropy_target": self.entropy_target,
            "entropy_coef": self.entropy_bonus.coef,
            "router_load": self.policy.routing.state_dict(),
            "mixture": self.mixture.state_dict(),
            "warmup_tokens": self.warmup_tokens,
            "mus": self.mus,
            "looked": list(self.looked),
            "updates": self.updates,
            "tokens": self.tokens,
        }

    def tensors(self) -> dict[str, torch.Tensor | Part]:
        """This rank's tensors for a checkpoint."""
        utility = self.utility_gradient.tensors() if self.utility_gradient is not None else {}
        kept = self.engine.saved_snapshot(self.kept) if self.kept else {}
        kept = {KEPT + name: tensor for name, tensor in kept.items()}
        return dict(self.engine.state_dict()) | kept | utility | self.scorer.tensors()

    def load(self, state: dict[str, Any], tensors: Tensors) -> None:
        """Takes up what `state_dict` and `tensors` gave. Raises UserError for another method's state, ValueError for another
        model's."""
        if state["method"] != self.cfg.train.method:
            raise UserError(
                f"--resume: the checkpoint is of method {state['method']!r}, the config says {self.cfg.train.method!r}"
            )
        kept = tensors.under(KEPT)
        if kept:
            self.engine.load_state_dict(kept)
            self.kept = self.engine.snapshot()
        self.engine.load_state_dict(tensors)
        self.scorer.load_tensors(tensors)
        self.demos.stream.load_state_dict(state["demo_position"])
        self.controller.load_state_dict(state["controller"])
        if self.utility_gradient is not None:
            self.utility_gradient.load(state, tensors)
        self.step, self.entropy_target = state["step"], state["entropy_target"]
        self.entropy_bonus.coef = state.get("entropy_coef", self.entropy_bonus.coef)
        self.mixture.load_state_dict(state.get("mixture"))
        self.policy.routing.load_state_dict(state.get("router_load"), self.engine.device)
        self.looked, self.updates = Looked(*state.get("looked", ({}, 0))), state.get("updates", 1)
        self.warmup_tokens, self.tokens, self.mus = state["warmup_tokens"], state["tokens"], state["mus"]
        self.rollouts.load_state_dict(state, self.step)


def _share(things: list[T], k: int, m: int) -> list[T]:
    """The k-th of m equal runs of the list."""
    n = len(things)
    return things[k * n // m : (k + 1) * n // m]

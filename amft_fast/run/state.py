"""The whole state of a run, to a checkpoint and back: a run resumed from it goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from amft_fast.engine.parts import Tensors
from amft_fast.errors import UserError
from amft_fast.meta_gradient import Utility
from amft_fast.model.policy import fill
from amft_fast.run import checkpoint

if TYPE_CHECKING:
    from amft_fast.train import Trainer


def save(trainer: Trainer) -> Path:
    """The whole state: a run resumed from it goes on as if it had never stopped."""
    with trainer.phases("checkpoint"):
        tensors = dict(trainer.engine.state_dict())
        if trainer.world.main:
            tensors["rng.cpu"] = torch.get_rng_state()
        if trainer.utility is not None:  # a window may be half over, and its u belongs to weights that are gone
            for i, half in enumerate(trainer.utility.halves):
                parts = trainer.engine.by_name(half)
                tensors |= {f"utility.{i}.{p.name}": p.saved_data(u) for p, u in parts}
        if trainer.reference is not None and trainer.world.main:
            tensors |= {f"reference.{n}": p for n, p in trainer.reference.named_parameters()}
        state = {
            "method": trainer.cfg.train.method,
            "prompt_position": trainer.prompt_stream.position,
            "demo_position": trainer.demo_stream.position,
            "ahead": _drawn_ahead(trainer) if trainer.ahead is not None else None,
            "controller": trainer.controller.state_dict(),
            "utility_weight": trainer.utility_gradient.weight if trainer.utility_gradient is not None else 0.0,
            "cache": trainer.utility_gradient.cache.state_dict() if trainer.utility_gradient is not None else [],
            "entropy_target": trainer.entropy_target,
            "evaluated_step": trainer.evaluated_step,
            "evaluations": trainer.evaluations,
            "warmup_tokens": trainer.warmup_tokens,
            "mus": trainer.mus,
            "tokens": trainer.tokens,
            "wall_s": trainer.wall(),
            "best": trainer.best,
            "results": trainer.results,
        }
        path = checkpoint.save(trainer.files.checkpoints, trainer.step, tensors, state, trainer.world)
        if trainer.world.main:
            checkpoint.prune(trainer.files.checkpoints, trainer.cfg.checkpoint.keep_last)
        trainer.saved_step = trainer.step
    return path


def _drawn_ahead(trainer: Trainer) -> list[dict[str, Any]] | None:
    """The rollouts that wait for the next step, of all ranks; each takes its share of them back."""
    parts = trainer.world.together(trainer.ahead.state_dict)
    return None if parts[0] is None else [sample for part in parts for sample in part]


def load(trainer: Trainer, tensors: Tensors, state: dict[str, Any]) -> None:
    """Takes up the state of a checkpoint."""
    if state["method"] != trainer.cfg.train.method:
        raise UserError(
            f"--resume: the checkpoint is of method {state['method']!r}, the config says {trainer.cfg.train.method!r}"
        )
    trainer.engine.load_state_dict(tensors)
    torch.set_rng_state(tensors["rng.cpu"])
    reference = [k for k in tensors if k.startswith("reference.")]
    if reference:
        trainer.reference = trainer.engine.plain_copy()
        fill(trainer.reference, ((k.removeprefix("reference."), tensors[k]) for k in reference))
    trainer.step = trainer.saved_step = state["step"]
    trainer.prompt_stream.position, trainer.demo_stream.position = state["prompt_position"], state["demo_position"]
    if trainer.ahead is not None:
        drawn = state.get("ahead")
        mine = trainer.world.share(len(drawn or []))
        trainer.ahead.load_state_dict(None if drawn is None else drawn[mine.start : mine.stop])
    trainer.controller.load_state_dict(state["controller"])
    if trainer.utility_gradient is not None:
        trainer.utility_gradient.cache.load_state_dict(state["cache"])
    if any(k.startswith("utility.") for k in tensors):
        halves = [trainer.engine.from_names(tensors, f"utility.{i}.") for i in (0, 1)]
        trainer.utility = Utility((halves[0], halves[1]), {})
        trainer.utility_gradient.average, trainer.utility_gradient.weight = (
            trainer.utility.halves,
            state["utility_weight"],
        )
    trainer.entropy_target, trainer.evaluated_step = state["entropy_target"], state["evaluated_step"]
    trainer.evaluations, trainer.warmup_tokens = state["evaluations"], state["warmup_tokens"]
    trainer.mus, trainer.tokens, trainer.wall_before = state["mus"], state["tokens"], state["wall_s"]
    trainer.best, trainer.results = state["best"], state["results"]
    trainer.rollouts.sync(trainer.engine.named_full_params(), trainer.step)

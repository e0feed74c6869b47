"""Imitate as long as it shows, take back what did not, then explore: μ is 1 or 0, and what is absent costs nothing.

A run begins with a look at held-out prompts (their mean rewards, on answers drawn for it) and a block of imitation,
`imitation_share` of the run's compute. Then there is another look:

    shown      the mean reward has risen (paired by prompt, Student's t over `confidence`), or what was dead has come alive:
               the block stays, and another begins that brings as much imitation again as there was up to here
    dead       the answers to all but `min_alive` of the prompts earned the same and are not right: there is nothing to
               explore from, so that the block stays and another begins
    solved     over `solved` of the answers are right, and a block before this one has stayed: there are few mistakes left
               to learn from, and what imitation has brought can be lost, so that it stays too and another begins
    not shown  weights and optimizer go back to where the block began, and from there on the run explores

So imitation costs at most the last block, `imitation_share` where it is of no use at all; it ends after at most twice what was
of use; and exploring begins where imitation last did some good, not where it had done some harm. If for `window` steps no
answer of a step earns more than another and none is right, a look is taken and, where it says dead, imitation begins again.

A step has the compute of one that explores, whatever it does: one that imitates makes as many updates as cost the same.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from amft_fast.config import Config
from amft_fast.controller.base import Controller, named
from amft_fast.data.stream import sample_seed
from amft_fast.held_out import HeldOut

Verdict = Literal["begin", "stay", "back", "none"]


class BlockController(Controller):
    """Asked before each step whether it wants a look, and told of it: the verdict says what becomes of the weights."""

    learned = True

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.c = cfg, cfg.controller
        self.value = self.c.mu_init  # until the first look
        self.imitated = 0.0  # compute in steps, what was taken back left out
        self.block = 0.0  # length of the present block, in steps
        self.ends = -math.inf  # clock at which it ends
        self.rewards: list[float] = []  # of each prompt, at the beginning of the block
        self.was_dead = False
        self.barren = 0  # steps in a row whose answers taught nothing

    def mu(self, clock: float) -> float:
        return self.value

    def wants_look(self, step: int, clock: float) -> bool:
        """Whether answers to the held-out prompts are to be drawn before this step."""
        if step < self.c.start_step:
            return False
        return clock >= self.ends if self.value > 0 else self.barren >= self.c.window

    def looked(self, held_out: HeldOut, clock: float) -> tuple[Verdict, dict[str, float]]:
        """What becomes of the weights: a block begins with them, they stay and another begins, they go back to where the block
        began, or nothing; and figures."""
        alive = float(held_out.alive.mean())
        figures = {
            "alive": alive,
            "right": held_out.right,
            "reward": float(held_out.rewards.mean()),
            "tokens": held_out.sampled,
        }
        dead, solved = alive < self.c.min_alive, held_out.right > self.c.solved and self.imitated > 0
        first, exploring = not self.rewards, self.value == 0
        self.barren = 0
        if exploring and not dead:
            verdict: Verdict = "none"
        elif first or exploring:
            verdict = "begin"
        else:
            t = student(held_out.rewards - np.array(self.rewards))
            figures["rise_t"] = t
            shown = self._lot() if self.c.signal == "lot" else t > self.c.confidence or self.was_dead
            verdict = "stay" if shown or dead or solved else "back"
        if verdict == "back":
            self.value = 0.0
        elif verdict != "none":
            done = 0.0 if verdict == "begin" else self.imitated + self.block
            self.block = max(done, self.c.imitation_share * self.cfg.train.steps)
            self.imitated, self.ends, self.value = done, clock + self.block, 1.0
            self.rewards, self.was_dead = held_out.rewards.tolist(), dead
        return verdict, named(figures | {"mu_next": self.value})

    def _lot(self) -> bool:
        return bool(sample_seed(self.cfg.run.seed, "lot", *self.rewards) % 2)

    def explored(self, alive: bool) -> None:
        """After a step with rollouts: whether some answers to a prompt earned differently, or were right."""
        self.barren = 0 if alive else self.barren + 1

    def state_dict(self) -> dict[str, Any]:
        state = {k: getattr(self, k) for k in ("value", "imitated", "block", "rewards", "was_dead", "barren")}
        return state | {"ends": self.ends if math.isfinite(self.ends) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self.ends = -math.inf if self.ends is None else self.ends


def student(values: np.ndarray) -> float:
    """Mean over its standard error; 0 where there is no spread to judge by."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) / error if error > 0 else 0.0

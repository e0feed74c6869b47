"""Imitate as long as it shows, take back what did not, then explore: μ is 1 or 0, and what is absent costs nothing.

A run begins with a look at what is held out (the mean rewards of prompts, on answers drawn for it, and the loss of
demonstrations) and a block of imitation, `imitation_share` of the run's compute. At the end of each block there is another
look, compared with the one at the weights that are kept: t, Student's t of the rewards' rise, paired by prompt, and z, the
signed-rank statistic of the fall of the loss beyond a margin of 3 % of it, paired by demonstration. Rewards have risen or
fallen where |t| is beyond `confidence`.

    imitating  fallen                    back to the kept weights and moments, and explore
               enough                    these weights are kept, and explore: see below
               shown, or come alive      these weights are kept, and as much imitation again as there was so far, a quarter of
                                         the run at most. Shown: (t + z)/√2 is over `confidence`, z counted to twice of it; from
                                         the second block on over −`confidence`: what has shown before must be seen to harm.
                                         Where the first look's luck leaves imitation the whole run (see below), z over
                                         `confidence` is enough, until exploring has risen once
               dead                      the same: there is nothing to explore from. The answers to all but `min_alive` of the
                                         prompts earned the same and are not right
               solved                    the same: over `solved` of the answers are right and imitation has made them so. There
                                         are few mistakes left to learn from, and what is there can be lost
               else                      back to the kept weights and moments, and explore
    exploring  fallen                    back to the kept ones, and imitate: twice as long as this block, or as the last of
                                         imitation that did not show. From here on imitation is taken back where it falls, not
                                         where it does not rise. Where the first look's luck leaves imitation the whole run (see
                                         below), t under 0 is a fall until exploring has risen once
               risen                     these are kept; exploring goes on
               else                      exploring goes on

Enough is where imitation, having shown, has had twice the share of the run that the share of the rewards' variance between
prompts is (one minus `luck`, the mean over its looks), unless it has only just come alive.
Exploring learns from answers to one prompt that earn differently, and imitation brings what no answer to a prompt shows: where
success is luck, and any prompt is solved now and then, exploring makes much of it; where it is the prompt's, and half of the
variance lies between prompts, imitation has the whole run (docs/method.md).

The first half of imitation that begins without a warm-up, or begins again, goes into the form of the demonstrations, which
becomes likelier whatever is learned: there z is of the second half. A block of imitation that would leave less than half of
itself to the run goes on to its end, and so does one of exploring that would leave less than half of the first. Blocks of
exploring double from `imitation_share` on. If for `window` steps no answer of a step earns more than another and none is
right, a look is taken at once, and imitation begins again where it says dead.

A step has the compute of one that explores, whatever it does: one that imitates makes as many updates as cost the same.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Literal

import numpy as np

from amft_fast.config import Config
from amft_fast.controller.base import Controller, named
from amft_fast.controller.statistics import signed_rank, student
from amft_fast.data.stream import sample_seed
from amft_fast.held_out import HeldOut, losses

Verdict = Literal["keep", "back", "go on"]

LONGEST = 0.25  # of the run, for a block of imitation
MOST = 2.0  # shares of the run for imitation, for each share of the variance of rewards that is not luck
STATE = (
    "value",
    "block",
    "ends",
    "rewards",
    "nll",
    "lucks",
    "doubted",
    "settling",
    "was_dead",
    "imitated",
    "in_vain",
    "fell",
    "barren",
)
MARGIN = 0.03  # of its loss: a demonstration that became likelier by less has not
LATER_ASKED = -1.0  # of `confidence`: the evidence that later blocks must have; the first must have all of it


def _share(luck: float) -> float:
    """Of the run, that imitation may have."""
    return MOST * (1 - luck)


class BlockController(Controller):
    """Asked before each step whether it wants a look, and told of it: the verdict says what becomes of the weights."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.c = cfg, cfg.controller
        self.value = self.c.mu_init  # until the first look
        self.block = self.shortest  # length of the present block, in steps
        self.ends = 0.0  # clock at which it ends
        self.rewards: list[float] = []  # of each prompt, at the weights that are kept
        self.nll: list[float] = []  # of each demonstration, at what the present block of imitation is compared with
        self.lucks: list[float] = []  # at the looks that found imitation to have shown
        self.doubted = False  # exploring, by the first look's luck and until it has risen
        self.settling = False  # whether it will be taken again in the middle of the block
        self.was_dead = False  # these
        self.imitated = 0.0  # steps of imitation in them
        self.in_vain = 0.0  # length of the last block of imitation that was taken back
        self.fell = False  # whether exploring has been taken back since
        self.barren = 0  # steps in a row whose answers taught nothing

    @property
    def shortest(self) -> float:
        return self.c.imitation_share * self.cfg.train.steps

    def mu(self, clock: float) -> float:
        return self.value

    def wants_look(self, step: int, clock: float) -> bool:
        """Whether answers to the held-out prompts are to be drawn before this step."""
        return step >= self.c.start_step and (clock >= self.ends or self.barren >= self.c.window)

    @property
    def reads_demos(self) -> bool:
        """Whether a look now is to read held-out demonstrations: after imitation, and after a warm-up, before it."""
        return self.value == 1 or (not self.rewards and self.cfg.train.warmup_steps > 0)

    def wants_validation(self, step: int, clock: float) -> bool:
        return self.settling and self.value == 1 and clock >= self.ends - self.block / 2 - 0.5  # the nearest step

    def validated(self, logprobs: list[np.ndarray]) -> dict[str, float]:
        """The log-probs of each held-out demonstration's tokens in the middle of a block; the figures of it."""
        self.nll, self.settling = losses(logprobs).tolist(), False
        return named({"demo_nll": float(np.mean(self.nll))})

    def looked(self, held_out: HeldOut, clock: float) -> tuple[Verdict, dict[str, float]]:
        """What becomes of the weights: they are kept, they go back to those that are, or neither; and figures.

        `clock`: when the look is over, so that the block that begins is none the shorter for it.
        """
        alive = float(held_out.alive.mean())
        figures = {"alive": alive, "right": held_out.right, "reward": float(held_out.rewards.mean())}
        first, dead = not self.rewards, alive < self.c.min_alive
        t = 0.0 if first else student(held_out.rewards - np.array(self.rewards))
        z = None
        luck = math.nan if self.c.signal == "lot" else held_out.luck  # a run by lot does not ask
        self.doubted |= first and _share(luck) >= 1
        if not math.isnan(held_out.luck):
            figures["luck"] = held_out.luck
        if len(held_out.nll):
            figures["demo_nll"] = float(held_out.nll.mean())
        if not first:
            figures["rise_t"] = t
            if self.value == 1 and len(self.nll) and not self.settling:
                z = figures["demo_rise_z"] = self._likelier(held_out)
        if first or (dead and self.value == 0):
            verdict = self._imitate("keep", self.shortest)
        elif self.value == 0:
            verdict = self._explored(t)
        else:
            solved = held_out.right > self.c.solved and self.imitated > 0
            verdict = self._imitated(t, z, luck, dead or solved)
        if verdict == "keep":
            self.rewards, self.nll, self.was_dead = held_out.rewards.tolist(), held_out.nll.tolist(), dead
        self.barren, self.ends = 0, self._end(clock)
        return verdict, named(figures | {"tokens": held_out.sampled, "mu_next": self.value})

    def _likelier(self, held_out: HeldOut) -> float:
        """z"""
        return signed_rank((1 - MARGIN) * np.array(self.nll) - held_out.nll)

    def _imitated(self, t: float, z: float | None, luck: float, goes_on: bool) -> Verdict:
        most = 2 * self.c.confidence
        evidence = t if z is None else (t + min(max(z, -most), most)) / math.sqrt(2)
        asked = self.c.confidence * (LATER_ASKED if self.imitated else 1)
        learned = self.doubted and z is not None and z > self.c.confidence  # and nothing else to be had
        risen = (evidence > asked or learned) and t > -self.c.confidence
        shown = self._lot() if self.c.signal == "lot" else risen
        if shown or self.was_dead or goes_on or (self.fell and t > -self.c.confidence):
            self.imitated += self.block
            if not math.isnan(luck):
                self.lucks.append(luck)
            if self._is_enough(goes_on):
                return self._explore("keep")
            return self._imitate("keep", max(self.imitated, self.shortest))
        self.in_vain, self.fell = self.block, False
        return self._explore("back")

    def _is_enough(self, goes_on: bool) -> bool:
        if goes_on or self.was_dead or not self.lucks:
            return False
        return self.imitated >= _share(fmean(self.lucks)) * self.cfg.train.steps

    def _explored(self, t: float) -> Verdict:
        if t < (0 if self.doubted else -self.c.confidence):
            self.fell = True
            return self._imitate("back", 2 * max(self.in_vain, self.block))
        self.block *= 2
        if t <= self.c.confidence:
            return "go on"
        self.doubted = False
        return "keep"

    def _explore(self, verdict: Verdict) -> Verdict:
        self.value, self.block = 0.0, self.shortest
        return verdict

    def _imitate(self, verdict: Verdict, block: float) -> Verdict:
        warmed_up = not self.rewards and self.cfg.train.warmup_steps > 0
        self.settling = self.value != 1 and not warmed_up
        self.value, self.block = 1.0, min(block, max(self.shortest, LONGEST * self.cfg.train.steps))
        return verdict

    def _end(self, clock: float) -> float:
        """Of the block that begins now, which leaves nothing to the run or enough for a look to be worth its cost."""
        left = self.cfg.train.steps - clock
        if left - self.block < 0.5 * (self.block if self.value == 1 else self.shortest):
            self.block = left
        return clock + self.block

    def _lot(self) -> bool:
        return bool(sample_seed(self.cfg.run.seed, "lot", *self.rewards) % 2)

    def explored(self, alive: bool) -> None:
        """After a step with rollouts: whether some answers to a prompt earned differently, or were right."""
        self.barren = 0 if alive else self.barren + 1

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

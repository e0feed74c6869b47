"""μ at one of its ends, 1 or 0, by what imitation and exploration bring on held-out prompts for the same compute.

An update that imitates costs a tenth of one that explores or less, so that at a given μ the two are not the same purchase.
Here a step does one of them alone, and pays for that alone. Which, is settled by looks at answers to held-out prompts:

    dead       under `min_alive` of the prompts have answers that earned differently: there is nothing to explore from, imitate
    imitating  looks after 8, 16, 32, ... updates: imitate on while the mean reward has risen since the look before
               (paired by prompt, Student's t over `keep`), else explore
    exploring  looks when `look_share` of the tokens since the last pays for one, at least twice as far apart each time.
               `trial_updates` updates imitate, and are taken back: their gain g_S (held_out.py) per token. Where it is over 0,
               the gain g_R per token of the next `window` steps is taken on the same answers; imitate if g_S > g_R. Both by
               Student's t over `confidence`, one number a prompt: without evidence for imitation, explore.

Exploring is what is done in doubt: a little too much imitation has cost more than it brings (docs/study.md).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from amft_fast.config import Config
from amft_fast.controller.base import Controller
from amft_fast.data.stream import sample_seed

IMITATE, EXPLORE = 1.0, 0.0


class TrialController(Controller):
    """Asked before each step: `wants_rate`, then `wants_look`; told of what they bring by `drawn`, `tried` and `explored`."""

    learned = True

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.c = cfg, cfg.controller
        self.value = self.c.mu_init  # until the first look
        self.steps = 0  # of the present kind
        self.next_steps = 0  # of imitation, at which the next look is due
        self.next_tokens = 0  # at which it is due, where exploring
        self.apart = 0.0  # tokens between the last two looks
        self.before: list[float] = []  # mean reward of each prompt, at the last look
        self.trial: list[
            float
        ] = []  # gain of imitation for each prompt, per token, while exploration is yet to be told
        self.since = 0  # tokens at which the trial's answers were drawn and paid for

    def mu(self, clock: float) -> float:
        return self.value

    def wants_look(self, step: int, tokens: int) -> bool:
        """Whether answers to the held-out prompts are to be drawn before this step."""
        if step < self.c.start_step or self.trial:
            return False
        return self.steps >= self.next_steps if self.value == IMITATE else tokens >= self.next_tokens

    def wants_rate(self, step: int) -> bool:
        """Whether the gain of exploring since the last look is to be told before this step."""
        return bool(self.trial) and self.steps >= self.c.window

    def drawn(self, rewards: np.ndarray) -> tuple[bool, dict[str, float]]:
        """What the answers earned, [prompts, answers]. Returns whether imitation is to be tried, and figures."""
        alive, mean = float((np.ptp(rewards, axis=1) > 0).mean()), rewards.mean(axis=1)
        figures = {"alive": alive, "reward": float(mean.mean())}
        imitating = self.value == IMITATE
        rise = student(mean - np.array(self.before)) if imitating and self.before else 0.0
        self.before = mean.tolist()
        if alive < self.c.min_alive:
            self._turn(IMITATE, "dead")
        elif imitating:
            figures["rise_t"] = rise
            self._turn(IMITATE if rise > self.c.keep else EXPLORE, "rise")
        else:
            self._turn(EXPLORE, "doubt")
            return True, named(figures | {"mu_next": self.value})
        return False, named(figures | {"mu_next": self.value})

    def tried(self, gains: np.ndarray, tokens: int) -> dict[str, float]:
        """The gain of a trial of imitation for each prompt, and the tokens it trained on."""
        rates = gains / max(tokens, 1)
        t = student(rates)
        self.trial = rates.tolist() if t > self.c.confidence else []
        return named({"gain_sft": 1e6 * float(rates.mean()), "gain_sft_t": t})

    def explored(self, gains: np.ndarray, tokens: int) -> dict[str, float]:
        """The gain of the steps since the trial for each prompt, and the tokens of the whole run so far."""
        rates = gains / max(tokens - self.since, 1)
        t = student(np.array(self.trial) - rates)
        self.trial = []
        if t > self.c.confidence:
            self._turn(IMITATE, "trial")
        return named({"gain_rl": 1e6 * float(rates.mean()), "gain_apart_t": t, "mu_next": self.value})

    def looked(self, tokens: int, cost: int) -> None:
        """A look is over: the tokens of the run so far, the look's own included."""
        self.since = tokens
        if self.value == IMITATE:
            self.next_steps = max(self.c.first_look, 2 * self.steps)
        else:
            self.apart = max(2 * self.apart, cost / self.c.look_share)
            self.next_tokens = tokens + int(self.apart)

    def _turn(self, value: float, reason: str) -> None:
        if self.c.signal == "lot" and reason != "dead":
            value = float(sample_seed(self.cfg.run.seed, "lot", *self.before) % 2)
        if value != self.value:
            self.steps, self.next_steps, self.apart = 0, self.c.first_look, 0.0
        self.value = value

    def observe(self, *measured: Any) -> dict[str, float]:
        self.steps += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        keys = ("value", "steps", "next_steps", "next_tokens", "apart", "before", "trial", "since")
        return {k: getattr(self, k) for k in keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def student(values: np.ndarray) -> float:
    """Mean over its standard error; 0 where there is no spread to judge by."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) / error if error > 0 else 0.0


def named(figures: dict[str, float]) -> dict[str, float]:
    return {f"controller/{k}": v for k, v in figures.items()}

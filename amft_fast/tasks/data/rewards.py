"""Rewards of one's own: how they are named, called, checked and added up.

A reward is `(completions, **columns) -> list[float | None]`, one number per completion, None where it does not apply: TRL's
convention, so that a function written for it runs here as it is. `columns` holds, under each name, the rows' values; those that
a function does not take are left out. Completions are texts, or, where the prompts are lists of messages, lists with the
assistant's message. The function may be `async`, or an instance of a class with `__call__`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from amft_fast.errors import RewardFailure
from amft_fast.tasks import own
from amft_fast.tasks.data.guard import Hang, apart, within

RESERVED = ("reward", "success", "kind", "state")  # mean something else in metrics and info


class Batch(NamedTuple):
    """What rewards are asked about. `places` says where each row stands, as file:line."""

    completions: list[Any]
    columns: dict[str, list[Any]]
    places: list[str]

    def row(self, i: int) -> Batch:
        return Batch([self.completions[i]], {k: [v[i]] for k, v in self.columns.items()}, [self.places[i]])


@dataclass(frozen=True)
class Reward:
    """One reward. `name` is that of its figure, `source` what it was asked for by."""

    name: str
    function: Callable[..., Any]
    source: str

    def __call__(self, batch: Batch, seconds: float) -> list[float | None]:
        """One value per completion. Raises RewardFailure, naming reward and row."""
        try:
            return self._ask(batch, seconds)
        except (Exception, Hang) as whole:
            # Which row it was: one by one. A function that fails on many at once alone has failed on none in particular.
            for i, place in enumerate(batch.places):
                try:
                    self._ask(batch.row(i), seconds)
                except (Exception, Hang) as e:
                    raise RewardFailure(self._said(e, place, seconds)) from (None if isinstance(e, Hang) else e)
            rows = f"{batch.places[0]} to {batch.places[-1]} together"
            raise RewardFailure(self._said(whole, rows, seconds)) from (None if isinstance(whole, Hang) else whole)

    def _ask(self, batch: Batch, seconds: float) -> list[float | None]:
        def work() -> Any:
            given = self._taken(batch.columns)
            values = self.function(completions=batch.completions, **given)
            return apart(lambda: asyncio.run(_awaited(values))) if inspect.isawaitable(values) else values

        return _checked(within(seconds, work), len(batch.completions))

    def _taken(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return columns
        return {p.name: columns[p.name] for p in parameters if p.name in columns}

    def _said(self, error: BaseException, place: str, seconds: float) -> str:
        which = f"reward {self.name!r}" + (f" ({self.source})" if self.source not in ("", self.name) else "")
        if isinstance(error, Hang):
            return f"{which} did not return within {seconds:g} s (task.data.reward_timeout_s) on row {place}"
        if isinstance(error, _NoReward):
            return f"{which} {error} on row {place}"
        text = str(error).strip().splitlines()
        return f"{which} raised {type(error).__name__}: {text[0] if text else 'no message'} on row {place}"


class _NoReward(Exception):
    """What came back is no list of rewards."""


async def _awaited(values: Any) -> Any:
    return await values


def _checked(values: Any, count: int) -> list[float | None]:
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise _NoReward(f"returned {type(values).__name__}, not a list of numbers,")
    if len(values) != count:
        raise _NoReward(f"returned {len(values)} values for {count} completion{'s' if count != 1 else ''}")
    return [_number(v) for v in values]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _NoReward(f"returned {value!r:.60}, which is no finite number,")
    return number


# -------------------------------------------------------------------------------------------------------------- resolution


def resolve(
    asked: Sequence[str | Callable[..., Any]], shipped: Callable[[str], Callable[..., Any] | None]
) -> list[Reward]:
    """The rewards that were asked for, functions as they are and others by name. Raises ValueError or UserError."""
    if not asked:
        raise ValueError("rewards must name at least one reward, for example my_rewards.py:exact, or math")
    rewards = [_named(one, shipped) for one in asked]
    names = [r.name for r in rewards]
    for name in names:
        if name in RESERVED or names.count(name) > 1:
            raise ValueError(f"rewards must have names of their own (and none of {', '.join(RESERVED)}), got {names}")
    return rewards


def _named(one: str | Callable[..., Any], shipped: Callable[[str], Callable[..., Any] | None]) -> Reward:
    if isinstance(one, str):
        function = shipped(one)
        if function is not None:
            return Reward(one, function, one)
        function, source = own.load(one, "task.data.rewards"), one
    else:
        function, source = one, ""
    if inspect.isclass(function):
        function = function()
    if not callable(function):
        raise ValueError(
            f"rewards: {one} is a {type(function).__name__}, not a function or an object that can be called"
        )
    named = getattr(function, "name", None) or getattr(function, "__name__", None)
    if isinstance(function, partial):
        named = getattr(function.func, "__name__", None)
    return Reward(str(named or type(function).__name__), function, source)


# -------------------------------------------------------------------------------------------------------------- adding up


@dataclass(frozen=True)
class Threshold:
    """What counts as solved: the figure `name` is at least (or above) `value`."""

    name: str
    value: float = 1.0
    strict: bool = False

    def met(self, figures: dict[str, float]) -> bool:
        got = figures.get(self.name)
        return got is not None and (got > self.value if self.strict else got >= self.value)


def threshold(text: str, names: Sequence[str]) -> Threshold:
    """`name`, `name >= x` or `name > x`; the first name where nothing is said. Raises ValueError."""
    if not text.strip():
        return Threshold(names[0])
    match = re.fullmatch(r"\s*([^\s<>=]+)\s*(?:(>=|>)\s*(-?[\d.]+(?:e-?\d+)?))?\s*", text)
    if not match or match[1] not in (*names, "reward"):
        raise ValueError(
            f"success must be one of {', '.join((*names, 'reward'))}, or as in '{names[0]} >= 0.5', got {text!r}"
        )
    return Threshold(match[1], float(match[3]), match[2] == ">") if match[2] else Threshold(match[1])

"""Environments of the package verifiers, by name: `--task.name verifiers:NAME`.

NAME is what verifiers itself calls the taskset: an installed package, or a module that can be imported. `task.options` are the
taskset's own settings (`task.options.env`: the environment's), `task.verifiers` sizes, turns and time. The environment says
what the policy is told and judges what came of it; its rewards, weighted as it says, are the sample's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from amft_fast.config import VerifiersConfig
from amft_fast.errors import RewardFailure, UserError, shown
from amft_fast.interfaces import Item, Message, StepResult
from amft_fast.tasks import own
from amft_fast.tasks.items import OfItems


class VerifiersTask(OfItems):
    """The task `verifiers:NAME`. It has no demonstrations.

    Raises UserError when the package or the environment is not there, and for settings that it does not take.
    """

    splits = ("train", "val", "test")

    def __init__(self, name: str, settings: VerifiersConfig, options: dict[str, Any]) -> None:
        self.name, self.settings, self.max_turns = name, settings, settings.max_turns
        env, tasks = load(name, settings, options)
        from amft_fast.tasks.verifiers.host import Host

        self._items = _split(name, tasks, settings)
        self._prompts: dict[str, list[dict[str, Any]]] = {}
        self.host = Host(env, settings.seconds)

    def prepare(self, *_: Any) -> list[str]:
        """How many tasks there are."""
        counts = ", ".join(f"{len(items)} {split}" for split, items in self._items.items())
        return [f"verifiers:{self.name}: {counts}; no demonstrations"]

    def start(self, item: Item) -> VerifiersEpisode:
        return VerifiersEpisode(item, self)

    def step_all(self, episodes: Sequence[VerifiersEpisode], texts: Sequence[str]) -> list[StepResult]:
        """The results of one turn of many episodes, judged at once."""
        from amft_fast.tasks.verifiers.host import AT_ONCE

        results = []
        for at in range(0, len(episodes), AT_ONCE):
            some = episodes[at : at + AT_ONCE]
            for episode in some:
                episode.begin()
            for episode in some:
                episode.begun()
            found = self.host.answer([e.play for e in some], texts[at : at + AT_ONCE], [e.place for e in some])
            results += [episode.result(outcome) for episode, outcome in zip(some, found)]
        return results


class VerifiersEpisode:
    """One run of the environment. What it asks first must be the same in every run of a task: a group shares its prompt.

    Once that is known of a task, further runs go on to it by themselves, side by side.
    """

    def __init__(self, item: Item, task: VerifiersTask) -> None:
        self.item, self.task = item, task
        self.place = f"verifiers:{task.name}, task {item.id}"
        self._said: list[dict[str, Any]] | None = None
        self.play: Any = None
        if item.id in task._prompts and task.host.room:
            self.begin()

    def begin(self) -> None:
        """Lets the environment go on to its first question, if it has not yet."""
        self.play = self.play or self.task.host.begin(self.item.data)

    @property
    def messages(self) -> tuple[Message, ...]:
        if self.item.id not in self.task._prompts:
            self.task._prompts[self.item.id] = self.begun()
        return tuple(_message(m, self.place) for m in self.task._prompts[self.item.id])

    def begun(self) -> list[dict[str, Any]]:
        """The messages that this run has come to."""
        if self._said is None:
            self.begin()
            said = self.task.host.first(self.play, self.place)
            if not isinstance(said, list):
                raise RewardFailure(f"{self.place}: it ended before it asked the policy anything{_why(said)}")
            if said != self.task._prompts.setdefault(self.item.id, said):
                raise RewardFailure(f"{self.place}: it begins otherwise each time, so its runs cannot be compared")
            self._said = said
        return self._said

    def step(self, text: str) -> StepResult:
        return self.task.step_all([self], [text])[0]

    def result(self, found: Any) -> StepResult:
        """The environment's next question as what is said to the policy, or its verdict."""
        if not isinstance(found, list):
            return self._verdict(found)
        known, self._said = len(self._said) + 1, found
        if len(found) <= known or found[known - 1].get("role") != "assistant":
            raise RewardFailure(f"{self.place}: it changed what was said before, which cannot be trained on")
        new = [_message(m, self.place) for m in found[known:]]
        (role, *others) = {m.role for m in new}
        if others or role not in ("user", "tool"):
            raise RewardFailure(f"{self.place}: between two answers it says more than one part, which is not done yet")
        return StepResult(Message(role, "\n\n".join(m.content for m in new)), 0.0, False, {"success": False})

    def _verdict(self, episode: Any) -> StepResult:
        trace = self.play.trained
        if not episode.ok or trace is None:
            raise RewardFailure(f"{self.place}: the environment failed{_why(episode)}")
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        figures = {name: float(v) for name, v in (scores | trace.metrics).items() if v is not None}
        reward = float(trace.reward)
        info = {**figures, "success": reward >= self.task.settings.success}
        return StepResult(None, reward, True, info)

    def __del__(self) -> None:
        if getattr(self, "play", None) is not None:
            self.task.host.drop(self.play)


def _why(episode: Any) -> str:
    errors = [*getattr(episode, "errors", []), *(e for t in getattr(episode, "traces", []) for e in t.errors)]
    text = " ".join(str(errors[-1].message).split())[:300] if errors else ""
    return f": {errors[-1].type}: {text}" if errors else ""


def _message(said: dict[str, Any], place: str) -> Message:
    content = said.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise RewardFailure(f"{place}: it shows more than text, which is not done yet")
        content = "\n".join(part["text"] for part in content)
    return Message(said["role"], content, tools=tuple(said.get("tools", ())))


# ---------------------------------------------------------------------------------------------------------------- loading


def load(name: str, settings: VerifiersConfig, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The environment and its tasks. Raises UserError."""
    try:
        from verifiers.v1.utils import loaders

        from amft_fast.tasks.verifiers.host import HARNESS
    except ImportError as e:
        raise UserError(
            f"task.name verifiers:{name} takes verifiers ({e}): pip install 'amft-fast[verifiers]'"
        ) from None
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # at its end: what is installed is found first
    rest = {key: value for key, value in options.items() if key != "env"}
    try:
        kind = loaders.taskset_config_type(name)
        seats = loaders.env_config_type(name).model_fields
    except ModuleNotFoundError as e:
        raise UserError(f"task.name: verifiers finds no taskset {name!r}: {str(e).split('. ')[0]}") from None
    except Exception as e:
        raise UserError(f"task.name: the taskset {name!r} could not be loaded: {type(e).__name__}: {e}") from None
    given = own.typed(_Made(kind), rest, f"verifiers:{name}")
    seat = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}, "max_turns": settings.max_turns}
    config: dict[str, Any] = {"taskset": {"id": name, **given.model_dump(exclude_unset=True)}}
    config |= {n: dict(seat) for n, field in seats.items() if _is_seat(field.default)}
    for key, value in (options.get("env") or {}).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    try:
        env = loaders.load_environment(loaders.resolve_env_config(config))
        tasks = list(islice(env.taskset, settings.max_tasks))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"task.options.env.{where}: {first['msg']}, got {shown(first['input'])}") from None
    except Exception as e:
        raise UserError(f"task.name: verifiers:{name} could not be set up: {type(e).__name__}: {e}") from None
    if not tasks:
        raise UserError(f"task.name: verifiers:{name} has no tasks")
    return env, tasks


class _Made:
    """What own.typed asks for settings: a class's `Options`."""

    def __init__(self, kind: type[BaseModel]) -> None:
        self.Options = kind


def _is_seat(default: Any) -> bool:
    from verifiers.v1 import AgentConfig

    return isinstance(default, AgentConfig)


def _split(name: str, tasks: list[Any], s: VerifiersConfig) -> dict[str, list[Item]]:
    """Tasks by the order of their contents' hashes: what says the same is in one split alone."""
    keyed: dict[str, Any] = {}
    for task in tasks:
        text = task.data.model_copy(update={"idx": None}).model_dump_json()
        keyed.setdefault(blake2b(text.encode(), digest_size=8).hexdigest(), task)
    order = [Item(f"{name}/{key}", keyed[key]) for key in sorted(keyed)]
    val, test = (
        max(least, round(share * len(order))) if share else 0 for least, share in ((2, s.val_share), (1, s.test_share))
    )
    out = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    if not out["train"]:
        raise UserError(f"task.verifiers: of {len(order)} tasks none is left to train on beside val and test")
    return {split: out[split] for split in ("train", "val", "test")}


def dry_run(name: str, settings: VerifiersConfig, options: dict[str, Any]) -> list[str]:
    """Whether the environment is there and takes the options."""
    _, tasks = load(name, settings, options)
    return [f"task: verifiers:{name} is there, {len(tasks)} tasks, without demonstrations"]

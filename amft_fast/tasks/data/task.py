"""Rows of one's own, judged by rewards of one's own: `interfaces.Task` over any file with a column of prompts.

    {"prompt": "Say the word for 4.", "answer": "four", "response": "four"}

`prompt` is a text or a list of messages; `response`, where there is one, is the demonstration; each column goes to the rewards
under its name. What the rewards return is added up with their weights, each is a figure of its own, and one of them (or a
threshold) says what counts as solved. Without `val` and `test` files rows are split by a hash of their prompt: the same prompt
is in one split alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from amft_fast.config import DataConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Hub, Item, Message, StepResult
from amft_fast.tasks.data.rewards import Batch, Reward, resolve, threshold
from amft_fast.tasks.data.shipped import NEEDS, shipped
from amft_fast.tasks.items import OfItems
from amft_fast.tasks.math.sameness import problem_key
from amft_fast.tasks.math.sources import BadRow, Source

ROLES = ("system", "user", "assistant")
Rows = Iterable[tuple[str, Any]]  # (place, row) pairs


class Problem(NamedTuple):
    """A row as read. `place` is its file:line; `chat` says that the prompt was a list of messages."""

    place: str
    messages: tuple[Message, ...]
    chat: bool
    columns: Mapping[str, Any]
    response: str | None

    @property
    def key(self) -> str:
        return problem_key("\n".join(m.content for m in self.messages))


class DataTask(OfItems):
    """The task `data`. One turn.

    Its settings are those of the section `task.data`. `rows` are given beside the files of `train` (as (place, row) pairs), and
    `rewards`, functions or names, beside those of the settings, with `weights` for all of them.

    Raises ValueError or UserError for what is wrong with settings, rows or rewards.
    """

    splits = ("train", "val", "test")
    max_turns = 1

    def __init__(
        self,
        settings: DataConfig,
        rows: Rows = (),
        rewards: Sequence[str | Callable[..., Any]] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        self.settings = s = settings
        self.rewards = find_rewards(s, rewards)
        weights = weights if weights is not None else s.weights
        self.weights = list(weights) if weights is not None else [1.0] * len(self.rewards)
        if len(self.weights) != len(self.rewards):
            raise ValueError(
                f"weights must be one for each of the {len(self.rewards)} rewards, got {len(self.weights)}"
            )
        self.solved = threshold(s.success, [r.name for r in self.rewards])
        self.said: list[str] = []
        own = list(rows)
        if not s.train and not own:
            raise ValueError("train must name at least one file or dataset")
        train = self._read("train", [*own, *(pair for text in s.train for pair in Source(text).rows())])
        held = {
            name: self._read(name, [pair for text in texts for pair in Source(text, name).rows()])
            for name, texts in (("val", s.val), ("test", s.test))
            if texts
        }
        self.problems = self._split(train, held)
        self.columns = sorted({name for problems in self.problems.values() for p in problems for name in p.columns})
        self._check_columns()
        self._items = {split: _items(problems) for split, problems in self.problems.items()}

    # ------------------------------------------------------------------------------------------------------------ reading

    def _read(self, split: str, rows: Rows) -> list[Problem]:
        """The rows that can be used; the others are counted, and the first of them named."""
        problems, bad = [], []
        for place, row in rows:
            try:
                problems.append(read(place, row, self.settings))
            except BadRow as e:
                bad.append(f"{place}: {e}")
        if not problems:
            raise UserError(f"task.data.{split}: no usable row" + (f"; the first: {bad[0]}" if bad else ""))
        left = f", {len(bad)} left out; the first: {bad[0]}" if bad else ""
        self.said.append(f"{split}: {len(problems)} rows{left}")
        return problems

    def _split(self, train: list[Problem], held: dict[str, list[Problem]]) -> dict[str, list[Problem]]:
        """The held-out rows of files of their own, or by the order of their prompts' hashes; none is trained on."""
        s = self.settings
        order = sorted({p.key for p in train} - {p.key for problems in held.values() for p in problems})
        for name, share, least in (("val", s.val_share, 2), ("test", s.test_share, 1)):
            if name not in held:
                count = max(least, round(share * len(order))) if share else 0
                chosen, order = set(order[:count]), order[count:]
                held[name] = [p for p in train if p.key in chosen]
        kept = set(order)
        out = {"train": [p for p in train if p.key in kept], "val": held["val"], "test": held["test"]}
        if not out["train"]:
            raise UserError(f"task.data.train: of {len(train)} rows none is left to train on beside val and test")
        self.said.append(", ".join(f"{len(problems)} {name}" for name, problems in out.items()))
        return out

    def _check_columns(self) -> None:
        for name in {r.name for r in self.rewards if r.source == r.name} & NEEDS.keys():
            for problem in (p for problems in self.problems.values() for p in problems):
                if problem.columns.get(NEEDS[name]) is None:
                    raise UserError(
                        f"{problem.place}: reward {name} needs the column {NEEDS[name]!r}, which this row lacks"
                    )

    # --------------------------------------------------------------------------------------------------------------- a task

    def prepare(self, *_: Any) -> list[str]:
        """What became of the rows, as lines of text."""
        return [f"task data: {'; '.join(self.said)}"]

    def demo(self, item: Item) -> Demo | None:
        """The response of a row, where it has one."""
        problem = item.data
        return None if problem.response is None else Demo(item.id, problem.messages, problem.response)

    def start(self, item: Item) -> DataEpisode:
        return DataEpisode(item.data, self)

    def step_all(self, episodes: Sequence[DataEpisode], texts: Sequence[str]) -> list[StepResult]:
        """The results of many answers, each reward being asked once. Raises RewardFailure."""
        if not episodes:
            return []
        problems = [e.problem for e in episodes]
        completions = [[{"role": "assistant", "content": t}] if p.chat else t for p, t in zip(problems, texts)]
        columns = {name: [p.columns.get(name) for p in problems] for name in self.columns}
        columns.setdefault("prompts", [p.columns[self.settings.prompt] for p in problems])
        batch = Batch(completions, columns, [p.place for p in problems])
        judged = [reward(batch, self.settings.reward_timeout_s) for reward in self.rewards]
        return [self._result(values) for values in zip(*judged)]

    def _result(self, values: Sequence[float | None]) -> StepResult:
        figures = {r.name: v for r, v in zip(self.rewards, values) if v is not None}
        total = sum(w * v for w, v in zip(self.weights, values) if v is not None)
        return StepResult(None, total, True, {"success": self.solved.met(figures | {"reward": total}), **figures})

    @staticmethod
    def dry_run(settings: DataConfig, hub: Hub) -> list[str]:
        """That the rewards are there, and the first usable row of each file."""
        try:
            rewards = find_rewards(settings)
            threshold(settings.success, [r.name for r in rewards])
        except ValueError as e:
            raise UserError(f"task.data: {e}") from None
        if not settings.train:
            raise UserError("task.data.train: name at least one file or dataset")
        lines = [f"rewards: {', '.join(r.name for r in rewards)}"]
        for text in (*settings.train, *settings.val, *settings.test):
            source = Source(text)
            if not source.is_file:
                lines.append(f"data: {hub.look_up('dataset', text.partition('@')[0].partition(':')[0])}")
                continue
            lines.append(f"data: {text}, columns {', '.join(_first(source, settings).columns)}")
        return lines


class DataEpisode:
    """One answer to one prompt."""

    def __init__(self, problem: Problem, task: DataTask) -> None:
        self.messages, self.problem, self.task = problem.messages, problem, task

    def step(self, text: str) -> StepResult:
        return self.task.step_all([self], [text])[0]


def find_rewards(settings: DataConfig, more: Sequence[str | Callable[..., Any]] = ()) -> list[Reward]:
    """The rewards of the settings, and `more`. Raises ValueError or UserError."""
    return resolve([*settings.rewards, *more], lambda name: shipped(name, settings))


def read(place: str, row: Any, settings: DataConfig) -> Problem:
    """A row as a problem. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if settings.prompt not in row:
        raise BadRow(f"no column {settings.prompt!r} (task.data.prompt), only {', '.join(map(str, row))[:200]}")
    prompt = row[settings.prompt]
    chat = not isinstance(prompt, str)
    messages = _messages(prompt) if chat else (Message("user", prompt),)
    if not messages[-1].content.strip():
        raise BadRow("the prompt is empty")
    if settings.system_prompt and messages[0].role != "system":
        messages = (Message("system", settings.system_prompt), *messages)
    return Problem(place, messages, chat, row, _response(row.get(settings.response)))


def _messages(prompt: Any) -> tuple[Message, ...]:
    good = isinstance(prompt, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in prompt
    )
    if not good or not prompt:
        raise BadRow(f"the prompt must be a text or a list of messages with role and content, got {prompt!r:.60}")
    if prompt[-1]["role"] != "user":
        raise BadRow(f"the prompt's last message must be the user's, got {prompt[-1]['role']}")
    return tuple(Message(m["role"], m["content"]) for m in prompt)


def _response(value: Any) -> str | None:
    """The demonstration: a text, or the last message's of a list. Raises BadRow for anything else."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if value is not None and not isinstance(value, str):
        raise BadRow(f"the response must be a text or a list with a message, got {value!r:.60}")
    return value or None


def _items(problems: list[Problem]) -> list[Item]:
    """Their ids hang on the prompt alone; one that comes again is numbered."""
    seen: Counter[str] = Counter()
    items = []
    for p in problems:
        again = seen[p.key]
        seen[p.key] += 1
        items.append(Item(f"data/{p.key}" + (f".{again}" if again else ""), p))
    return items


def _first(source: Source, settings: DataConfig) -> Problem:
    trouble = ""
    for place, row in islice(source.rows(), 1000):
        try:
            return read(place, row, settings)
        except BadRow as e:
            trouble = trouble or f"; the first: {place}: {e}"
    raise UserError(f"task.data: no usable row among the first 1000 of {source.text}{trouble}")

"""V-IRL: follow written directions through streets, in words (L) or with pictures (VL).

The environment, its rewards and its verify turns are those of arXiv 2501.17161; routes come from its published files
(`virl_data`) or from cities generated here (`virl_city`). The policy is asked at every point of a route's rail
(`virl_routes.rail`): what it observes, which sentence is to be carried out, what it does. A right action leads to the next
point. After a wrong one the verifier says what was wrong; after `verify_turns` wrong ones the point is passed over, and the
episode cannot succeed any more. One episode is one conversation: the earlier turns are the history of observations and
actions.

In distribution turns are named absolutely ("turn_direction(north)"), in the split `ood` relatively ("turn_direction(left)");
`visual_ood` (with views) is walked in other cities, which look different. No path is in two splits, save that `ood` walks
those of `test`, so that the two differ in the rule alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

from amft_fast.config import VirlConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Item, Message, Sample, StepResult
from amft_fast.tasks.general_points.hands import draw
from amft_fast.tasks.virl.city import build_city, draw_routes
from amft_fast.tasks.virl.routes import Point, Route, rail, sentences
from amft_fast.tasks.virl.words import (
    answer_text,
    feedback_text,
    next_text,
    prompt_text,
    read_answer,
    same_sentence,
)

# The published table. An answer that cannot be read, which the table leaves open, is worth its worst row.
REWARDS = {
    "correct": 1.0,
    "wrong_action": -1.0,
    "wrong_observation": -1.5,
    "wrong_instruction": -1.75,
    "illegal": -1.75,
}
REWARD_SCALES = ("published", "shaped", "binary")
HELD_IN_LOOKS = ("brick", "stone")
OTHER_LOOKS = ("desert", "night")


@dataclass(frozen=True)
class Problem:
    """A route to walk, the action space to answer in, and the city it lies in."""

    route: Route
    space: str
    city: str

    @cached_property
    def points(self) -> tuple[Point, ...]:
        return rail(self.route)

    @cached_property
    def sentences(self) -> list[str]:
        return sentences(self.route)


def judge(problem: Problem, point: Point, text: str, answer_format: str) -> tuple[str, str]:
    """(kind, action) of one answer at a point: a key of REWARDS, and the action as read ("" if it could not be).

    The right action is correct whatever is said beside it. A wrong one is blamed on the first of these that is wrong too:
    the observation (claiming a crossing where there is none, or none where there is one), the sentence quoted, the action.
    """
    answer = read_answer(text, problem.space, answer_format)
    if answer is None:
        return "illegal", ""
    wanted = point.target(problem.space) or point.action
    if answer.action == wanted:
        return "correct", answer.action
    if answer.crossing != point.crossing:
        return "wrong_observation", answer.action
    if not same_sentence(answer.sentence, point.sentence, problem.sentences):
        return "wrong_instruction", answer.action
    return "wrong_action", answer.action


class Virl:
    """The task: `amft_fast.interfaces.Task` over routes.

    Its settings are those of the section `task.virl` (see `config.VirlConfig`).

    A demo is a whole walk with the right answer at every point. `info` of a step holds `success`, `kind`,
    `step_accuracy` (share of answers so far that were right), `first_try` (share of points right at the first answer),
    `state` (the point and the try: where turns of different samples can be compared), `answer` (the actions read so far), and
    `trace` for the map.
    Raises ValueError naming the file, and the place in it, that is wrong.
    """

    def __init__(self, settings: VirlConfig | None = None) -> None:
        self.settings = s = settings or VirlConfig()
        self.answer_format, self.verify_turns = s.answer_format, s.verify_turns
        # Other cities are told apart by looks, which words do not show.
        self.splits = ("train", "val", "test", "ood") + (
            ("visual_ood",) if s.views and (s.ood_data or not s.data) else ()
        )
        self._items = self._make_items()
        longest = max(len(item.data.points) for items in self._items.values() for item in items)
        self.max_turns = s.verify_turns * longest

    def prompts(self, split: str) -> tuple[Item, ...]:
        """The routes of a split, in an order that never changes."""
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        return self._items[split]

    def demos(self, split: str) -> Demos:
        """One whole walk for each route that has a demo; outside `train` every route has one."""
        return Demos(self, [i for i in self.prompts(split) if split != "train" or self._has_demo(i)])

    def demo(self, item: Item) -> Demo | None:
        """The walk of a training route, where it has a demo."""
        return self._demo(item) if self._has_demo(item) else None

    def _has_demo(self, item: Item) -> bool:
        return draw("demo", item.id) < self.settings.demo_share

    def start(self, item: Item) -> VirlEpisode:
        return VirlEpisode(self, item.data)

    def reward(self, kind: str, points: int, done: bool, success: bool) -> float:
        """A turn's reward on this task's scale."""
        if self.settings.reward_scale == "binary":
            return float(done and success)
        return REWARDS[kind] / (points if self.settings.reward_scale == "shaped" else 1)

    def gold(self, item: Item) -> str:
        """The right actions of a walk, point by point."""
        problem = item.data
        return ", ".join(p.target(problem.space) or p.action for p in problem.points)

    def picture(self, item: Item, sample: Sample) -> str:
        """The map of an episode as SVG: the streets, the route asked, what the policy did at each point."""
        from amft_fast.tasks.virl.views import map_svg

        return map_svg(item.data, sample.info.get("trace", ()))

    def images(self, problem: Problem, point: Point) -> tuple[Any, ...]:
        """The views at a point as one picture, when the task has views."""
        if not self.settings.views:
            return ()
        from amft_fast.tasks.virl.views import drawn_views

        if not self.settings.data:
            return (drawn_views(point, problem.city, self.settings.view_size),)
        try:
            return (self._panoramas(problem.city).views(problem.route, point, self.settings.view_size),)
        except ValueError as e:
            raise UserError(f"task.virl: {e}") from None

    @lru_cache(maxsize=2)  # noqa: B019 a task lives as long as its run
    def _panoramas(self, folder: str):
        from amft_fast.tasks.virl.data import Panoramas

        return Panoramas(Path(folder))

    # ------------------------------------------------------------------------------------------------------ the splits

    def _make_items(self) -> dict[str, tuple[Item, ...]]:
        found = self._published() if self.settings.data else self._generated()
        # The same walks as `test`, with turns named the other way.
        found["ood"] = [Item(f"{i.id}/relative", Problem(i.data.route, "relative", i.data.city)) for i in found["test"]]
        return {split: tuple(items) for split, items in found.items()}

    @property
    def _numbers(self) -> dict[str, int]:
        """Generated routes by split."""
        s = self.settings
        return {"train": s.num_train, "val": s.num_val, "test": s.num_test}

    def _generated(self) -> dict[str, list[Item]]:
        numbers = self._numbers
        found: dict[str, list[Item]] = {split: [] for split in ("train", "val", "test")}
        for city, route, key in self._draw(HELD_IN_LOOKS):
            split = self._split(city, key)
            if len(found[split]) < numbers[split]:
                found[split].append(_item(f"{city}/{key}", route, city))
            if all(len(found[s]) == n for s, n in numbers.items()):
                break
        if "visual_ood" in self.splits:
            others = zip(range(numbers["test"]), self._draw(OTHER_LOOKS))
            found["visual_ood"] = [_item(f"{city}/{key}", route, city) for _, (city, route, key) in others]
        return found

    def _draw(self, looks: Sequence[str]) -> Iterator[tuple[str, Route, str]]:
        """Routes from all cities of these looks in turn."""
        names = [f"{looks[i % len(looks)]}-{self.settings.seed}-{i}" for i in range(self.settings.cities)]
        sources = [
            draw_routes(build_city(name), self.settings.legs, self.settings.seed, self.settings.spacing)
            for name in names
        ]
        for name, source in cycle(zip(names, sources)):
            try:
                route, key = next(source)
            except ValueError as e:
                raise ValueError(f"{e}: ask for fewer routes (num_train, num_val, num_test) or more cities") from None
            yield name, route, key

    def _published(self) -> dict[str, list[Item]]:
        from amft_fast.tasks.virl.data import load_routes

        found: dict[str, list[Item]] = {split: [] for split in ("train", "val", "test")}
        for key, route in load_routes(Path(self.settings.data), self.settings.leg_points):
            found[self._split("published", key)].append(_item(key, route, self.settings.data))
        for split, items in found.items():
            if not items:
                raise ValueError(f"data {self.settings.data!r} has too few routes: none fell to the split {split}")
        if "visual_ood" in self.splits:
            others = load_routes(Path(self.settings.ood_data), self.settings.leg_points)
            found["visual_ood"] = [_item(f"other/{key}", route, self.settings.ood_data) for key, route in others]
        return found

    def _split(self, city: str, key: str) -> str:
        """The split of a path; it hangs on the path and the data's seed alone."""
        at = draw("virl", self.settings.seed, city, key)
        if self.settings.data:
            val, test = self.settings.val_share, self.settings.test_share
        else:
            numbers = self._numbers
            val, test = (numbers[s] / sum(numbers.values()) for s in ("val", "test"))
        return "val" if at < val else "test" if at < val + test else "train"

    def _demo(self, item: Item) -> Demo:
        problem, points = item.data, item.data.points
        answers = [answer_text(problem.route, p, problem.space, self.answer_format) for p in points]
        told = [self._tell(problem, i, passed=False) for i in range(1, len(points))]
        return Demo(item.id, self._opening(problem), answers[0], more=tuple(zip(told, answers[1:])))

    def _opening(self, problem: Problem) -> tuple[Message, ...]:
        first = problem.points[0]
        text = prompt_text(problem.route, first, problem.space, self.answer_format, self.settings.views)
        return (Message("user", text, self.images(problem, first)),)

    def _tell(self, problem: Problem, i: int, passed: bool) -> Message:
        """The verifier's message that leads to the i-th point, counted from 0."""
        point = problem.points[i]
        return Message(
            "user",
            next_text(i + 1, point, passed, self.answer_format, self.settings.views),
            self.images(problem, point),
        )


class Demos(Sequence[Demo]):
    """Demos made when they are asked for: with pictures, those of all routes would fill the memory."""

    def __init__(self, task: Virl, items: Sequence[Item]):
        self._task, self._items = task, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, at):
        return (
            [self._task._demo(i) for i in self._items[at]]
            if isinstance(at, slice)
            else self._task._demo(self._items[at])
        )


class VirlEpisode:
    """One walk: `verify_turns` tries at each point, from the first to the last."""

    def __init__(self, task: Virl, problem: Problem):
        self.messages = task._opening(problem)
        self._task, self._problem, self._points = task, problem, problem.points
        self._at = self._tries = self._right = self._first = self._answers = 0
        self._trace: list[tuple[int, str, str]] = []

    def step(self, text: str) -> StepResult:
        """Judge one answer. Raises RuntimeError once the episode has ended."""
        if self._at == len(self._points):
            raise RuntimeError("this episode has ended")
        point, state = self._points[self._at], f"{self._at}/{self._tries}"
        kind, action = judge(self._problem, point, text, self._task.answer_format)
        self._trace.append((self._at, kind, action))
        right = kind == "correct"
        self._answers += 1
        self._right += right
        self._first += right and self._tries == 0
        self._tries += 1
        leave = right or self._tries == self._task.verify_turns
        if leave:
            self._at, self._tries = self._at + 1, 0
        done = self._at == len(self._points)
        success = done and self._right == len(self._points)
        return StepResult(
            None if done else self._message(leave, right, kind, point),
            self._task.reward(kind, len(self._points), done, success),
            done,
            {
                "success": success,
                "kind": kind,
                "step_accuracy": self._right / self._answers,
                "first_try": self._first / (self._at + (self._tries > 0)),
                "state": state,
                "answer": self._actions(),
                "trace": tuple(self._trace),
            },
        )

    def _actions(self) -> str | None:
        """The actions so far as they were read ("?": none could be), None where none was."""
        actions = [action for _, _, action in self._trace]
        return ", ".join(action or "?" for action in actions) if any(actions) else None

    def _message(self, leave: bool, right: bool, kind: str, point: Point) -> Message:
        if leave:
            return self._task._tell(self._problem, self._at, passed=not right)
        return Message("user", feedback_text(kind, point, self._task.answer_format))


def _item(key: str, route: Route, city: str) -> Item:
    return Item(f"virl/{key}", Problem(route, "absolute", city))

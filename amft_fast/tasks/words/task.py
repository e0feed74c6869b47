"""Word problems of two steps: `--task.name amft_fast.tasks.words.task:WordProblems`.

    Tom has 7 apples. A friend brings 5 more. He loses 4 of them. How many apples are there now?
    7+5=12. 12-4=8. The answer is 8.

No sentence and no triple of numbers of one split is in another (phrases.py; a hash of the numbers). `ood` has numbers of 21 to
60, factors of 6 to 12 and longer sentences. The maths reward judges the answer; a demonstration is two sums and the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from amft_fast.interfaces import Demo, Item, Message, StepResult
from amft_fast.tasks.math.answer import extract
from amft_fast.tasks.math.reward import rewards
from amft_fast.tasks.words.phrases import PEOPLE, PHRASES, THINGS

SYSTEM_PROMPT = "Work it out in short steps."
PLAIN, LARGE = (range(2, 21), range(2, 10)), (range(21, 61), range(6, 13))
"""What is added and taken, and factors: of all splits but the last, and of ood."""
LARGEST = 2 * PLAIN[0][-1]  # that a first step comes to


class Options(BaseModel):
    """How many problems of each split, the seed of all of them, the largest number that is multiplied (not in ood), and what
    the system is told."""

    model_config = ConfigDict(extra="forbid")

    train: int = Field(2000, ge=1, le=20000)
    val: int = Field(200, ge=2, le=1000)
    test: int = Field(200, ge=1, le=2000)
    ood: int = Field(200, ge=1, le=2000)
    seed: int = Field(0, ge=0, lt=2**63)
    multiplied: int = Field(LARGEST, ge=9, le=LARGEST)
    system_prompt: str = SYSTEM_PROMPT


class Problem(NamedTuple):
    text: str
    solution: str
    answer: str


class WordProblems:
    """The task: `amft_fast.interfaces.Task`. One turn."""

    splits = ("train", "val", "test", "ood")
    max_turns = 1
    Options = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options = options = options or Options()
        self.items = {s: make(s, getattr(options, s), options.seed, options.multiplied) for s in self.splits}

    def prompts(self, split: str) -> Sequence[Item]:
        return self.items[split]

    def demos(self, split: str) -> Sequence[Demo]:
        return [Demo(i.id, self._messages(i.data), i.data.solution) for i in self.items[split]]

    def gold(self, item: Item) -> str:
        return item.data.answer

    def start(self, item: Item) -> Episode:
        return Episode(item.data, self._messages(item.data))

    def step_all(self, episodes: Sequence[Episode], texts: Sequence[str]) -> list[StepResult]:
        """The results of many answers, compared at once."""
        return judge(episodes, texts)

    def _messages(self, problem: Problem) -> tuple[Message, ...]:
        system = self.options.system_prompt
        return (*([Message("system", system)] if system else ()), Message("user", problem.text))


class Episode:
    """One answer to one problem."""

    def __init__(self, problem: Problem, messages: tuple[Message, ...]) -> None:
        self.problem, self.messages = problem, messages

    def step(self, text: str) -> StepResult:
        return judge([self], [text])[0]


def judge(episodes: Sequence[Episode], texts: Sequence[str]) -> list[StepResult]:
    found = rewards(texts, [e.problem.answer for e in episodes])
    infos: list[dict[str, Any]] = [
        {"success": value == 1.0, "answer": extract(text)} for value, text in zip(found, texts)
    ]
    return [StepResult(None, value, True, info) for value, info in zip(found, infos)]


def make(split: str, count: int, seed: int, multiplied: int = LARGEST) -> list[Item]:
    """So many different problems of a split."""
    rng = random.Random(f"{seed}/{split}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw(split, rng, multiplied)
        problems.setdefault(problem.text, problem)
    return [Item(f"words/{blake2b(text.encode(), digest_size=8).hexdigest()}", p) for text, p in problems.items()]


def split_of(numbers: tuple[int, int, int]) -> str:
    """Where a triple of small numbers belongs: two tenths each to val and test."""
    part = blake2b(repr(numbers).encode(), digest_size=1).digest()[0] % 10
    return "val" if part < 2 else "test" if part < 4 else "train"


def draw(split: str, rng: random.Random, multiplied: int) -> Problem:
    """A problem whose numbers are the split's and whose results are all at least 1; but in ood, none over `multiplied` is
    multiplied."""
    terms, factors = LARGE if split == "ood" else PLAIN
    while True:
        groups, cost = rng.random() < 1 / 3, False
        signs = ["*"] if groups else [rng.choice("+-")]
        if groups:
            signs.append(rng.choice("+-"))
        else:
            cost = rng.random() < 1 / 2
            signs.append("*" if cost else "-" if signs[0] == "+" else "+")
        first = rng.choice(factors if groups else terms)
        rest = [rng.choice(factors if sign == "*" else terms) for sign in signs]
        middle = calculate(first, signs[0], rest[0])
        end = calculate(middle, signs[1], rest[1])
        small = not cost or middle <= multiplied
        if min(middle, end) >= 1 and (split == "ood" or (small and split_of((first, *rest)) == split)):
            break
    solution = f"{first}{signs[0]}{rest[0]}={middle}. {middle}{signs[1]}{rest[1]}={end}. The answer is {end}."
    return Problem(" ".join(tell(split, first, signs, rest, rng)), solution, str(end))


def calculate(left: int, sign: str, right: int) -> int:
    return left * right if sign == "*" else left + right if sign == "+" else left - right


def tell(split: str, first: int, signs: list[str], rest: list[int], rng: random.Random) -> Iterator[str]:
    """The sentences of a problem."""
    said, he = PHRASES[split], rng.choice(("he", "she"))
    words = {
        "who": rng.choice(PEOPLE[he]),
        "he": he,
        "his": "his" if he == "he" else "her",
        "things": rng.choice(THINGS),
    }

    def say(ways: tuple[str, ...], **numbers: int) -> str:
        text = rng.choice(ways).format(**words, **numbers)
        return text[0].upper() + text[1:]

    grouped = signs[0] == "*"
    yield say(said.groups, n=first, m=rest[0]) if grouped else say(said.have, n=first)
    for sign, number in zip(signs[grouped:], rest[grouped:]):
        if sign != "*":
            yield say(said.more if sign == "+" else said.less, n=number)
    yield say(said.cost, n=rest[1]) if signs[1] == "*" else say(said.count)

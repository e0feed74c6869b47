"""General Points: make a target from a hand of cards, each used once. The 24 game, and smaller ones.

The environment and its reward table are those of arXiv 2501.17161 ("SFT memorizes, RL generalizes"); prompts, solver
and verifier are written here. Under rule "10" J, Q and K count 10 (in distribution); under rule "11-12-13" they count
11, 12 and 13 (out of distribution). A counts 1 under both, and every prompt states its rule.

Hands are split by their multiset of values (`gp_hands.assign_split`): no test hand is a training hand in another order.
Multisets of values up to 10 go to `train`, `val` or `test`. Those that hold an 11, 12 or 13 can only occur under the
other rule; they go to `ood` or to `ood_train`, which no split shows: it is free for the making of a base model.

Two answer formats. "json", for language models: a prompt in sentences, an answer with the fields `cards`, `number` and
`formula`. "formula", for tiny models with one token a word: the prompt `J 4 7 faces 10 target 42`, the answer
`( 10 - 4 ) * 7 = 42`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from amft_fast.config import GeneralPointsConfig
from amft_fast.interfaces import Demo, Item, Message, StepResult
from amft_fast.tasks.general_points.bases import leak
from amft_fast.tasks.general_points.expressions import (
    MAX_NUMBERS,
    FormulaError,
    extendable,
    parse,
    reachable,
    solve,
    tokenize,
    values,
)
from amft_fast.tasks.general_points.hands import FACES, RULE_SENTENCES, RULES, Problem, assign_split, deal, draw, hands
from amft_fast.tasks.last_object import last_object

__all__ = ["GeneralPoints", "Problem", "Verdict", "read_answer", "solve", "verify_formula"]

REWARDS = {
    "correct": 5.0,
    "partial": 1.0,
    "no_solution": -1.0,
    "wrong_cards": -1.5,  # with pictures only, see gp_vision.py
    "wrong_number": -2.0,
    "illegal": -3.0,
}
SPLITS = ("train", "val", "test", "ood")
ANSWER_FORMATS = ("json", "formula")
REWARD_SCALES = ("published", "binary", "shaped")


@dataclass(frozen=True)
class Verdict:
    """What a formula is worth. `value` is what it evaluates to, None where it is illegal."""

    kind: str  # a key of REWARDS
    value: Fraction | None = None

    @property
    def reward(self) -> float:
        return REWARDS[self.kind]


def verify_formula(formula: str, numbers: Sequence[int], target: int = 24) -> Verdict:
    """Judge a formula such as "(10-4)*7" or "4×3+2+10=24" against a hand. Nothing is ever executed.

    - `illegal` (-3): not a formula of ASCII digits, + - * / (or − × ÷) and round brackets, with or without a closing
      "= number"; a division by zero; past the limits of `expressions`; not a string.
    - `wrong_number` (-2): a number that is not in the hand, or more often than it is; or a formula closed by "=" with
      numbers left over.
    - `correct` (5): each number once, the value is the target, and what stands after "=", if anything, is too.
    - `partial` (1): numbers are left over, and tokens put behind the formula can make it correct: the formula is a
      proper prefix of a solution (any solution, not only the canonical ones of `solve`) and itself a legal formula.
    - `no_solution` (-1): every other legal formula.

    Takes less than a millisecond for a hand of 4 (tens of them for 6); a hand of more than 6 numbers knows no
    `partial`. Raises ValueError if `numbers` or `target` are not integers; never because of `formula`.
    """
    hand = tuple(sorted(_integer("numbers", n) for n in numbers))
    target = _integer("target", target)
    if not isinstance(formula, str):
        return Verdict("illegal")
    try:
        parsed = parse(formula)
    except FormulaError:
        return Verdict("illegal")
    used, dealt = Counter(parsed.numbers), Counter(hand)
    rest = tuple(sorted((dealt - used).elements()))
    if used - dealt or (rest and parsed.claim is not None):
        return Verdict("wrong_number", parsed.value)
    if not rest:
        right = parsed.value == target and parsed.claim in (None, target)
        return Verdict("correct" if right else "no_solution", parsed.value)
    hopeful = len(hand) <= MAX_NUMBERS and extendable(parsed, rest, target)
    return Verdict("partial" if hopeful else "no_solution", parsed.value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be integers, got {value!r}")
    return value


# ------------------------------------------------------------------------------------------------------ reading answers


def read_answer(text: str) -> dict[str, Any] | None:
    """The last JSON object with a field "formula" in a response, or None (see `last_object`)."""
    return last_object(text, "formula")


def formula_of(fields: dict[str, Any] | None) -> str | None:
    """The formula of a JSON answer, None where there is none."""
    return fields["formula"] if fields is not None and isinstance(fields["formula"], str) else None


def read_formula(text: str, verdict: Verdict) -> str | None:
    """The formula of an answer in bare words, None where it is none."""
    return None if verdict.kind == "illegal" else text.strip()


def judge_fields(problem: Problem, answer: dict[str, Any] | None) -> Verdict:
    """Judge the fields `formula` and `number` of a JSON answer."""
    if answer is None or not isinstance(answer["formula"], str):
        return Verdict("illegal")
    verdict = verify_formula(answer["formula"], problem.values, problem.target)
    if verdict.kind != "illegal" and _as_numbers(answer.get("number")) != sorted(problem.values):
        return Verdict("wrong_number", verdict.value)
    return verdict


def _as_numbers(field: Any) -> list[int] | None:
    """The field `number` as sorted integers; "10" counts as 10, anything else makes it None."""
    if not isinstance(field, list) or len(field) > MAX_NUMBERS:
        return None
    texts = [str(n) for n in field if isinstance(n, int | str) and not isinstance(n, bool)]
    if len(texts) < len(field) or not all(re.fullmatch("[0-9]{1,6}", text) for text in texts):
        return None
    return sorted(map(int, texts))


# -------------------------------------------------------------------------------------------------------------- wording

# Every word that the format "formula" can put before a model; numbers, operators and brackets come on top.
PROMPT_WORDS = ("A", *FACES, "faces", "target", "wrong", "formula", "numbers", "value", "unfinished", "again")

_JSON_PROMPT = """\
You play a card game. The hand is {cards}. Build a formula that equals {target} and uses the number of each card \
exactly once.

Rules:
- An ace (A) counts 1, the cards 2 to 10 count their number. {rule}
- You may use +, -, *, / and round brackets, and no other numbers.

Answer with one JSON object with three fields and nothing after it:
{{"cards": the cards as dealt, "number": the number of each card, "formula": the formula as a string}}
For example, with the hand 2, 5, 9 and the target 19:
{{"cards": ["2", "5", "9"], "number": [2, 5, 9], "formula": "2*5+9=19"}}
"""
_JSON_FEEDBACK = {
    "illegal": 'Your answer holds no legal "formula". It takes numbers, +, -, *, / and round brackets only.',
    "wrong_number": "Your answer does not use the number of each card exactly once.",
    "partial": "Your formula is a good start, but it does not use all the cards yet.",
    "no_solution": (
        "Your formula equals {value}. It must use every card and equal {target}, and so must the number after =."
    ),
}
_FORMULA_FEEDBACK = {
    "illegal": "wrong formula again",
    "wrong_number": "wrong numbers again",
    "partial": "unfinished again",
    "no_solution": "wrong value {value} again",
}


def prompt_text(problem: Problem, answer_format: str) -> str:
    """The prompt, which always states the rule for face cards and the target."""
    if answer_format == "formula":
        faces = problem.rule.replace("-", " ")
        return f"{' '.join(problem.cards)} faces {faces} target {problem.target}"
    cards = ", ".join(problem.cards)
    return _JSON_PROMPT.format(cards=cards, target=problem.target, rule=RULE_SENTENCES[problem.rule])


def answer_text(problem: Problem, formula: str, answer_format: str) -> str:
    """A whole answer with this formula (as `solve` writes it), as the policy should give it."""
    if answer_format == "formula":
        return f"{' '.join(tokenize(formula))} = {problem.target}"
    fields = {
        "cards": list(problem.cards),
        "number": list(problem.values),
        "formula": f"{formula}={problem.target}",
    }
    return json.dumps(fields)


def feedback_text(problem: Problem, verdict: Verdict, answer_format: str) -> str:
    """What the verifier says to a wrong answer before the next try."""
    if answer_format == "formula":
        value = str(verdict.value).replace("-", "- ").replace("/", " / ")
        return _FORMULA_FEEDBACK[verdict.kind].format(value=value)
    text = _JSON_FEEDBACK[verdict.kind].format(value=verdict.value, target=problem.target)
    return f"{text} Try again, with one JSON object as before."


# ------------------------------------------------------------------------------------------------------------- the task


class GeneralPoints:
    """The task: `amft_fast.interfaces.Task` over hands of cards.

    Its settings are those of the section `task.general_points` (see `config.GeneralPointsConfig`).

    Only solvable problems are kept. Rewards have no unit; a turn's reward is that turn's alone. `info` of a step holds
    `success`, `kind` (see `verify_formula`) and `answer` (the formula as read).
    """

    splits = SPLITS

    def __init__(self, settings: GeneralPointsConfig | None = None) -> None:
        self.settings = s = settings or GeneralPointsConfig()
        lo, hi = s.targets or (s.target, s.target)
        self.num_cards, self.targets = s.num_cards, range(lo, hi + 1)
        self.answer_format, self.max_turns, self.seed = s.answer_format, s.max_turns, s.seed
        self.shares = {"val_share": s.val_share, "test_share": s.test_share, "ood_share": s.ood_share}
        self._limits = {"train": s.max_train, "val": s.max_val, "test": s.max_test, "ood": s.max_ood}
        self._demos: dict[str, tuple[Demo, ...]] = {}

    def warn_of_base(self, path: str) -> str | None:
        """A sentence when the model at `path` was pre-trained on hands that this task holds out."""
        return leak(path, self.num_cards, self.seed, self.assign_split)

    def assign_split(self, hand: Sequence[int]) -> str:
        """The split of a multiset of values in this task; see the function `assign_split`."""
        return assign_split(hand, seed=self.seed, **self.shares)

    def prompts(self, split: str) -> tuple[Item, ...]:
        """The problems of a split, in an order shuffled once and for all."""
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        return self._items[split]

    def demos(self, split: str) -> tuple[Demo, ...]:
        """One demo for each problem whose hand has one; its formula is picked among the solver's by hash."""
        if split not in self._demos:
            self._demos[split] = tuple(self._demo(item) for item in self.prompts(split) if self._has_demo(split, item))
        return self._demos[split]

    def demo(self, item: Item) -> Demo | None:
        """The demo of a training problem, where its hand has one."""
        return self._demo(item) if self._has_demo("train", item) else None

    def start(self, item: Item) -> GeneralPointsEpisode:
        return GeneralPointsEpisode(self, item.data)

    def opening(self, problem: Problem) -> tuple[Message, ...]:
        """The messages that pose a problem."""
        return (Message("user", prompt_text(problem, self.answer_format)),)

    def answer(self, problem: Problem, formula: str) -> str:
        """A whole answer with this formula, as a demo gives it."""
        return answer_text(problem, formula, self.answer_format)

    def gold(self, item: Item) -> str:
        """A formula that is right: the one that a demo of this problem gives."""
        return self._formula(item)

    def judge(self, problem: Problem, text: str) -> tuple[Verdict, dict[str, Any]]:
        """What a response is worth, and further entries for `info`: the formula read, and figures."""
        if self.answer_format == "formula":
            verdict = verify_formula(text, problem.values, problem.target)
            return verdict, {"answer": read_formula(text, verdict)}
        fields = read_answer(text)
        return judge_fields(problem, fields), {"answer": formula_of(fields)}

    def feedback(self, problem: Problem, verdict: Verdict) -> str:
        """What the verifier says to a wrong answer before the next try."""
        return feedback_text(problem, verdict, self.answer_format)

    def reward(self, verdict: Verdict) -> float:
        """The verdict's reward on this task's scale."""
        if self.settings.reward_scale == "binary":
            return float(verdict.kind == "correct")
        return verdict.reward / (5 if self.settings.reward_scale == "shaped" else 1)

    def describe(self) -> dict[str, dict[str, int]]:
        """How many problems, and how many different hands (multisets of values), each split has."""
        return {
            split: {"problems": len(items), "hands": len({tuple(sorted(item.data.values)) for item in items})}
            for split, items in self._items.items()
        }

    @cached_property
    def _items(self) -> dict[str, tuple[Item, ...]]:
        found: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for rule in RULES:
            for hand in hands(self.num_cards, rule):
                split = self.assign_split(hand)
                if split in found:
                    found[split] += (self._item(hand, target, rule) for target in self._solvable(hand))
        for items in found.values():
            items.sort(key=lambda item: draw("shuffle", self.seed, item.id))
        return {split: tuple(items[: self._limits[split]]) for split, items in found.items()}

    def _solvable(self, hand: tuple[int, ...]) -> list[int]:
        if len(hand) <= 3:
            reached = values(hand)
            return [target for target in self.targets if target in reached]
        return [target for target in self.targets if reachable(hand, Fraction(target))]

    def _item(self, hand: tuple[int, ...], target: int, rule: str) -> Item:
        problem = deal(hand, target, rule, self.seed)
        return Item(f"gp/{rule}/{'.'.join(problem.cards)}/{target}", problem)

    def _has_demo(self, split: str, item: Item) -> bool:
        return split != "train" or draw("demo", self.seed, *sorted(item.data.values)) < self.settings.demo_share

    def _demo(self, item: Item) -> Demo:
        return Demo(item.id, self.opening(item.data), self.answer(item.data, self._formula(item)))

    def _formula(self, item: Item) -> str:
        """One of the solver's formulas, picked by hash."""
        formulas = solve(list(item.data.values), item.data.target)
        return formulas[int(draw("pick", self.seed, item.id) * len(formulas))]


class GeneralPointsEpisode:
    """Up to `max_turns` tries at one problem; ends with the first correct formula."""

    def __init__(self, task: GeneralPoints, problem: Problem):
        self.messages = task.opening(problem)
        self._task, self._problem, self._turns_left = task, problem, task.max_turns

    def step(self, text: str) -> StepResult:
        """Judge one response. Raises RuntimeError once the episode has ended."""
        if not self._turns_left:
            raise RuntimeError("this episode has ended")
        verdict, more = self._task.judge(self._problem, text)
        success = verdict.kind == "correct"
        self._turns_left = 0 if success else self._turns_left - 1
        message = None
        if self._turns_left:
            message = Message("user", self._task.feedback(self._problem, verdict))
        info = {"success": success, "kind": verdict.kind, **more}
        return StepResult(message, self._task.reward(verdict), not self._turns_left, info)

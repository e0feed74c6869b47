"""General Points with pictures (GP-VL): the hand is a picture of cards, which the policy must read before it can solve.

As in `general_points`, and beside it: an answer names the cards that the policy sees. Hands are shown in black suits; the
split `visual_ood` shows the hands of `test` in red ones, so that the two differ in the look alone, as `ood` differs in the
rule. The prompt states rule and target in words, and never the cards.

Rewards are those of `general_points`, and wrong cards (-1.5): of the faults of an answer the first of these is blamed: no
legal formula, wrong cards, wrong numbers, the formula's value. An answer whose cards are misread is never correct, even
where its formula happens to be (J and K both count 10). The order of the cards is not judged.

Answer formats. "json": the field `cards` must hold the cards. "formula": `J 4 7 formula ( 10 - 4 ) * 7 = 42`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from PIL import Image

from amft_fast.config import GeneralPointsConfig
from amft_fast.interfaces import Item, Message, Sample
from amft_fast.tasks.general_points.cards import BLACK_SUITS, RED_SUITS, pick_suits, table_image
from amft_fast.tasks.general_points.hands import RULE_SENTENCES
from amft_fast.tasks.general_points.task import (
    GeneralPoints,
    Problem,
    Verdict,
    answer_text,
    feedback_text,
    formula_of,
    judge_fields,
    prompt_text,
    read_answer,
    read_formula,
    verify_formula,
)

SEPARATOR = "formula"  # between the cards and the formula in the answer format "formula"
_JSON_PROMPT = """\
You play a card game. The picture shows your hand of {count} cards. Build a formula that equals {target} and uses the number \
of each card exactly once.

Rules:
- An ace (A) counts 1, the cards 2 to 10 count their number. {rule}
- You may use +, -, *, / and round brackets, and no other numbers.

Answer with one JSON object with three fields and nothing after it:
{{"cards": the cards in the picture, without suits, "number": the number of each card, "formula": the formula as a string}}
For example, if the picture shows 2, 5, 9 and the target is 19:
{{"cards": ["2", "5", "9"], "number": [2, 5, 9], "formula": "2*5+9=19"}}
"""
_WRONG_CARDS = {
    "json": 'Your field "cards" does not hold the cards in the picture. Look again, and try again, with one JSON object as '
    "before.",
    "formula": "wrong cards again",
}
_CARD = re.compile(
    r"(?P<rank>10|[2-9]|a|ace|j|jack|q|queen|k|king)(?:\s*(?:of\s+)?(?:spades?|clubs?|hearts?|diamonds?|[♠♣♥♦]))?",
    re.IGNORECASE,
)


def read_cards(field: Any) -> list[str]:
    """The ranks that an answer's field `cards` names: "K", 7, "Queen of hearts", "10♠". What names no card is "?"."""
    if not isinstance(field, list):
        return []
    return [_rank(str(card).strip()) if isinstance(card, str | int) else "?" for card in field[:16]]


def _rank(text: str) -> str:
    found = _CARD.fullmatch(text) if len(text) <= 32 else None
    if not found:
        return "?"
    rank = found["rank"].upper()
    return rank if rank[0].isdigit() else rank[0]


def split_answer(text: str) -> tuple[list[str], str]:
    """Cards and formula of an answer in the format "formula"; no cards where the separator is missing."""
    cards, separator, formula = text.partition(SEPARATOR)
    return (read_cards(cards.split()), formula) if separator else ([], text)


def cards_right(seen: Sequence[str], cards: Sequence[str]) -> float:
    """The share of the cards that were seen; naming too many counts against it."""
    return sum((Counter(seen) & Counter(cards)).values()) / max(len(seen), len(cards))


class GeneralPointsVision(GeneralPoints):
    """The task with pictures: `amft_fast.interfaces.Task`.

    `info` of a step holds `recognition` (1.0 if all cards were named right, else 0.0)
    and `cards_right` (the share of them) as well.
    """

    splits = (*GeneralPoints.splits, "visual_ood")

    def __init__(self, settings: GeneralPointsConfig | None = None) -> None:
        super().__init__(settings)
        self.card_size, self.card_margin = self.settings.card_size, self.settings.card_margin

    def opening(self, problem: Problem) -> tuple[Message, ...]:
        if self.answer_format == "formula":
            text = prompt_text(replace(problem, cards=()), "formula").strip()
        else:
            rule, count = RULE_SENTENCES[problem.rule], len(problem.cards)
            text = _JSON_PROMPT.format(count=count, target=problem.target, rule=rule)
        return (Message("user", text, (self.image(problem),)),)

    def image(self, problem: Problem) -> Image.Image:
        """The hand on its table: the same pixels at every call, a function of the problem and the task's seed alone."""
        key = f"{self.seed}/{problem.rule}/{problem.target}" if self.card_margin else ""
        return table_image(problem.cards, problem.suits, self.card_size, self.card_margin, key)

    def picture(self, item: Item, sample: Sample) -> Image.Image:
        """What the report shows of an episode: the hand, enlarged where it is small."""
        image = self.image(item.data)
        factor = max(1, 240 // image.width)
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)

    def answer(self, problem: Problem, formula: str) -> str:
        text = answer_text(problem, formula, self.answer_format)
        return f"{' '.join(problem.cards)} {SEPARATOR} {text}" if self.answer_format == "formula" else text

    def judge(self, problem: Problem, text: str) -> tuple[Verdict, dict[str, Any]]:
        if self.answer_format == "formula":
            seen, formula = split_answer(text)
            verdict = verify_formula(formula, problem.values, problem.target)
            answer = read_formula(formula, verdict)
        else:
            fields = read_answer(text)
            seen, verdict, answer = (
                read_cards((fields or {}).get("cards")),
                judge_fields(problem, fields),
                formula_of(fields),
            )
        share = cards_right(seen, problem.cards)
        if share < 1 and verdict.kind != "illegal":
            verdict = Verdict("wrong_cards", verdict.value)
        return verdict, {"answer": answer, "recognition": float(share == 1), "cards_right": share}

    def feedback(self, problem: Problem, verdict: Verdict) -> str:
        if verdict.kind == "wrong_cards":
            return _WRONG_CARDS[self.answer_format]
        return feedback_text(problem, verdict, self.answer_format)

    @cached_property
    def _items(self) -> dict[str, tuple[Item, ...]]:
        plain = super()._items
        items = {split: tuple(self._suited(item, BLACK_SUITS) for item in found) for split, found in plain.items()}
        red = [replace(item, id=f"{item.id}/red") for item in plain["test"]]
        return items | {"visual_ood": tuple(self._suited(item, RED_SUITS) for item in red)}

    def _suited(self, item: Item, suits: Sequence[str]) -> Item:
        chosen = pick_suits(item.id, len(item.data.cards), suits, self.seed)
        return replace(item, data=replace(item.data, suits=chosen))


def make_general_points(settings: GeneralPointsConfig) -> GeneralPoints:
    """The task that the section `task.general_points` of a config asks for, in words or with pictures."""
    return GeneralPointsVision(settings) if settings.images else GeneralPoints(settings)

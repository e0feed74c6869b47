"""Hands of cards for General Points: which there are, how they are dealt, and which split each belongs to.

A hand is known by its multiset of values, and by nothing else is it put into a split: whatever its order, its face
cards or its target, it stays where it is. What looks random in `deal` and `assign_split` is a hash: the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations_with_replacement

RULES = {"10": (10, 10, 10), "11-12-13": (11, 12, 13)}  # what J, Q and K count
RULE_SENTENCES = {
    "10": "The face cards J, Q and K each count 10.",
    "11-12-13": "The face cards count J = 11, Q = 12 and K = 13.",
}
ID_RULE, OOD_RULE = RULES
FACES = ("J", "Q", "K")


@dataclass(frozen=True)
class Problem:
    """One hand and its target. `values` are the cards' values under `rule`, in the cards' order; `suits` are theirs where
    the hand is shown as a picture."""

    cards: tuple[str, ...]
    values: tuple[int, ...]
    target: int
    rule: str
    suits: tuple[str, ...] = ()


def hands(num_cards: int, rule: str = ID_RULE) -> Iterator[tuple[int, ...]]:
    """Every multiset of values, sorted: 1-10 under rule "10"; under the other, those of 1-13 with one above 10."""
    for hand in combinations_with_replacement(range(1, max(RULES[rule]) + 1), num_cards):
        if rule == ID_RULE or hand[-1] > 10:
            yield hand


def assign_split(
    hand: Sequence[int], *, seed: int = 0, val_share: float = 0.1, test_share: float = 0.2, ood_share: float = 0.5
) -> str:
    """The one split of a multiset of values: train, val or test; ood or ood_train if it holds a value above 10.

    It hangs on a hash of the sorted values and `seed` alone, so it is the same for any target, order, rule and machine.
    """
    at = draw("split", seed, *sorted(hand))
    if max(hand) > 10:
        return "ood" if at < ood_share else "ood_train"
    if at < val_share:
        return "val"
    return "test" if at < val_share + test_share else "train"


def draw(*parts: object) -> float:
    """A number in [0, 1) that hangs on `parts` alone: the same on every machine and Python."""
    digest = sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def deal(hand: Sequence[int], target: int, rule: str, seed: int = 0) -> Problem:
    """Turn values into cards, in an order and with face cards that hang on the arguments alone.

    Under rule "10" a 10 is as likely shown as 10, J, Q or K.
    """
    key = (seed, rule, target, *sorted(hand))
    shuffled = sorted(enumerate(sorted(hand)), key=lambda pair: draw("order", *key, pair[0]))
    cards = tuple(_card(value, rule, draw("face", *key, i)) for i, value in shuffled)
    return Problem(cards, tuple(value for _, value in shuffled), target, rule)


def shuffled_deal(hand: Sequence[int], target: int, rule: str, rng: random.Random) -> Problem:
    """As `deal`, in an order and with face cards drawn from `rng`."""
    order = rng.sample(list(hand), len(hand))
    return Problem(tuple(_card(value, rule, rng.random()) for value in order), tuple(order), target, rule)


def _card(value: int, rule: str, pick: float) -> str:
    if value == 1:
        return "A"
    names = [face for face, count in zip(FACES, RULES[rule]) if count == value]
    if value <= 10:
        names.append(str(value))
    return names[int(pick * len(names))]

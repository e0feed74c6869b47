"""The sentences of the word problems. Each belongs to one split alone; `ood` has its own, and larger numbers.

{who} is a name, {he}, {his} go with it, {things} is what is counted, {n} a number, {m} a second one.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrases(NamedTuple):
    """Ways to say one thing each: how many there are (plain, or in groups), that some come or go, what is asked at the end (how
    many are left, or what all of them cost)."""

    have: tuple[str, ...]
    groups: tuple[str, ...]
    more: tuple[str, ...]
    less: tuple[str, ...]
    count: tuple[str, ...]
    cost: tuple[str, ...]


PHRASES = {
    "train": Phrases(
        have=("{who} has {n} {things}.", "There are {n} {things} on {who}'s table.", "{who} starts with {n} {things}."),
        groups=(
            "{who} has {n} bags with {m} {things} each.",
            "{who} fills {n} boxes, and puts {m} {things} into each box.",
            "There are {n} shelves with {m} {things} on each.",
        ),
        more=("{he} buys {n} more.", "A friend brings {n} more.", "Then {he} finds {n} others."),
        less=("{he} gives {n} away.", "{he} loses {n} of them.", "Then {n} of them are sold."),
        count=("How many {things} are there now?", "How many {things} does {who} have in the end?"),
        cost=(
            "Each one costs {n} coins. What do all of them cost?",
            "{he} sells all of them for {n} coins each. How many coins is that?",
        ),
    ),
    "val": Phrases(
        have=("{n} {things} belong to {who}.",),
        groups=("On {n} plates {who} sees {m} {things} per plate.",),
        more=("{his} sister adds {n} to them.",),
        less=("A neighbour borrows {n} and keeps them.",),
        count=("Count the {things} that remain.",),
        cost=("The price is {n} coins apiece. What is the price of everything?",),
    ),
    "test": Phrases(
        have=("In the morning {who} counts {n} {things}.", "{who} keeps {n} {things} at home."),
        groups=("{who} packs {n} crates of {m} {things}.", "Each of {who}'s {n} baskets holds {m} {things}."),
        more=("{he} is given {n} extra ones.", "Later {n} new ones arrive."),
        less=("The wind takes {n} of them.", "{he} throws {n} out."),
        count=("What number of {things} is left?", "Tell how many {things} {who} owns now."),
        cost=(
            "Somebody pays {n} coins for every one. How much is paid?",
            "With {n} coins per piece, what is their worth?",
        ),
    ),
    "ood": Phrases(
        have=(
            "The storeroom that {who} looks after held {n} {things} at noon.",
            "Of {things}, {who} had collected {n} by spring.",
        ),
        groups=(
            "A lorry delivered {n} pallets, {m} {things} on every pallet, to {who}.",
            "{who} set up {n} rows, {m} {things} to a row.",
        ),
        more=("A second delivery raised the stock by {n}.", "After the holidays {n} joined them."),
        less=("An inspection sorted out {n}.", "By the evening {n} had gone missing."),
        count=("Work out the present stock of {things}.", "What does the inventory say about {things}?"),
        cost=("A dealer offers {n} coins for a single one and takes the lot. What does the dealer hand over?",),
    ),
}

PEOPLE = {
    "he": ("Tom", "Ben", "Paul", "Ravi", "Omar", "Luis", "Ken", "Ivan"),
    "she": ("Anna", "Mia", "Lucy", "Priya", "Sara", "Rosa", "Yuki", "Nora"),
}
THINGS = ("apples", "books", "pens", "stamps", "shells", "cards", "stones", "eggs", "tiles", "plums", "cups", "marbles")

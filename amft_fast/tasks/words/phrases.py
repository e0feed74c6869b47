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
        have=(
            "{who} has {n} {things}.",
            "There are {n} {things} on {who}'s table.",
            "{who} starts with {n} {things}.",
            "{who} owns {n} {things}.",
            "{n} {things} lie in {who}'s drawer.",
            "At first {who} holds {n} {things}.",
            "{who} found {n} {things} in the garden.",
            "On Monday {who} has {n} {things} in a bag.",
            "{who} brings {n} {things} to school.",
            "{who}'s box contains {n} {things}.",
            "Yesterday {who} bought {n} {things}.",
            "{who} made {n} {things} this week.",
            "We see {n} {things} that are {who}'s.",
            "{who} got {n} {things} as a present.",
            "A jar of {who}'s has {n} {things} in it.",
            "In the kitchen {who} sees {n} {things}.",
        ),
        groups=(
            "{who} has {n} bags with {m} {things} each.",
            "{who} fills {n} boxes, and puts {m} {things} into each box.",
            "There are {n} shelves with {m} {things} on each.",
            "{who} buys {n} packs of {m} {things}.",
            "{who} owns {n} jars. Every jar has {m} {things} in it.",
            "{n} friends give {who} {m} {things} each.",
            "{who} lays out {n} piles of {m} {things}.",
            "Each of the {n} drawers of {who} has {m} {things}.",
            "For {n} days {who} makes {m} {things} a day.",
            "In {n} rooms {who} finds {m} {things} per room.",
            "{who} carries {n} trays, with {m} {things} on every tray.",
            "There are {n} tables, and {who} sets {m} {things} on each one.",
            "{who} ties {n} bundles, {m} {things} to a bundle.",
            "For {n} weeks {who} gets {m} {things} every week.",
        ),
        more=(
            "{he} buys {n} more.",
            "A friend brings {n} more.",
            "Then {he} finds {n} others.",
            "{he} gets {n} more from an aunt.",
            "After that {he} makes another {n}.",
            "On Tuesday {n} more come.",
            "{his} mother gives {n} more.",
            "{he} wins {n} in a game.",
            "{he} picks up {n} on the way home.",
            "Next {n} are put in.",
            "An uncle sends {n} as a gift.",
            "The next day {he} takes {n} more.",
            "{he} receives another {n} in the mail.",
            "Soon there are {n} more of them.",
        ),
        less=(
            "{he} gives {n} away.",
            "{he} loses {n} of them.",
            "Then {n} of them are sold.",
            "{he} eats or breaks {n}.",
            "A dog runs off with {n}.",
            "{he} drops {n} in the river.",
            "On Friday {n} are stolen.",
            "{his} brother takes {n}.",
            "{he} sends {n} to a friend.",
            "{n} of them get lost.",
            "Next {he} hands {n} to a teacher.",
            "{he} uses up {n}.",
            "After a week {n} are broken.",
            "Rain spoils {n} of them.",
        ),
        count=(
            "How many {things} are there now?",
            "How many {things} does {who} have in the end?",
            "How many {things} are left?",
            "How many are there at last?",
            "What is the number of {things} now?",
            "Find how many {things} {who} has.",
            "How many {things} remain with {who}?",
            "Say how many {things} there are.",
            "In the end, {who} has how many {things}?",
            "What is the total of {who}'s {things}?",
        ),
        cost=(
            "Each one costs {n} coins. What do all of them cost?",
            "{he} sells all of them for {n} coins each. How many coins is that?",
            "One of them is worth {n} coins. What are they all worth?",
            "A shop pays {n} coins for one. How many coins for all of them?",
            "Every one of them sells for {n} coins. How many coins does {he} get?",
            "If one costs {n} coins, what is the cost of them all?",
            "{he} pays {n} coins for each. What does {he} pay in all?",
            "The cost of one is {n} coins. Find the cost of all.",
            "At {n} coins each, how many coins are all of them?",
            "They bring {n} coins each. How many coins come in?",
        ),
    ),
    "val": Phrases(
        have=(
            "{n} {things} belong to {who}.",
            "This morning {who} puts {n} {things} on a shelf.",
            "{who} is the owner of {n} {things}.",
            "{who} takes {n} {things} along.",
            "In {who}'s basket there are {n} {things}.",
        ),
        groups=(
            "On {n} plates {who} sees {m} {things} per plate.",
            "{who} prepares {n} boxes of {m} {things}.",
            "{who} has {n} sacks, and {m} {things} are in every sack.",
            "There are {n} rows of {m} {things} in {who}'s room.",
            "{n} times {who} brings {m} {things}.",
        ),
        more=(
            "{his} sister adds {n} to them.",
            "{he} is handed {n} more.",
            "After lunch {n} more turn up.",
            "{he} then makes {n} extra.",
            "A neighbour brings {n} others.",
        ),
        less=(
            "A neighbour borrows {n} and keeps them.",
            "{he} breaks {n}.",
            "Later {n} of them vanish.",
            "{he} gives {n} to {his} aunt.",
            "Somebody takes {n} of them.",
        ),
        count=(
            "Count the {things} that remain.",
            "How many {things} are with {who} now?",
            "Give the number of {things} at the end.",
            "How many {things} does that make?",
        ),
        cost=(
            "The price is {n} coins apiece. What is the price of everything?",
            "{he} gets {n} coins for each. How many coins does {he} get for all?",
            "At a price of {n} coins for one, what do they cost together?",
            "Each is sold for {n} coins. How many coins are paid?",
        ),
    ),
    "test": Phrases(
        have=(
            "In the morning {who} counts {n} {things}.",
            "{who} keeps {n} {things} at home.",
            "{who} carries {n} {things} to the market.",
            "A bag of {n} {things} is {who}'s.",
        ),
        groups=(
            "{who} packs {n} crates of {m} {things}.",
            "Each of {who}'s {n} baskets holds {m} {things}.",
            "{who} collects {n} sets of {m} {things}.",
            "{n} children bring {who} {m} {things} each.",
        ),
        more=(
            "{he} is given {n} extra ones.",
            "Later {n} new ones arrive.",
            "{he} picks {n} more.",
            "{his} friends give {n} more.",
        ),
        less=("The wind takes {n} of them.", "{he} throws {n} out.", "{he} sells {n} of them.", "Then {n} fall down."),
        count=(
            "What number of {things} is left?",
            "Tell how many {things} {who} owns now.",
            "How many {things} has {who} got now?",
            "How many are there in all?",
        ),
        cost=(
            "Somebody pays {n} coins for every one. How much is paid?",
            "With {n} coins per piece, what is their worth?",
            "If each sells for {n} coins, how many coins come of all?",
            "One costs {n} coins. How many coins do they all cost?",
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

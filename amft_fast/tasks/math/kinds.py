"""What an answer can be: a value with its unit, a list, an interval, an equation, a matrix, words, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from amft_fast.tasks.math.exact import NoValue, TooBig, exact
from amft_fast.tasks.math.latex import Unreadable
from amft_fast.tasks.math.tree import INFINITY, MINUS_INFINITY, Node
from amft_fast.tasks.math.units import Unit

kind = dataclass(frozen=True)


@kind
class Decimal:
    """How a decimal was written: the power of ten of its last digit, and its significant digits but for zeros at the end."""

    places: int
    digits: int


@kind
class Amount:
    """A value with its unit, or none. `decimal` when it is written as one; `loose` when the unit may be none."""

    node: Node
    unit: Unit | None = None
    decimal: Decimal | None = None
    loose: bool = False


@kind
class Sum:
    """One amount in several units: 2 hours 30 minutes."""

    parts: tuple[Amount, ...]


@kind
class Named:
    """`name = value`."""

    name: str
    value: Any
    node: Node | None = None
    """The name as a variable, when it can stand in an equation."""


@kind
class Items:
    """A list (or a set, in braces)."""

    items: tuple[Any, ...]
    braces: bool = False


@kind
class Bracket:
    """A tuple or an interval, with its brackets."""

    open: str
    close: str
    items: tuple[Any, ...]


@kind
class Piece:
    """An interval; a point when both ends are the same."""

    low: Amount
    low_closed: bool
    high: Amount
    high_closed: bool


@kind
class Ranges:
    """Intervals together, perhaps those of a named variable."""

    pieces: tuple[Piece, ...]
    name: str | None = None


@kind
class Equation:
    """Two sides; not that of a name and its value."""

    left: Node
    right: Node


@kind
class Chain:
    """Sides with relations between them, turned so that they read from small to large."""

    sides: tuple[Any, ...]
    relations: tuple[str, ...]


@kind
class Matrix:
    kind: str
    rows: tuple[tuple[Any, ...], ...]
    scale: Node | None = None


@kind
class Numeral:
    """Digits in a base."""

    digits: str
    base: int


@kind
class Ratio:
    """a:b, or a time of day: compared part by part."""

    parts: tuple[Any, ...]


@kind
class Residue:
    """a mod n, perhaps of something that is named."""

    subject: str
    value: Node
    modulus: Node


@kind
class Under:
    """A value with what a name in it may be: k\\pi, k \\in Z."""

    value: Any
    conditions: tuple[tuple[str, str], ...]


@kind
class Words:
    key: tuple[str, ...]


def reals() -> Ranges:
    """All real numbers."""
    return Ranges((Piece(Amount(MINUS_INFINITY), False, Amount(INFINITY), False),))


def without(holes: Sequence[Any], name: str | None = None) -> Ranges:
    """The real numbers without some points."""
    try:
        known = sorted((exact(p.node), i) for i, p in enumerate(holes)) if len(holes) > 1 else [(0, 0)]
    except (AttributeError, TypeError, TooBig, NoValue):
        raise Unreadable("holes") from None
    if not holes or not all(isinstance(p, Amount) for p in holes):
        raise Unreadable("holes")
    ends = [Amount(MINUS_INFINITY), *(holes[i] for _, i in known), Amount(INFINITY)]
    return Ranges(tuple(Piece(low, False, high, False) for low, high in pairwise(ends)), name)


def holes_of(value: Ranges) -> list[Amount] | None:
    """The points that are left out, when that is all."""
    ends = [p for piece in value.pieces for p in (piece.low, piece.high)]
    return ends[1:-1:2] if len(ends) > 2 and without(ends[1:-1:2]).pieces == value.pieces else None


def as_ranges(value: Any) -> Ranges:
    """An interval in brackets as Ranges. Raises Unreadable for what is none."""
    if isinstance(value, Ranges):
        return value
    if isinstance(value, Bracket) and len(value.items) == 2 and value.open in "([" and value.close in ")]":
        low, high = value.items
        if isinstance(low, Amount) and isinstance(high, Amount):
            return Ranges((Piece(low, value.open == "[", high, value.close == "]"),))
    raise Unreadable("no interval")

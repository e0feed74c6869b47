"""Relations: a name and its value, equations, inequalities, membership."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amft_fast.tasks.math.amounts import read_amount
from amft_fast.tasks.math.forms import name_of
from amft_fast.tasks.math.kinds import Amount, Chain, Equation, Named, Piece, Ranges, as_ranges, without
from amft_fast.tasks.math.latex import Token, Unreadable
from amft_fast.tasks.math.tree import INFINITY, MINUS_INFINITY, own_symbol, symbols

Read = Callable[[list[Token], bool], Any]
RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "in": "in",
    "approx": "~",
    "notin": "notin",
}
"""Tokens that relate two sides, and what they are called in kinds.Chain."""


def related(parts: list[list[Token]], relations: list[str], gold: bool, value_of: Read) -> Any:
    """The reading of sides with relations between them; `value_of` reads a side of any kind. Raises Unreadable."""
    if not all(parts):
        raise Unreadable("relation")
    kinds = set(relations)
    if kinds <= {"=", "~"}:
        return _equated(parts, relations, gold, value_of)
    if kinds == {"in"} and len(parts) == 2:
        name = name_of(parts[0])
        value = value_of(parts[1], gold)
        if name is None:
            raise Unreadable("in")
        try:
            return Ranges(as_ranges(value).pieces, name[0])
        except Unreadable:
            return Named(name[0], value)
    if kinds == {"!="} and len(parts) == 2:
        name, value = name_of(parts[0]), read_amount(parts[1], gold)
        if name is None:
            raise Unreadable("≠")
        return without([value], name[0])
    if kinds <= {"<", "<="} or kinds <= {">", ">="}:
        if relations[0][0] == ">":
            parts, relations = parts[::-1], [r.replace(">", "<") for r in relations[::-1]]
        return _ordered(parts, relations, gold)
    raise Unreadable("relations")


def _ordered(parts: list[list[Token]], relations: list[str], gold: bool) -> Any:
    sides = [read_amount(part, gold) for part in parts]
    low, high = Amount(MINUS_INFINITY), Amount(INFINITY)
    for at, side in enumerate(sides):
        alone = side.node[0] == "sym" and side.unit is None
        others = [s for i, s in enumerate(sides) if i != at]
        if not alone or any(side.node[1] in symbols(s.node) for s in others):
            continue
        if len(sides) == 2:
            piece = (
                Piece(low, False, sides[1], relations[0] == "<=")
                if at == 0
                else Piece(sides[0], relations[0] == "<=", high, False)
            )
            if at == 1 and others[0].node[0] == "sym":  # a < x of two names: a matter of order
                continue
            if at == 0 and others[0].node[0] == "sym":
                break
            return Ranges((piece,), side.node[1])
        if len(sides) == 3 and at == 1:
            return Ranges((Piece(sides[0], relations[0] == "<=", sides[2], relations[1] == "<="),), side.node[1])
    return Chain(tuple(sides), tuple(relations))


def _equated(parts: list[list[Token]], relations: list[str], gold: bool, value_of: Read) -> Any:
    name, rest = name_of(parts[0]), parts[1:]
    if name is None and len(parts) == 2:
        other = name_of(parts[1])
        if other is not None and (other[1] is None or other[1][0] == "sym"):
            name, rest = other, parts[:1]
    if name is not None:
        values = [value_of(part, gold) for part in rest]
        if name[1] is not None:
            own = own_symbol(name[1])
            if any(isinstance(v, Amount) and own in symbols(v.node) for v in values):
                raise Unreadable("x = x + 1")
        if relations[0] == "~" and not (len(values) == 1 and isinstance(values[0], Amount) and values[0].decimal):
            raise Unreadable("about")
        if len(values) > 1 and not all(isinstance(v, Amount) for v in values):
            raise Unreadable("chain")
        value = Chain(tuple(values), tuple(relations[1:])) if len(values) > 1 else values[0]
        return Named(name[0], value, name[1])
    if len(parts) > 2 or "~" in relations:
        return Chain(tuple(read_amount(part, gold) for part in parts), tuple(relations))
    left, right = read_amount(parts[0], gold), read_amount(parts[1], gold)
    if not symbols(left.node) and not symbols(right.node):
        return Chain((left, right), ("=",))
    return Equation(left.node, right.node)

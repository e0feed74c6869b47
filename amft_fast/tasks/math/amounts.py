"""Amounts: a value with its unit, from tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from amft_fast.tasks.math import units
from amft_fast.tasks.math.cursor import Cursor
from amft_fast.tasks.math.expression import Parser
from amft_fast.tasks.math.kinds import Amount, Decimal, Sum
from amft_fast.tasks.math.latex import DOLLAR, Token, Unreadable, trimmed
from amft_fast.tasks.math.signs import names
from amft_fast.tasks.math.tree import Node, number_value
from amft_fast.tasks.math.units import Unit

_MONEY = {DOLLAR: "$", "£": "£", "€": "€", "¥": "¥", "₹": "₹"}


def read_amount(listed: list[Token], gold: bool) -> Any:
    """A value with its unit. Raises Unreadable."""
    listed = trimmed(listed)
    if not listed:
        raise Unreadable("empty")
    words = [t.text.lower() for t in listed]
    if all(t.kind in ("word", "text") for t in listed):
        number = cardinal(words)
        if number is not None:
            return Amount(("num", Fraction(number)))
    unit, listed = _money(listed)
    parser = Parser(listed, gold)
    node = parser.expression()
    tail = parser.tokens[parser.at :]
    decimal = _decimal(parser.tokens[: parser.at])
    if not tail:
        return Amount(node, unit, decimal)
    loose = False
    if node[0] == "num" and len(tail) == 1 and tail[0].text in ("'", "''"):
        return Amount(node, units.parse("ft" if tail[0].text == "'" else "in"), decimal, loose=True)
    while tail and tail[0].kind in ("word", "text") and tail[0].text.lower() in units.MAGNITUDES | units.FRACTIONS:
        node = ("mul", node, ("num", (units.MAGNITUDES | units.FRACTIONS)[tail[0].text.lower()]))
        tail, decimal = tail[1:], None
    more = _compound(tail, gold) if tail and unit is None else None
    if more is not None:
        first, others = more
        parts = (Amount(node, first, decimal), *others)
        if any(p.unit is None for p in parts) or not one_family(parts):
            raise Unreadable("units")
        return Sum(parts)
    if tail:
        phrase = _phrase(tail)
        found = (units.own_phrase if gold else units.parse)(phrase)
        if found is None or (unit is not None and found != unit):
            raise Unreadable(phrase)
        unit = found
    return Amount(node, unit, decimal, loose)


def _money(listed: list[Token]) -> tuple[Unit | None, list[Token]]:
    """The unit of a sign of money before a number, and the rest."""
    begin = 1 if listed[0].text == "-" else 0
    at = begin + (listed[begin].text in ("US", "USD") if len(listed) > begin + 1 else 0)
    if at < len(listed) - 1 and listed[at].kind == "sign" and listed[at].text in _MONEY:
        sign = listed[:1] if begin else []
        rest = [*sign, *listed[at + 1 :]]
        return units.parse(_MONEY[listed[at].text]), rest
    if at > begin and listed[at].kind == "num":
        return units.parse("$"), [*listed[:begin], *listed[at:]]
    if len(listed) > 1 and listed[-1].text in _MONEY:
        return units.parse(_MONEY[listed[-1].text]), listed[:-1]
    return None, listed


def _compound(tail: list[Token], gold: bool) -> tuple[Unit, tuple[Amount, ...]] | None:
    """`hours 30 minutes`: the unit of the value before, and the amounts that follow."""
    at = next((i for i, t in enumerate(tail) if t.kind == "num"), None)
    if not at:
        return None
    first = units.parse(_phrase(tail[:at]))
    if first is None:
        return None
    rest = read_amount(tail[at:], gold)
    return first, rest.parts if isinstance(rest, Sum) else (rest,)


def _phrase(tail: Sequence[Token]) -> str:
    """The text of a unit from its tokens. Raises Unreadable for what is in no unit."""
    out: list[str] = []
    for i, token in enumerate(tail):
        text = token.text
        if token.kind == "cmd":
            if text == "frac":
                return _phrase(tail[:i]) + _fraction_of_units(tail[i + 1 :])
            text = {"Omega": "Ω ", "mu": "μ", "degree": "degree ", "circ": "degree "}.get(text, "")
            if not text:
                raise Unreadable(token.text)
            out.append(text)
        elif token.kind in ("word", "text", "letter", "roman"):
            out.append(text + " ")
        elif token.kind == "num" and i and tail[i - 1].text in ("^", "{", "-"):
            out.append(text)
        elif token.kind == "sign" and text == "." and out:
            out[-1] = out[-1].rstrip() + ". "
        elif token.kind == "sign" and (text in "^{}/*()-%¢" or text in _MONEY):
            out.append(_MONEY.get(text, text))
        else:
            raise Unreadable(text)
    return "".join(out).strip()


def _fraction_of_units(rest: Sequence[Token]) -> str:
    parser = Cursor(rest)
    top, bottom = parser.raw_group(), parser.raw_group()
    if parser.at != len(rest):
        raise Unreadable("unit")
    return f"({_phrase(top)})/({_phrase(bottom)})"


def _decimal(listed: Sequence[Token]) -> Decimal | None:
    """How a decimal is written, with its power of ten; None for all else."""
    text = "".join(t.text for t in listed if t.text not in ("{", "}")).lstrip("+-")
    match = re.fullmatch(r"(\d*\.\d*)(?:[eE]([+-]?\d{1,4})|(?:\*|times)10\^(-?\d{1,4}))?", text)
    if match is None:
        return None
    digits, power = match[1], int(match[2] or match[3] or 0)
    return Decimal(power - len(digits.partition(".")[2]), len(digits.replace(".", "").strip("0")))


_CARDINALS = {
    w: n
    for n, w in enumerate(
        names(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
            "eighteen nineteen"
        )
    )
} | {w: 10 * n for n, w in enumerate(names("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}


def cardinal(words: Sequence[str]) -> int | None:
    """The number that words like `twenty-three` name, below a thousand."""
    parts = [p for w in words for p in w.split("-")]
    if not parts or len(parts) > 4 or not all(p in _CARDINALS or p in ("hundred", "and") for p in parts):
        return None
    if "hundred" in parts[:2]:
        if len(parts) < 2 or parts[1] != "hundred" or not 0 < _CARDINALS.get(parts[0], 0) < 10:
            return None
        rest = parts[2:] if parts[2:3] != ["and"] else parts[3:]
        more = cardinal(rest) if rest else 0
        return None if more is None or more >= 100 else 100 * _CARDINALS[parts[0]] + more
    if len(parts) == 1:
        return _CARDINALS.get(parts[0])
    if len(parts) == 2 and _CARDINALS.get(parts[0], 0) >= 20 and 0 < _CARDINALS.get(parts[1], 0) < 10:
        return _CARDINALS[parts[0]] + _CARDINALS[parts[1]]
    return None


def with_letter_as_unit(listed: list[Token], gold: bool) -> list[Amount]:
    """The reading of `3 m` and `9.8 m/s^2` with the letters as units: a plain number, a space, and known ones."""
    signed = 1 if listed[0].text == "-" else 0
    if len(listed) < signed + 2 or listed[signed].kind != "num":
        return []
    tail = listed[signed + 1 :]
    spaced = tail[0].space and (tail[0].kind == "letter" or (tail[0].kind, tail[0].text) == ("cmd", "mu"))
    if not spaced and not (tail[0].kind == "roman" and tail[0].text in units.LONE_LETTERS):
        return []
    if len(tail) == 1 and tail[0].text not in units.LONE_LETTERS:
        return []
    try:
        unit = units.parse(_phrase(tail))
    except Unreadable:
        return []
    if unit is None or unit.noun:
        return []
    node: Node = ("num", number_value(listed[signed].text))
    loose = len(tail) == 1 and tail[0].kind == "letter"
    return [Amount(("neg", node) if signed else node, unit, _decimal(listed[: signed + 1]), loose)]


def one_family(items: Sequence[Amount]) -> bool:
    names = [v.unit.parts for v in items]
    if any(len(n) != 1 or n[0][1] != 1 for n in names):
        return False
    for family in units.FAMILIES:
        sizes = [family.get(n[0][0]) for n in names]
        if None not in sizes:
            return all(big > small for big, small in pairwise(sizes))
    return False

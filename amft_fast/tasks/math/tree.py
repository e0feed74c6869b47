"""Trees of expressions: their kinds of nodes, and what is done with any of them.

Nodes are tuples, the first element is the kind:

    ("num", Fraction)  ("sym", name)  ("const", "pi" | "e" | "i" | "inf")  ("neg", a)  ("add", a, b)  ("mul", a, b)
    ("div", a, b)  ("pow", a, b)  ("root", n, a)  ("fn", name, args)  ("call", name, args): an unknown function
    ("fact", a)  ("fact2", a)  ("binom", n, k)  ("sum" | "prod", variable, low, high, body)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from amft_fast.tasks.math.latex import Unreadable

Node = tuple[Any, ...]
ZERO: Node = ("num", Fraction(0))
INFINITY: Node = ("const", "inf")
MINUS_INFINITY: Node = ("neg", INFINITY)
MAX_DIGITS = 1000
"""Digits of a number that is written out."""


def number_value(text: str) -> Fraction:
    """The value of a number token: `12`, `.5`, `3e-4`, `0.1(6)` with its repeating digits in brackets."""
    if len(text) > MAX_DIGITS:
        raise Unreadable("digits")
    match = re.fullmatch(r"(\d*)(?:\.(\d*))?\((\d+)\)", text)
    if match:
        whole, head, tail = match[1] or "0", match[2], match[3]
        if head is None:  # 2(3): a product, not a repeating decimal
            return Fraction(int(whole) * int(tail))
        nines = (10 ** len(tail) - 1) * 10 ** len(head)
        return Fraction(int(whole + head + tail) - int(whole + head), nines)
    digits, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_DIGITS:
        raise Unreadable("exponent")
    return Fraction(digits.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)


def symbols(node: Node) -> frozenset[str]:
    """The names of the variables (and unknown functions) in a tree."""
    kind = node[0]
    if kind == "sym":
        return frozenset([node[1]])
    if kind in ("sum", "prod"):
        inner = symbols(node[4]) - {node[1]}
        return inner | symbols(node[2]) | symbols(node[3])
    found: frozenset[str] = frozenset()
    if kind in ("fn", "call"):
        for arg in node[2]:
            found |= symbols(arg)
        return found | {f"{node[1]}()"} if kind == "call" else found
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


def own_symbol(node: Node) -> str:
    """The one symbol of a name: x of x, f() of f(x)."""
    return node[1] if node[0] == "sym" else f"{node[1]}()"


def integers_in(node: Node) -> frozenset[str]:
    """The variables that stand for integers: of factorials, binomials, ends of sums, exponents of negative numbers."""
    kind = node[0]
    if kind in ("fact", "fact2", "binom"):
        return symbols(node)
    if kind in ("sum", "prod"):
        return symbols(node[2]) | symbols(node[3]) | integers_in(node[4]) - {node[1]}
    found: frozenset[str] = frozenset()
    if kind == "pow" and (node[1][0] == "neg" or (node[1][0] == "num" and node[1][1] < 0)) and not symbols(node[1]):
        found = symbols(node[2])
    parts = node[2] if kind in ("fn", "call") else node[1:]
    return found.union(*(integers_in(part) for part in parts if isinstance(part, tuple)))


def has_i(node: Node) -> bool:
    """Whether the imaginary unit is in it."""
    if node[:2] == ("const", "i"):
        return True
    parts = node[2] if node[0] in ("fn", "call") else node[1:]
    return any(has_i(part) for part in parts if isinstance(part, tuple))


def replaced(node: Node, place: Mapping[str, Node]) -> Node:
    """The expression with others for its variables."""
    kind = node[0]
    if kind == "sym":
        return place.get(node[1], node)
    if kind in ("fn", "call"):
        return (kind, node[1], tuple(replaced(arg, place) for arg in node[2]))
    if kind in ("sum", "prod"):
        inner = {name: other for name, other in place.items() if name != node[1]}
        return (kind, node[1], replaced(node[2], place), replaced(node[3], place), replaced(node[4], inner))
    return (kind, *(replaced(part, place) if isinstance(part, tuple) else part for part in node[1:]))


def as_fraction(node: Node) -> tuple[Node, Node]:
    """(numerator, denominator) of an expression, as far as sums, products and quotients go."""
    kind, one = node[0], ("num", Fraction(1))
    if kind == "neg":
        top, bottom = as_fraction(node[1])
        return ("neg", top), bottom
    if kind in ("add", "mul", "div"):
        (a, b), (c, d) = as_fraction(node[1]), as_fraction(node[2])
        if kind == "add":
            return (("add", a, c), one) if b == d == one else (("add", ("mul", a, d), ("mul", c, b)), ("mul", b, d))
        return (("mul", a, c), ("mul", b, d)) if kind == "mul" else (("mul", a, d), ("mul", b, c))
    return node, one

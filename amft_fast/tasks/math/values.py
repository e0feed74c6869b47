"""Whether two values are the same: exact ones by exact arithmetic, others by evaluation at many points with more digits than
their sizes could hide a difference in.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from amft_fast.tasks.math.evaluate import Point, decimal, near, points
from amft_fast.tasks.math.exact import NoValue, TooBig, exact
from amft_fast.tasks.math.kinds import Amount
from amft_fast.tasks.math.latex import Unreadable
from amft_fast.tasks.math.tree import INFINITY, MINUS_INFINITY, ZERO, Node, integers_in, replaced, symbols
from amft_fast.tasks.math.units import PERCENT

MIN_DIGITS = 6
"""Significant digits of a decimal that may stand for a value it rounds."""


class Undecided(Exception):
    """It takes more than exact arithmetic to tell."""


class Values:
    """Compares values; the gold's comes first. `quick`: raises Undecided where they are not exact."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick

    def any_of(self, *tests: Any) -> bool:
        """Whether one of the tests holds; Undecided when none does and one is."""
        open_ = False
        for test in tests:
            try:
                if test():
                    return True
            except Undecided:
                open_ = True
        if open_:
            raise Undecided
        return False

    def amounts(self, g: Amount, a: Amount) -> bool:
        if g.unit != a.unit:
            if g.unit is not None and a.unit is not None:
                return False
            if a.unit is not None and a.loose:
                return False
            if PERCENT in (g.unit, a.unit):
                return self.percent(g, a)
        return self.numbers(g, a)

    def percent(self, g: Amount, a: Amount) -> bool:
        """50% is 0.5. The sign may be left out too (a problem that asks for a percentage), but only above 1: 1% never passes
        for a probability of 1.
        """
        if symbols(g.node) or symbols(a.node):
            return False
        hundredth = ("num", Fraction(1, 100))
        scaled = [Amount(("mul", v.node, hundredth)) if v.unit == PERCENT else Amount(v.node) for v in (g, a)]
        if self.nodes(scaled[0].node, scaled[1].node):
            return True
        try:
            size = exact(g.node)
        except (TooBig, NoValue):
            return False
        return size is not None and abs(size) > 1 and self.numbers(g, a)

    def numbers(self, g: Amount, a: Amount) -> bool:
        return self.nodes(g.node, a.node) or self.rounded(g, a)

    def rounded(self, g: Amount, a: Amount) -> bool:
        """Whether one is a decimal of at least six significant digits that rounds or cuts the other; no integer is rounded."""
        for written, other in ((a, g), (g, a)):
            if written.decimal is None or written.decimal.digits < MIN_DIGITS or symbols(other.node):
                continue
            short = exact(written.node)
            if short is None or short.denominator == 1:
                continue
            try:
                long = exact(other.node)
                if long is None:
                    if self.quick:
                        raise Undecided
                    found = decimal(other.node, 60 + abs(written.decimal.places))
                    if found is None or hasattr(found, "_mpc_") or abs(found) > 1e40:
                        continue
                    long = _fraction(found, 60 + abs(written.decimal.places))
            except (TooBig, NoValue):
                continue
            if long.denominator == 1:
                continue
            unit = Fraction(10) ** written.decimal.places
            rest = abs(long) - abs(short)
            cut = 0 <= rest < unit and abs(short) / unit % 10 != 9  # 0.999999 is no 0.9999999999
            if (long >= 0) == (short >= 0) and (abs(rest) * 2 <= unit or cut):
                return True
        return False

    def nodes(self, g: Node, a: Node) -> bool:
        """Whether two expressions are the same; an answer without all of its gold's variables, or with more, is not."""
        if g == a:
            return True
        ends = (INFINITY, MINUS_INFINITY)
        if g in ends or a in ends:
            return False
        names, others = symbols(g), symbols(a)
        if not names and others:
            return False
        if not names:
            return self.constants(g, a)
        if not others:
            return False
        if self.quick:
            raise Undecided
        return self.agree(g, a, names | others, integers_in(g))

    def constants(self, g: Node, a: Node) -> bool:
        try:
            x, y = exact(g), exact(a)
        except NoValue:
            return False
        except TooBig:
            return False
        if x is not None and y is not None:
            return x == y
        if self.quick:
            raise Undecided
        try:
            return near(g, a, {}) is True
        except TooBig:
            return False

    def agree(self, g: Node, a: Node, names: frozenset[str], whole: frozenset[str] = frozenset()) -> bool:
        """Whether they have the same value wherever they have one, at two points or more."""
        seen = 0
        for at in points(names, whole):
            try:
                verdict = near(g, a, at)
            except TooBig:
                continue
            if verdict is False:
                return False
            seen += verdict is True
        return seen >= 2

    def roughly(self, one: Amount, two: Amount) -> bool:
        """Whether the second is the first to the digits it is written with."""
        if two.decimal is None or symbols(one.node):
            return False
        if self.quick:
            raise Undecided
        apart = decimal(("add", one.node, ("neg", two.node)))
        return apart is not None and abs(apart) <= 0.501 * 10.0**two.decimal.places

    def multiples(self, g: Node, a: Node, positive: bool = False) -> bool:
        """Whether one expression is the other times a number that is not 0."""
        if self.quick:
            raise Undecided
        names, zero = symbols(g) | symbols(a), ZERO
        for reference in points(names)[:4]:
            g_there, a_there = _at(g, reference), _at(a, reference)
            try:
                if near(g_there, zero, {}) is not False or near(a_there, zero, {}) is not False:
                    continue
                crossed = ("mul", g, a_there), ("mul", a, g_there)
                if not self.agree(*crossed, names):
                    return False
                value = decimal(("div", g_there, a_there)) if positive else 1
                return value is not None and not hasattr(value, "_mpc_") and value > 0
            except TooBig:
                return False
        return False

    def order(self, end: Amount) -> Any:
        """A number to sort an end by."""
        if end.node in (INFINITY, MINUS_INFINITY):
            return float("inf") if end.node == INFINITY else float("-inf")
        if symbols(end.node):
            raise Unreadable("no number")
        try:
            value = exact(end.node)
        except NoValue:
            raise Unreadable("no number") from None
        if value is not None:
            return value
        if self.quick:
            raise Undecided
        found = decimal(end.node)
        if found is None or hasattr(found, "_mpc_"):
            raise Unreadable("no number")
        return Fraction(str(found)) if abs(found) < 1e30 else float(found)


def _fraction(value: Any, digits: int) -> Fraction:
    """An mpmath number to so many digits."""
    import mpmath

    return Fraction(mpmath.nstr(value, digits))


def _at(node: Node, point: Point) -> Node:
    """The expression with numbers for its variables."""
    return replaced(node, {name: ("num", value) for name, value in point.items()})

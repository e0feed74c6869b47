"""Whether an answer says the same as the gold answer.

Both are read (kinds.py), and readings of the same kind are compared part by part. What is left are values: exact ones by exact
arithmetic, others by evaluation at many points with more digits than their sizes could hide a difference in. Algebra sees
nothing but mathematical expressions, so that words, dates and labels are the same only when they are written the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from amft_fast.tasks.math.answer import CHOICE, MAX_ANSWER, NEXT_BOX, choice
from amft_fast.tasks.math.exact import NoValue, TooBig, exact
from amft_fast.tasks.math.kinds import (
    Amount,
    Bracket,
    Chain,
    Equation,
    Items,
    Matrix,
    Named,
    Piece,
    Ranges,
    Ratio,
    Residue,
    Sum,
    Under,
    Words,
    as_ranges,
)
from amft_fast.tasks.math.latex import Unreadable
from amft_fast.tasks.math.reading import Reading, read
from amft_fast.tasks.math.tree import ZERO, Node, as_fraction, own_symbol, replaced, symbols
from amft_fast.tasks.math.units import FAMILIES
from amft_fast.tasks.math.values import Undecided, Values


def same(answer: str, gold: str) -> bool:
    """Whether `answer` is as good as `gold`. Past the bounds of evaluate.py it is not."""
    return _same(answer, gold, _Judge(quick=False))


def plain_verdict(answer: str, gold: str) -> bool | None:
    """`same` as far as texts and exact arithmetic go; None where it takes more. Quick on whatever a policy may write."""
    try:
        return _same(answer, gold, _Judge(quick=True))
    except Undecided:
        return None


def _same(answer: str, gold: str, judge: _Judge) -> bool:
    if not answer.strip() or not gold.strip() or len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    if NEXT_BOX in answer:
        boxes = answer.split(NEXT_BOX)
        joined = ", ".join(dict.fromkeys(boxes))
        return judge.any_of(lambda: _same(joined, gold, judge), lambda: all(_same(box, gold, judge) for box in boxes))
    letter = _letter(gold)
    if letter is not None:
        return choice(answer) == letter
    try:
        g = read(gold, True)
        value_only = _without_label(answer)
        texts = [answer] if value_only is None or not _is_plain(g.values) else [answer, value_only]
        return judge.any_of(*(lambda text=text: _same_reading(text, g, judge) for text in texts))
    except (Unreadable, RecursionError):
        return False


def _letter(gold: str) -> str | None:
    match = CHOICE.fullmatch(re.sub(r"^\\text\s*\{\s*(.*?)\s*\}$", r"\1", gold.strip().strip("$ ")))
    return match[1] if match else None


_LABEL = re.compile(
    r"\s*(?:\\(?:text|textbf|mathbf|mathrm|textrm)\s*\{\s*\(([A-E])\)\s*\}|\(([A-E])\))(?:\\[ ,;]|~|\s|\\q?quad)+(?=\S)"
)


def _without_label(answer: str) -> str | None:
    """`(B) 73` without its letter."""
    match = _LABEL.match(answer)
    return answer[match.end() :] if match else None


def _is_plain(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Amount) and not symbols(v.node) for v in values)


def _same_reading(text: str, g: Reading, judge: _Judge) -> bool:
    try:
        a = read(text, False)
    except Unreadable:
        return False
    if a.key == g.key and a.key:
        return True
    return judge.any_of(*(lambda gv=gv, av=av: judge.value(gv, av) for gv in g.values for av in a.values))


class _Judge(Values):
    """Compares readings, of whatever kind; the gold's comes first."""

    # ------------------------------------------------------------------------------------------------------------ kinds

    def value(self, g: Any, a: Any) -> bool:
        if isinstance(g, Under) or isinstance(a, Under):
            return self.under(g, a)
        if isinstance(g, Named) or isinstance(a, Named) or isinstance(g, Equation) or isinstance(a, Equation):
            return self.named(g, a)
        if isinstance(a, Chain) and set(a.relations) <= {"=", "~"} and not isinstance(g, Chain):
            return self.chain_value(g, a)
        if isinstance(g, Chain) and set(g.relations) <= {"=", "~"} and not isinstance(a, Chain):
            return self.value(g.sides[-1], a)
        if isinstance(g, Ranges) or isinstance(a, Ranges):
            return self.ranges(g, a)
        if isinstance(g, Sum) or isinstance(a, Sum):
            return self.sums(g, a)
        if type(g) is not type(a):
            return False
        method = {
            Amount: self.amounts,
            Items: self.items,
            Bracket: self.brackets,
            Chain: self.chains,
            Matrix: self.matrices,
            Residue: self.residues,
        }.get(type(g))
        if method is not None:
            return method(g, a)
        if isinstance(g, Ratio):
            return len(g.parts) == len(a.parts) and self.all_same(g.parts, a.parts)
        return g == a  # Words, Numeral

    def under(self, g: Any, a: Any) -> bool:
        """Values with conditions: one may leave its conditions out, two must have the same, but for the name."""
        if not isinstance(g, Under):
            return self.value(g, a.value)
        if not isinstance(a, Under):
            return self.value(g.value, a)
        if sorted(g.conditions) == sorted(a.conditions):
            return self.value(g.value, a.value)
        if len(g.conditions) != 1 or len(a.conditions) != 1 or g.conditions[0][1] != a.conditions[0][1]:
            return False
        new, old = g.conditions[0][0], a.conditions[0][0]
        return self.value(g.value, _renamed(a.value, old, new))

    def all_same(self, golds: Sequence[Any], answers: Sequence[Any]) -> bool:
        return all(self.value(g, a) for g, a in zip(golds, answers, strict=True))

    def brackets(self, g: Bracket, a: Bracket) -> bool:
        if (g.open, g.close, len(g.items)) != (a.open, a.close, len(a.items)):
            return False
        return self.all_same(g.items, a.items)

    def items(self, g: Items, a: Items) -> bool:
        golds, answers = list(g.items), list(a.items)
        if any(v == Words(("...",)) for v in golds):
            return len(golds) == len(answers) and self.all_same(golds, answers)
        golds, answers = _share_name(golds), _share_name(answers)
        if g.braces or a.braces:
            golds, answers = self.distinct(golds), self.distinct(answers)
        if len(golds) != len(answers):
            return False
        names = {v.name for v in golds if isinstance(v, Named)}
        if len(names) > 1 and not all(isinstance(v, Named) for v in answers):
            return False
        return self.matched(golds, answers)

    def matched(self, golds: list[Any], answers: list[Any], same: Callable[[Any, Any], bool] | None = None) -> bool:
        """Whether the parts are the same in some order. Sameness is transitive enough to be greedy."""
        left, same = list(answers), same or self.value
        for gold in golds:
            found = next((i for i, a in enumerate(left) if same(gold, a)), None)
            if found is None:
                return False
            del left[found]
        return True

    def distinct(self, items: list[Any]) -> list[Any]:
        out: list[Any] = []
        for item in items:
            if not any(self.value(item, other) for other in out):
                out.append(item)
        return out

    def matrices(self, g: Matrix, a: Matrix) -> bool:
        if g.kind != a.kind or len(g.rows) != len(a.rows) or len(g.rows[0]) != len(a.rows[0]):
            return False
        pairs = ((_scaled(x, g.scale), _scaled(y, a.scale)) for r, s in zip(g.rows, a.rows) for x, y in zip(r, s))
        return all(self.value(x, y) for x, y in pairs)

    def residues(self, g: Residue, a: Residue) -> bool:
        if g.subject and a.subject and g.subject != a.subject:
            return False
        if not self.nodes(g.modulus, a.modulus):
            return False
        try:
            apart, modulus = exact(("add", g.value, ("neg", a.value))), exact(g.modulus)
        except (TooBig, NoValue):
            return False
        if apart is not None and modulus:
            return (apart / modulus).denominator == 1
        return self.nodes(g.value, a.value)

    # ------------------------------------------------------------------------------------------ equations and relations

    def named(self, g: Any, a: Any) -> bool:
        if isinstance(g, Named) and isinstance(a, Named):
            if g.name == a.name and self.value(g.value, a.value):
                return True
            return self.equations(_as_equation(g), _as_equation(a))
        if isinstance(g, Equation) or isinstance(a, Equation):
            return self.equations(_as_equation(g), _as_equation(a))
        if isinstance(g, Named):
            return self.value(g.value, a)
        if isinstance(g, Amount) and a.node is not None and own_symbol(a.node) in symbols(g.node):
            return False
        return self.value(g, a.value)

    def equations(self, g: Equation | None, a: Equation | None) -> bool:
        """Whether two equations in two variables or more say the same: the differences of their sides, or the numerators of
        these, are multiples of each other. In one variable a restated condition is no answer, unless the gold is one.
        """
        if g is None or a is None:
            return False
        if self.nodes(g.left, a.left) and self.nodes(g.right, a.right):
            return True
        gold, answer = (("add", e.left, ("neg", e.right)) for e in (g, a))
        names = symbols(gold)
        if names != symbols(answer) or not names:
            return False
        if len(names) == 1 and (g.left[0] == "sym" or a.left[0] == "sym"):
            return False
        return self.multiples(gold, answer) or self.multiples(as_fraction(gold)[0], as_fraction(answer)[0])

    def chain_value(self, g: Any, a: Chain) -> bool:
        """A chain of equal values is its last one, what stands behind ≈ its rounding; one with a false link is nothing."""
        sides = a.sides
        if not all(isinstance(s, Amount) and not (s.unit and s.loose) for s in sides):
            return False
        for one, two, relation in zip(sides, sides[1:], a.relations):
            bare = Amount(one.node, None, one.decimal), Amount(two.node, None, two.decimal)
            if not (self.amounts(*bare) or (relation == "~" and self.roughly(*bare))):
                return False
        last = a.relations.index("~") if "~" in a.relations else len(sides) - 1
        if last < len(sides) - 1 and isinstance(g, Amount) and g.decimal and g.node == sides[-1].node:
            return self.value(g, sides[-1])
        unit = next((s.unit for s in sides if s.unit), None)
        return self.value(g, replace(sides[last], unit=sides[last].unit or unit))

    def chains(self, g: Chain, a: Chain) -> bool:
        if g.relations == a.relations and len(g.sides) == len(a.sides) and self.all_same(g.sides, a.sides):
            return True
        if set(g.relations) <= {"="} and set(a.relations) <= {"="}:
            return all(isinstance(s, Amount) for s in g.sides) and self.chain_value(g.sides[-1], a)
        if len(g.sides) != 2 or g.relations != a.relations or g.relations[0] not in ("<", "<="):
            return False
        if not all(isinstance(s, Amount) for s in (*g.sides, *a.sides)):
            return False
        gold, answer = (("add", c.sides[0].node, ("neg", c.sides[1].node)) for c in (g, a))
        return symbols(gold) == symbols(answer) and self.multiples(gold, answer, positive=True)

    # ---------------------------------------------------------------------------------------------------------- intervals

    def ranges(self, g: Any, a: Any) -> bool:
        try:
            gold, answer = as_ranges(_set_of(g)), as_ranges(_set_of(a))
        except Unreadable:
            return False
        if gold.name and answer.name and gold.name != answer.name:
            return False
        one, two = self.merged(gold.pieces), self.merged(answer.pieces)
        return len(one) == len(two) and self.matched(one, two, self.pieces)

    def pieces(self, g: Piece, a: Piece) -> bool:
        if (g.low_closed, g.high_closed) != (a.low_closed, a.high_closed):
            return False
        return self.amounts(g.low, a.low) and self.amounts(g.high, a.high)

    def merged(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces in order, those that touch as one; as they are when an end is no number."""
        try:
            ordered = sorted(pieces, key=lambda p: (self.order(p.low), not p.low_closed))
            ends = [(self.order(p.low), self.order(p.high)) for p in ordered]
        except (Unreadable, TooBig):
            return list(pieces)
        out: list[Piece] = []
        high = None
        for piece, (low, end) in zip(ordered, ends):
            touches = high is not None and (low < high or (low == high and (piece.low_closed or out[-1].high_closed)))
            if touches:
                last = out[-1]
                if end > high or (end == high and piece.high_closed and not last.high_closed):
                    out[-1] = Piece(last.low, last.low_closed, piece.high, piece.high_closed)
                    high = end
            else:
                out.append(piece)
                high = end
        return out

    def sums(self, g: Any, a: Any) -> bool:
        """2 hours 30 minutes against the same, or against another writing of it in units of its family."""
        one, two = _in_smallest(g), _in_smallest(a)
        return one is not None and two is not None and one[0] == two[0] and self.nodes(one[1], two[1])


def _share_name(items: list[Any]) -> list[Any]:
    """x = 2, 3: the name of the first holds for those that follow."""
    if items and isinstance(items[0], Named) and not any(isinstance(v, Named | Equation) for v in items[1:]):
        return [items[0].value, *items[1:]]
    return items


def _as_equation(value: Any) -> Equation | None:
    if isinstance(value, Equation):
        return value
    if (
        isinstance(value, Named)
        and value.node is not None
        and isinstance(value.value, Amount)
        and value.value.unit is None
    ):
        return Equation(value.node, value.value.node)
    return None


def _set_of(value: Any) -> Any:
    """A set of numbers as points."""
    if isinstance(value, Items) and value.braces and value.items and all(isinstance(v, Amount) for v in value.items):
        return Ranges(tuple(Piece(v, True, v, True) for v in value.items))
    return value


def _renamed(value: Any, old: str, new: str) -> Any:
    """The value with another name for a variable; as it is where that name is taken."""
    if isinstance(value, Amount) and new not in symbols(value.node):
        return replace(value, node=replaced(value.node, {old: ("sym", new)}))
    if isinstance(value, Named):
        return replace(value, value=_renamed(value.value, old, new))
    if isinstance(value, Items):
        return replace(value, items=tuple(_renamed(v, old, new) for v in value.items))
    return value


def _scaled(cell: Any, scale: Node | None) -> Any:
    return Amount(("mul", scale, cell.node)) if scale is not None and isinstance(cell, Amount) else cell


def _in_smallest(value: Any) -> tuple[int, Node] | None:
    """(which family of units, the amount in its smallest one)"""
    parts = value.parts if isinstance(value, Sum) else (value,)
    total = ZERO
    family = None
    for part in parts:
        if not isinstance(part, Amount) or part.unit is None or len(part.unit.parts) != 1 or part.unit.parts[0][1] != 1:
            return None
        name = part.unit.parts[0][0]
        at = next((i for i, f in enumerate(FAMILIES) if name in f), None)
        if at is None or family not in (None, at):
            return None
        family = at
        total = ("add", total, ("mul", part.node, ("num", Fraction(FAMILIES[at][name]))))
    return (family, total) if family is not None else None

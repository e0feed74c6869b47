"""The value of an expression as a fraction, where it is one.

Before any power, factorial, binomial, sum or product is taken, the size of its result is bounded from the sizes of what goes
in; past the bound `TooBig` is raised. So `(10^9)!` and `10^{10^{10}}` cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from amft_fast.tasks.math.tree import Node

MAX_BITS = 100_000
"""Size of one exact intermediate."""
MAX_WORK = 1_500_000
"""Sum of the sizes of all exact intermediates of one expression, in bits."""
MAX_TERMS = 2000
"""Terms of a sum or product."""
MAX_STEPS = 20_000
"""Operations of one evaluation."""


class TooBig(ValueError):
    """Some intermediate would be larger, or the evaluation longer, than is worth while."""


class NoValue(ValueError):
    """Not defined, or not known here."""


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


class Arithmetic:
    """What numbers of any kind do alike."""

    def _neg(self, a):
        return -a

    def _add(self, a, b):
        return a + b

    def _mul(self, a, b):
        return a * b

    def _div(self, a, b):
        if b == 0:
            raise NoValue
        return a / b


class _Exact(Arithmetic):
    """Values as fractions; None where a value is not rational (or not seen to be)."""

    def __init__(self) -> None:
        self.work = self.steps = 0

    def charge(self, bits: float) -> None:
        self.steps += 1
        if bits > MAX_BITS or self.steps > MAX_STEPS:
            raise TooBig
        self.work += int(bits)
        if self.work > MAX_WORK:
            raise TooBig

    def value(self, node: Node, at: Mapping[str, Fraction]) -> Fraction | None:
        kind = node[0]
        if kind == "num":
            self.charge(_bits(node[1]))
            return node[1]
        if kind == "sym":
            return at.get(node[1])
        if kind in ("const", "call"):
            return None
        if kind in ("sum", "prod"):
            return self.series(node, at)
        parts = node[2] if kind == "fn" else node[1:]
        values = [self.value(part, at) for part in parts]
        if any(v is None for v in values):
            return None
        self.charge(sum(map(_bits, values)) if kind not in ("pow", "root", "fact", "fact2", "binom") else 0)
        return getattr(self, f"_{kind}")(*values) if kind != "fn" else self.function(node[1], values)

    def series(self, node: Node, at: Mapping[str, Fraction]) -> Fraction | None:
        kind, name, low, high, body = node
        low, high = self.value(low, at), self.value(high, at)
        if low is None or high is None:
            return None
        check_range(low, high)
        total = Fraction(kind == "prod")
        for k in range(int(low), int(high) + 1):
            term = self.value(body, {**at, name: Fraction(k)})
            if term is None:
                return None
            self.charge(_bits(total) + _bits(term))
            total = total + term if kind == "sum" else total * term
        return total

    def function(self, name: str, values: list[Fraction]) -> Fraction | None:
        if name in ("abs", "floor", "ceil") and len(values) == 1:
            return Fraction({"abs": abs, "floor": math.floor, "ceil": math.ceil}[name](values[0]))
        if name in ("max", "min", "gcd", "lcm") and len(values) < 2:
            return None  # "max 5" is no 5
        if name in ("max", "min"):
            return max(values) if name == "max" else min(values)
        if name in ("gcd", "lcm") and all(v.denominator == 1 for v in values):
            return Fraction(getattr(math, name)(*map(int, values)))
        return None

    def _pow(self, a, b):
        if b.denominator != 1:
            root = self._root(Fraction(b.denominator), a)
            return None if root is None else self._pow(root, Fraction(b.numerator))
        if a == 0 and b <= 0:
            raise NoValue
        if a in (0, 1, -1):
            return a if b.numerator % 2 else abs(a)
        self.charge(_bits(a) * abs(b) if abs(b) < MAX_BITS else math.inf)
        return a ** int(b)

    def _root(self, n, a):
        if n.denominator != 1 or not 0 < n <= 64:
            return None
        n = int(n)
        if a < 0:
            root = self._root(Fraction(n), -a) if n % 2 else None
            return None if root is None else -root
        self.charge(_bits(a))
        top, bottom = _integer_root(a.numerator, n), _integer_root(a.denominator, n)
        return None if top is None or bottom is None else Fraction(top, bottom)

    def _fact(self, a):
        n = _natural(a)
        self.charge(n * max(n.bit_length(), 1))
        return Fraction(math.factorial(n))

    def _fact2(self, a):
        n = _natural(a)
        self.charge(n * max(n.bit_length(), 1))
        return Fraction(math.prod(range(n, 0, -2)))

    def _binom(self, n, k):
        if n.denominator != 1 or k.denominator != 1 or n < 0:
            return None
        if not 0 <= k <= n:
            return Fraction(0)
        small = min(int(k), int(n - k))
        self.charge(small * int(n).bit_length())
        return Fraction(math.comb(int(n), small))


def _natural(a: Fraction) -> int:
    if a.denominator != 1 or a < 0:
        raise NoValue
    if a > MAX_BITS:
        raise TooBig
    return int(a)


def check_range(low: Fraction, high: Fraction) -> None:
    """Raises for the ends of a sum or product that are no integers, or too far apart."""
    if low.denominator != 1 or high.denominator != 1:
        raise NoValue
    if high - low >= MAX_TERMS:
        raise TooBig


def _integer_root(value: int, n: int) -> int | None:
    """The n-th root of a natural number, when it is one."""
    if value < 2 or n == 1:
        return value
    if n == 2:
        root = math.isqrt(value)
    else:
        root = 1 << -(-value.bit_length() // n)
        while (better := ((n - 1) * root + value // root ** (n - 1)) // n) < root:
            root = better
    return root if root**n == value else None


def exact(node: Node, at: Mapping[str, Fraction] | None = None) -> Fraction | None:
    """The value as a fraction; None where it is none, or is not seen to be. Raises TooBig, NoValue."""
    return _Exact().value(node, at or {})

"""The value of an expression to as many digits as it takes to tell it from another, never more than a budget allows.

As in exact.py, sizes are bounded before anything is computed: past a bound `TooBig` is raised.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b
from typing import Any

from amft_fast.tasks.math.exact import MAX_STEPS, Arithmetic, NoValue, TooBig, check_range, exact
from amft_fast.tasks.math.tree import Node, has_i, symbols

MAX_SPREAD = 1000
"""Powers of ten that the intermediates of an inexact evaluation may be apart, and still be told apart."""


class _Float(Arithmetic):
    """Values as mpmath numbers of the context `mp`. `spread`: the largest power of ten met, up or down."""

    def __init__(self, mp: Any) -> None:
        self.mp, self.spread, self.steps = mp, 0.0, 0
        self.complex = False
        """Whether some part was not real."""

    def value(self, node: Node, at: Mapping[str, Any]) -> Any:
        kind = node[0]
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooBig
        if kind == "num":
            return self.seen(self.mp.mpf(node[1].numerator) / node[1].denominator)
        if kind == "sym":
            if node[1] not in at:
                raise NoValue
            return at[node[1]]
        if kind == "const":
            return self.constant(node[1])
        if kind == "call":
            return self.call(node[1], [self.value(arg, at) for arg in node[2]])
        if kind in ("sum", "prod"):
            low, high = exact(node[2], _rational(at)), exact(node[3], _rational(at))
            if low is None or high is None:
                raise NoValue
            check_range(low, high)
            terms = [self.value(node[4], {**at, node[1]: self.mp.mpf(k)}) for k in range(int(low), int(high) + 1)]
            return self.seen(self.mp.fsum(terms) if kind == "sum" else self.mp.fprod(terms))
        values = [self.value(part, at) for part in (node[2] if kind == "fn" else node[1:])]
        return self.seen(self.function(node[1], values) if kind == "fn" else getattr(self, f"_{kind}")(*values))

    def seen(self, value: Any) -> Any:
        mp = self.mp
        if isinstance(value, mp.mpc):
            if value.imag == 0:
                value = value.real
            else:
                self.complex = True
        size = mp.mag(value)
        if size in (mp.inf, -mp.inf) or size != size:
            if value == 0:
                return value
            raise NoValue
        self.spread = max(self.spread, abs(int(size)) * 0.30103)
        if abs(int(size)) > 1 << 24:
            raise TooBig
        return value

    def constant(self, name: str) -> Any:
        if name == "inf":
            raise NoValue
        if name == "i":
            self.complex = True
            return self.mp.mpc(0, 1)
        return {"pi": self.mp.pi, "e": self.mp.e}[name] * 1

    def call(self, name: str, values: list[Any]) -> Any:
        """An unknown function: one and the same number for the same argument."""
        words = [name, *(self.mp.nstr(v, 25) for v in values)]
        return self.mp.mpf(int(blake2b("|".join(words).encode(), digest_size=6).hexdigest(), 16)) / 2**40 + 1

    def _pow(self, a, b):
        mp = self.mp
        if a == 0:
            if mp.re(b) <= 0:
                raise NoValue
            return mp.mpf(0)
        if abs(mp.mag(a)) * max(1, abs(b)) > 1 << 26 or abs(b) > 1 << 26:
            raise TooBig
        if a < 0 if not isinstance(a, mp.mpc) else False:
            third = self.odd_root(b)
            if third is not None:
                top, bottom = third
                return (-1 if top % 2 else 1) * mp.power(-a, mp.mpf(top) / bottom)
        return mp.power(a, b)

    def odd_root(self, b: Any) -> tuple[int, int] | None:
        """b as a fraction with a small odd denominator: such a power of a negative number is real, as at school."""
        mp = self.mp
        if isinstance(b, mp.mpc) or mp.isint(b):
            return None
        for bottom in (3, 5, 7, 9):
            top = mp.nint(b * bottom)
            if abs(b * bottom - top) < mp.mpf(10) ** (-mp.dps + 8):
                return int(top), bottom
        return None

    def _root(self, n, a):
        mp = self.mp
        if not mp.isint(n) or not 0 < n <= 64:
            return self._pow(a, 1 / n)
        if not isinstance(a, mp.mpc) and a < 0 and int(n) % 2:
            return -mp.root(-a, int(n))
        return mp.root(a, int(n))

    def _fact(self, a):
        if isinstance(a, self.mp.mpc) or not 0 <= a < 10**6:
            raise TooBig if not isinstance(a, self.mp.mpc) and a > 0 else NoValue
        return self.mp.factorial(a)

    def _fact2(self, a):
        if isinstance(a, self.mp.mpc) or not 0 <= a < 10**6:
            raise NoValue
        return self.mp.fac2(a)

    def _binom(self, n, k):
        if any(isinstance(v, self.mp.mpc) or abs(v) > 10**6 for v in (n, k)):
            raise TooBig
        return self.mp.binomial(n, k)

    def function(self, name: str, values: list[Any]) -> Any:
        mp = self.mp
        if name in ("max", "min", "gcd", "lcm"):
            if len(values) < 2 or any(isinstance(v, mp.mpc) for v in values):
                raise NoValue
            if name in ("gcd", "lcm"):
                if not all(mp.isint(v) and abs(v) < 10**30 for v in values):
                    raise NoValue
                return mp.mpf(getattr(math, name)(*map(int, values)))
            return max(values) if name == "max" else min(values)
        if name == "log":
            if len(values) == 2:
                return self.log(values[0]) / self.log(values[1])
            # Its base is 10 to some and e to others: a number that is neither keeps what holds in every base.
            return self.log(values[0]) / (mp.mpf(27) / 10 + mp.sqrt(2) / 1000)
        if len(values) != 1:
            raise NoValue
        (x,) = values
        if name == "ln":
            return self.log(x)
        if name == "lg":
            return self.log(x) / mp.log(10)
        if name in ("floor", "ceil"):
            if isinstance(x, mp.mpc):
                raise NoValue
            near = mp.nint(x)
            if abs(x - near) < mp.mpf(10) ** (-mp.dps + 10) * max(1, abs(x)):
                return near
            return getattr(mp, name)(x)
        if name == "abs":
            return abs(x)
        if mp.mag(x) > 4000 or (name in ("exp", "sinh", "cosh") and mp.mag(x) > 26):
            raise TooBig
        names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot"}
        return getattr(mp, names.get(name, name))(x)

    def log(self, x: Any) -> Any:
        if x == 0:
            raise NoValue
        return self.mp.log(x)


def _rational(at: Mapping[str, Any]) -> dict[str, Fraction]:
    return {k: Fraction(int(v)) for k, v in at.items() if v == int(v)}


Point = Mapping[str, Fraction]


def points(names: frozenset[str], whole: frozenset[str] = frozenset()) -> list[Point]:
    """Places to evaluate at, the same for the same names: small and large, of all signs and of mixed ones, between the
    integers, on them and halfway. `whole`: the names that take positive integers only.
    """
    ordered = sorted(names)
    out = []
    for j, (scale, signs) in enumerate(_PLACES):
        at = {}
        for i, name in enumerate(ordered):
            seed = int(blake2b(f"{name}|{j}".encode(), digest_size=6).hexdigest(), 16)
            if name in whole:
                at[name] = Fraction(2 + seed % (4 + 2 * j))
                continue
            value = Fraction(scale) * Fraction(11 + seed % 9973, 10007)
            if signs in ("whole", "half"):
                value = Fraction(1 + seed % 9) + (Fraction(1, 2) if signs == "half" else 0)
            negative = {"-": True, "+-": i % 2 == 1, "-+": i % 2 == 0, "++--": i // 2 % 2 == 1}.get(
                signs, seed >> 20 & 1
            )
            at[name] = -value if negative and signs != "+" else value
        out.append(at)
    return out


_PLACES = (
    (1, "+"), (3, "+"), (12, "+"), (1, "-"), (3, "-"), (12, "-"), (40, "+"), (3, "+-"), (1, "-+"), (12, "++--"), (12, "any"),
    (1, "whole"), (1, "half"),
)  # fmt: skip


def near(a: Node, b: Node, at: Point) -> bool | None:
    """Whether two expressions have the same value at a point; None where it does not tell: neither has a (real) value there.

    Evaluated twice, the second time with twice the digits: what is equal comes nearer by as many, what is not stays apart. The
    first has as many digits more than 60 as the intermediates are powers of ten apart. Raises TooBig.
    """
    one = _both(a, b, at, 60)
    if one is None:
        return None
    x, y, spread, real = one
    if x is None or y is None:
        return False
    if (symbols(a) or symbols(b)) and not (has_i(a) or has_i(b)):
        if real[0] != real[1]:
            return False
        if not real[0]:
            return None
    digits = 60 + int(min(spread, MAX_SPREAD))
    if digits > 80:
        x, y, _, _ = _both(a, b, at, digits)
    first = abs(x - y)
    x, y, _, _ = _both(a, b, at, 2 * digits)
    mp = _context(2 * digits)
    apart, scale = abs(x - y), max(abs(x), abs(y))
    if apart <= scale * mp.mpf(10) ** (30 - 2 * digits):
        return True
    return bool(spread <= MAX_SPREAD and apart < first * mp.mpf(10) ** (-digits // 2))


_LOCAL = threading.local()


def _context(digits: int) -> Any:
    """This thread's mpmath context, set to so many digits."""
    if not hasattr(_LOCAL, "mp"):
        import mpmath

        _LOCAL.mp = mpmath.mp.clone()
    _LOCAL.mp.dps = digits
    return _LOCAL.mp


def _both(a: Node, b: Node, at: Point, digits: int) -> tuple[Any, Any, float, tuple[bool, bool]] | None:
    """The values of both (None: it has none), the spread, and whether each was real all the way; None when neither has any."""
    mp = _context(digits)
    place = {name: mp.mpf(v.numerator) / v.denominator for name, v in at.items()}
    values, real, spread = [], [], 0.0
    for node in (a, b):
        run = _Float(mp)
        try:
            values.append(run.value(node, place))
        except (NoValue, ZeroDivisionError):
            values.append(None)
        real.append(not run.complex)
        spread = max(spread, run.spread)
    if values[0] is None and values[1] is None:
        return None
    return values[0], values[1], spread, (real[0], real[1])


def decimal(node: Node, digits: int = 40) -> Any:
    """The value of an expression without variables as an mpmath number; None where it has none. Raises TooBig."""
    try:
        return _Float(_context(digits)).value(node, {})
    except (NoValue, ZeroDivisionError):
        return None

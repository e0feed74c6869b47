"""Arithmetic on small hands of numbers, exactly: parse a formula, list what a hand can make, find every formula.

Text of a model is never executed. A formula goes through a recursive-descent parser over `fractions.Fraction`, with
limits on its length, its depth and the size of its numbers:

    sum     = product {("+" | "-") product}
    product = factor {("*" | "/") factor}
    factor  = digits | "(" sum ")"
    formula = sum ["=" ["-"] digits]

There is no unary minus: a hand's numbers are not negative, and no formula needs one.

The solver writes formulas in a canonical form, so that each is listed once up to order and brackets: sums and products
are flat (a-(b-c) is a-b+c; a/(b*c) is a/b/c), every part is non-negative ((1-5)*(1-7) is (5-1)*(7-1)), nothing is
divided by a part worth 1 (it is multiplied) and no part worth 0 is taken away (it is added). Whatever can be made from
non-negative numbers can be made so, up to sign: turn each negative sum round and pass its sign upwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

MAX_CHARS = 256
MAX_DEPTH = 32
MAX_DIGITS = 6
MAX_NUMBERS = 6  # of a hand, for `solve`: 6 numbers take seconds, 7 would take minutes

Numbers = tuple[int, ...]
Chain = tuple[tuple[int, str], ...]  # parts of a flat sum (sign, text) or of a flat product (exponent, text)

_SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)|([-+*/()=]))")


class FormulaError(ValueError):
    """The text is not a formula, or it divides by zero, or it passes a limit."""


@dataclass(frozen=True)
class Parsed:
    """A legal formula, evaluated.

    Its value is `head + last`, where `last` is the last term of the top-level sum with its sign: the part that a
    further "*" or "/" would change. `numbers` are the numbers used, in order of appearance. `claim` is what stands
    after "=", or None.
    """

    head: Fraction
    last: Fraction
    numbers: Numbers
    claim: int | None

    @property
    def value(self) -> Fraction:
        return self.head + self.last


def tokenize(text: str) -> list[str]:
    """Split a formula into numbers, operators and brackets.

    Raises FormulaError on any other character, on a number with a leading zero or more than MAX_DIGITS digits, and on a
    text longer than MAX_CHARS.
    """
    if len(text) > MAX_CHARS:
        raise FormulaError(f"longer than {MAX_CHARS} characters")
    text = text.translate(_SPELLINGS).rstrip(" \t\r\n")
    tokens, at, after_number = [], 0, False
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FormulaError(f"unexpected character at {at}")
        number, sign = match.groups()
        if number and (len(number) > MAX_DIGITS or (after_number and match.start(1) == at)):
            raise FormulaError(f"bad number at {at}")
        tokens.append(number or sign)
        at, after_number = match.end(), bool(number)
    return tokens


def parse(text: str) -> Parsed:
    """Parse and evaluate a formula, with or without a closing "= number". Raises FormulaError and nothing else."""
    parser = _Parser(tokenize(text))
    head, last = parser.sum(depth=0)
    claim = parser.claim()
    return Parsed(head, last, tuple(parser.numbers), claim)


class _Parser:
    def __init__(self, tokens: list[str]):
        self.tokens = [*tokens, ""]
        self.at = 0
        self.numbers: list[int] = []

    def take(self, wanted: str) -> str:
        """The next token if it is one of the characters in `wanted`, else the empty string."""
        token = self.tokens[self.at]
        if len(token) != 1 or token not in wanted:
            return ""
        self.at += 1
        return token

    def sum(self, depth: int) -> tuple[Fraction, Fraction]:
        head, last = Fraction(0), self.product(depth)
        while sign := self.take("+-"):
            head += last
            last = self.product(depth) if sign == "+" else -self.product(depth)
        return head, last

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self.take("*/"):
            factor = self.factor(depth)
            if sign == "/" and factor == 0:
                raise FormulaError("division by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise FormulaError(f"deeper than {MAX_DEPTH} brackets")
        if self.take("("):
            head, last = self.sum(depth + 1)
            if not self.take(")"):
                raise FormulaError("missing )")
            return head + last
        number = self.digits()
        self.numbers.append(number)
        return Fraction(number)

    def claim(self) -> int | None:
        claim = None
        if self.take("="):
            claim = -self.digits() if self.take("-") else self.digits()
        if self.tokens[self.at]:
            raise FormulaError(f"unexpected {self.tokens[self.at]!r}")
        return claim

    def digits(self) -> int:
        token = self.tokens[self.at]
        if not token.isdigit():
            raise FormulaError(f"a number was expected, not {token!r}")
        self.at += 1
        return int(token)


# ----------------------------------------------------------------------------------------- what a hand of numbers makes


@lru_cache(maxsize=4096)
def splits(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """Every way to part a hand in two that are not empty, the first part holding the hand's first number."""
    found = {}
    first, rest = numbers[0], range(1, len(numbers))
    for size in range(len(numbers) - 1):
        for chosen in combinations(rest, size):
            part = (first, *(numbers[i] for i in chosen))
            found[part, tuple(numbers[i] for i in rest if i not in chosen)] = None
    return tuple(found)


@lru_cache(maxsize=1024)
def values(numbers: Numbers) -> frozenset[Fraction]:
    """Every value that a formula with each of `numbers` once can have. Meant for up to 3 numbers (about 100 values)."""
    if len(numbers) == 1:
        return frozenset({Fraction(numbers[0])})
    found = set()
    for part, other in splits(numbers):
        for a in values(part):
            for b in values(other):
                found.update((a + b, a - b, b - a, a * b))
                if b:
                    found.add(a / b)
                if a:
                    found.add(b / a)
    return frozenset(found)


@lru_cache(maxsize=1 << 16)
def reachable(numbers: Numbers, value: Fraction) -> bool:
    """Whether some formula with each of `numbers` once has this value. Milliseconds for 4 numbers, less when cached."""
    if len(numbers) <= 3:
        return value in values(numbers)
    return any(_reachable_from(*sorted(parts, key=len), value) for parts in splits(numbers))


def _reachable_from(small: Numbers, large: Numbers, value: Fraction) -> bool:
    for a in values(small):
        wanted = {value - a, a - value, value + a}
        if a:
            wanted |= {value / a, value * a}
            if value:
                wanted.add(a / value)
        elif not value:
            return True  # 0 times anything
        if any(reachable(large, b) for b in wanted):
            return True
    return False


def extendable(parsed: Parsed, rest: Numbers, target: int) -> bool:
    """Whether tokens put behind the formula can use up `rest` (sorted, not empty) and reach `target`.

    What is put behind multiplies the last term by some m, made of a part of `rest`, and adds some s, made of the
    others: head + last·m + s = target.
    """
    if _closes(parsed, rest, (), target) or _closes(parsed, (), rest, target):
        return True
    return any(
        _closes(parsed, part, other, target) or _closes(parsed, other, part, target) for part, other in splits(rest)
    )


def _closes(parsed: Parsed, factors: Numbers, terms: Numbers, target: int) -> bool:
    gap = target - parsed.head
    if not terms:
        return _multiplies_to(factors, parsed.last, gap)
    if not factors:
        return _adds(terms, gap - parsed.last)
    if len(factors) <= len(terms):
        return any(_adds(terms, gap - parsed.last * m) for m in _multipliers(factors))
    return any(_multiplies_to(factors, parsed.last, gap - s) for v in values(terms) for s in (v, -v))


def _adds(terms: Numbers, value: Fraction) -> bool:
    return reachable(terms, value) or reachable(terms, -value)


def _multipliers(factors: Numbers) -> Iterator[Fraction]:
    for value in values(factors):
        yield value
        if value:
            yield 1 / value


def _multiplies_to(factors: Numbers, start: Fraction, value: Fraction) -> bool:
    return _multiplies(factors, value / start) if start else not value


def _multiplies(factors: Numbers, value: Fraction) -> bool:
    return reachable(factors, value) or (value != 0 and reachable(factors, 1 / value))


# ----------------------------------------------------------------------------------------------------------- the solver


def solve(numbers: list[int], target: int = 24) -> list[str]:
    """Every formula, in canonical form, that makes `target` from each of `numbers` once: e.g. ["(10-4)*7"].

    Deterministic, independent of the order of `numbers`, sorted by length and then by text. Below a millisecond to a
    few for 3 or 4 numbers (cached), up to seconds for 6. Raises ValueError on a hand that does not hold 1 to 6
    non-negative integers and on a target that is not a non-negative integer.
    """
    if not 1 <= len(numbers) <= MAX_NUMBERS or not all(_is_natural(n) for n in numbers):
        raise ValueError(f"numbers must be 1 to {MAX_NUMBERS} non-negative integers, got {numbers!r}")
    if not _is_natural(target):
        raise ValueError(f"target must be a non-negative integer, got {target!r}")
    return list(_solve(tuple(sorted(numbers)), target))


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@lru_cache(maxsize=1 << 14)
def _solve(numbers: Numbers, target: int) -> tuple[str, ...]:
    value = Fraction(target)
    if not reachable(numbers, value):
        return ()
    return tuple(sorted({*_terms(numbers, value), *_sums(numbers, value)}, key=lambda text: (len(text), text)))


def _terms(numbers: Numbers, value: Fraction) -> tuple[str, ...]:
    """Formulas of this value (>= 0) that are no sum: a number, or a product."""
    if len(numbers) == 1:
        return (str(numbers[0]),) if numbers[0] == value else ()
    return _products(numbers, value)


def _factors(numbers: Numbers, value: Fraction) -> tuple[str, ...]:
    """Formulas of this value (>= 0) that are no product: a number, or a sum in brackets."""
    if len(numbers) == 1:
        return _terms(numbers, value)
    return tuple(f"({text})" for text in _sums(numbers, value))


@lru_cache(maxsize=1 << 14)
def _sums(numbers: Numbers, value: Fraction) -> tuple[str, ...]:
    # A sum worth 0 can be turned round and stay canonical: keep the one whose first number's term is added.
    chains = (chain for chain in _sum_chains(numbers, value) if value or chain[0][0] > 0)
    return tuple(dict.fromkeys(_write(chain, "+", "-") for chain in chains))


@lru_cache(maxsize=1 << 14)
def _products(numbers: Numbers, value: Fraction) -> tuple[str, ...]:
    chains = (chain for chain in _product_chains(numbers, value) if any(exponent > 0 for exponent, _ in chain))
    return tuple(dict.fromkeys(_write(chain, "*", "/") for chain in chains))


def _write(chain: Chain, plus: str, minus: str) -> str:
    ordered = sorted(chain, key=lambda part: (-part[0], -len(part[1]), part[1]))
    return "".join((plus if sign > 0 else minus) + text for sign, text in ordered)[1:]


@lru_cache(maxsize=1 << 14)
def _sum_chains(numbers: Numbers, value: Fraction) -> list[Chain]:
    """Two or more signed terms, each >= 0 and no sum itself, that add up to `value` (of any sign)."""
    chains: list[Chain] = []
    for part, other in splits(numbers):
        if len(part) <= len(other):
            gains = {gain for v in values(part) for gain in (v, -v)}
        else:
            gains = {value - rest for v in values(other) for rest in (v, -v)}
        for gain in sorted(gains):
            if not (_adds(part, gain) and _adds(other, value - gain)):
                continue
            tails = _one_term(other, value - gain) + _longer(_sum_chains, other, value - gain)
            chains += [(*head, *tail) for head in (_one_term(part, gain) if tails else []) for tail in tails]
    return chains


@lru_cache(maxsize=1 << 14)
def _product_chains(numbers: Numbers, value: Fraction) -> list[Chain]:
    """Two or more factors, each >= 0 and no product itself, with exponents 1 or -1, that multiply to `value` (>= 0)."""
    chains: list[Chain] = []
    for part, other in splits(numbers):
        for gain, rest in _product_gains(part, other, value):
            if not (_multiplies(part, gain) and _multiplies(other, rest)):
                continue
            tails = _one_factor(other, rest) + _longer(_product_chains, other, rest)
            chains += [(*head, *tail) for head in (_one_factor(part, gain) if tails else []) for tail in tails]
    return chains


def _longer(chains: Callable[[Numbers, Fraction], list[Chain]], numbers: Numbers, value: Fraction) -> list[Chain]:
    return chains(numbers, value) if len(numbers) > 1 else []


def _one_term(numbers: Numbers, value: Fraction) -> list[Chain]:
    return [((1 if value >= 0 else -1, text),) for text in _terms(numbers, abs(value))]


def _one_factor(numbers: Numbers, value: Fraction) -> list[Chain]:
    chains: list[Chain] = [((1, text),) for text in _factors(numbers, value)]
    if value and value != 1:
        chains += [((-1, text),) for text in _factors(numbers, 1 / value)]
    return chains


def _product_gains(part: Numbers, other: Numbers, value: Fraction) -> list[tuple[Fraction, Fraction]]:
    """Pairs (gain, rest) >= 0 with gain * rest = value: what `part` may contribute, and what is left to `other`."""
    zero = Fraction(0)
    if not value:
        pairs = {(zero, abs(rest)) for rest in _multipliers(other)}
        return sorted(pairs | {(abs(gain), zero) for gain in _multipliers(part)})
    if len(part) <= len(other):
        return sorted({(abs(gain), value / abs(gain)) for gain in _multipliers(part) if gain})
    return sorted({(value / abs(rest), abs(rest)) for rest in _multipliers(other) if rest})

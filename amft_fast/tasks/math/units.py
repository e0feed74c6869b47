"""Units, magnitudes and the plain nouns that may stand behind a value.

`parse` reads the words behind a value into a `Unit` in one way of writing (`square centimetres`, `cm^2` and `cm*cm` are the
same). What is forgiven is what is known: a unit of the tables, or a noun in the plural in whose phrase nothing is a number, a
magnitude, a connective or an operator. "5 or more", "5 squared" and "5 million" are not 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from amft_fast.tasks.math.signs import names

_NAMES = {
    "percent": "% percent percentage pct percents",
    "degree": "degree degrees deg degs",
    "degree C": "celsius centigrade",
    "degree F": "fahrenheit",
    "kelvin": "kelvin kelvins",
    "dollar": "$ dollar dollars usd buck bucks",
    "cent": "cent cents ¢",
    "pound sterling": "£ gbp pence",
    "euro": "€ euro euros eur",
    "yuan": "¥ yuan yen rmb cny jpy 元",
    "rupee": "₹ rupee rupees rs inr",
    "peso": "peso pesos",
    "inch": "inch inches in",
    "foot": "foot feet ft",
    "yard": "yard yards yd yds",
    "mile": "mile miles mi",
    "second": "second seconds sec secs",
    "minute": "minute minutes min mins",
    "hour": "hour hours hr hrs",
    "day": "day days",
    "week": "week weeks wk wks",
    "month": "month months",
    "year": "year years yr yrs",
    "pound": "pound pounds lb lbs",
    "ounce": "ounce ounces oz",
    "ton": "ton tons tonne tonnes",
    "gallon": "gallon gallons gal",
    "quart": "quart quarts qt",
    "pint": "pint pints pt",
    "cup": "cup cups",
    "tablespoon": "tablespoon tablespoons tbsp",
    "teaspoon": "teaspoon teaspoons tsp",
    "acre": "acre acres",
    "hectare": "hectare hectares ha",
    "knot": "knot knots",
    "radian": "radian radians rad rads",
    "steradian": "steradian steradians sr",
    "unit": "unit units",
    "bit": "bit bits",
    "byte": "byte bytes",
    "atmosphere": "atm atmosphere atmospheres",
    "bar": "bar bars",
    "person": "person people persons",
    "child": "child children kid kids",
    "man": "man men",
    "woman": "woman women",
    "fish": "fish",
    "sheep": "sheep",
    "point": "point points pts",
    "time": "times",
    "way": "way ways",
    "lightyear": "light-year light-years ly",
    "solar mass": "M_sun",
    "angstrom": "Å angstrom angstroms",
}
_SCALED = {  # with the prefixes of the SI: (letters, words)
    "meter": ("m", "meter metre"),
    "gram": ("g", "gram gramme"),
    "second": ("s", ""),
    "liter": ("L l", "liter litre"),
    "joule": ("J", "joule"),
    "watt": ("W", "watt"),
    "volt": ("V", "volt"),
    "ampere": ("A", "ampere amp"),
    "newton": ("N", "newton"),
    "pascal": ("Pa", "pascal"),
    "hertz": ("Hz", "hertz"),
    "electronvolt": ("eV", "electronvolt"),
    "mole": ("mol", "mole"),
    "ohm": ("Ω", "ohm"),
    "farad": ("F", "farad"),
    "coulomb": ("C", "coulomb"),
    "tesla": ("T", "tesla"),
    "calorie": ("cal", "calorie"),
    "byte": ("B", "byte"),
    "hour": ("h", ""),
    "parsec": ("pc", "parsec"),
    "kelvin": ("K", ""),
}
_PREFIXES = {
    "k": "kilo", "c": "centi", "m": "milli", "d": "deci", "μ": "micro", "n": "nano", "M": "mega", "G": "giga", "T": "tera",
    "p": "pico", "h": "hecto",
}  # fmt: skip


def _table() -> tuple[dict[str, str], dict[str, str]]:
    """(by name without case, by symbol with case)"""
    names = {word: unit for unit, words in _NAMES.items() for word in words.split()}
    letters: dict[str, str] = {}
    for unit, (short, long) in _SCALED.items():
        for word in long.split():
            for prefix in ("", *_PREFIXES.values()):
                for plural in (word, word + "s", word + "es"):
                    names.setdefault(prefix + plural, prefix + unit)
        for letter in short.split():
            letters[letter] = unit
            if unit != "hour" and unit != "kelvin":
                for sign, prefix in _PREFIXES.items():
                    letters.setdefault(sign + letter, prefix + unit)
    letters |= {
        "kph": "kilometer/hour",
        "kmph": "kilometer/hour",
        "kmh": "kilometer/hour",
        "mph": "mile/hour",
        "rpm": "rpm",
    }
    letters |= {
        "cc": "centimeter^3",
        "bps": "bit/second",
        "um": "micrometer",
        "us": "microsecond",
        "fps": "foot/second",
    }
    letters |= {
        "mps": "meter/second",
        "gm": "gram",
        "gms": "gram",
        "kgs": "kilogram",
        "erg": "erg",
        "dyn": "dyne",
        "mmHg": "mmHg",
    }
    return names, letters


_BY_NAME, _BY_LETTER = _table()
_GLUED = set(names("cm mm km kg ft lb lbs oz mph kph kmh hr hrs mi min mins sec secs yd"))
LONE_LETTERS = set("mgshLlNJWVKTACF")
"""Units of one letter, which behind a plain number and a space may be meant where they are not set as text."""

MAGNITUDES = {
    **{
        name: Fraction(10) ** n
        for name, n in zip(names("ten hundred thousand million billion trillion"), (1, 2, 3, 6, 9, 12))
    },
    "quadrillion": Fraction(10**15),
    "lakh": Fraction(10**5),
    "crore": Fraction(10**7),
    "dozen": Fraction(12),
    "score": Fraction(20),
    "gross": Fraction(144),
}
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
}  # fmt: skip
FRACTIONS = {**{name + "s": Fraction(1, n) for name, n in _PARTS.items()}, "halves": Fraction(1, 2)}

_NUMBER_WORDS = set(
    names(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety first second"
    )
)
_NO_NOUNS = (
    _NUMBER_WORDS
    | set(MAGNITUDES)
    | {m + "s" for m in MAGNITUDES}
    | set(FRACTIONS)
    | set(_PARTS)
    | set(
        names(  # connectives, verbs, comparisons, operations
            "googol myriad lac zeroes "
            "and or nor but not no never none neither either if when unless then than else so because since while "
            "where which that this these those is are was were be been being isn aren wasn has have had does do did "
            "as at by for from in into of off on onto out over per to under up upon versus vs via with without within "
            "between among above below about around approximately approx roughly nearly almost exactly only just more "
            "less fewer most least many much few several some all any each every both another other others extra "
            "additional remaining maybe perhaps possibly probably wrong right incorrect correct false true invalid "
            "unknown yes plus minus times divided multiplied added subtracted squared cubed square cube factorial "
            "root roots doubled tripled halved double triple half halves twice thrice quarter inverse reciprocal "
            "negative positive mod modulo modulus base bases power powers exponent choose permute prime primes log "
            "logs sin cos tan exp sum difference differences product products quotient quotients ratio ratios percent "
            "percentile percentiles permille ppm infinity infinite pi dozens tens ones hundreds thousands millions "
            "billions trillions gross grosses score scores pairs digits bis it its he she they we his her us yours "
            "ours theirs hers always sometimes besides minuses pluses equals exceeds becomes gives leaves makes means "
            "includes excludes needs whereas thus hence goes series sines cosines radix decimals binary octal hex "
            "multiples factors fractions mixed complex imaginary conjugate degrees answers answer guess guesses "
            "errors mistakes error mistake options option cases case steps step lots couples couple k bn mn mil mm "
            "decades centuries millennia triples trios quartets quintets negatives opposites reciprocals factorials "
            "logarithms inverses complements zeros grands "
        )
    )
)


@dataclass(frozen=True)
class Unit:
    """`parts`: names with their powers, in order of the names. `noun`: a plain noun, no unit of the tables."""

    parts: tuple[tuple[str, int], ...]
    noun: bool = False


PERCENT, DEGREE = Unit((("percent", 1),)), Unit((("degree", 1),))
TIMES = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
LENGTHS = {"inch": 1, "foot": 12, "yard": 36, "mile": 63360}
WEIGHTS = {"ounce": 1, "pound": 16, "ton": 32000}
MONEY = {"cent": 1, "dollar": 100}
FAMILIES = (TIMES, LENGTHS, WEIGHTS, MONEY)
"""Units that stand together in one amount: 2 hours 30 minutes."""


def is_unit_word(word: str, glued: bool = False) -> bool:
    """Whether letters in a row, behind a number, are a unit rather than a product; `glued`: no space before them."""
    return word in _GLUED if glued else _known(word) is not None


def _known(word: str) -> str | None:
    return _BY_LETTER.get(word) or (_BY_NAME.get(word.lower()) if len(word) > 1 or not word.isalpha() else None)


_REWRITTEN = [
    (re.compile(r"\bper\b|(?<=\w)\s+(?:a|an)\s+(?=\w)"), "/"),
    (re.compile(r"\b(?:degrees?|deg)\.?\s*(?:C\b|celsius)", re.IGNORECASE), "celsius"),
    (re.compile(r"\b(?:degrees?|deg)\.?\s*(?:F\b|fahrenheit)", re.IGNORECASE), "fahrenheit"),
    (re.compile(r"\b(?:square|sq)\b\.?\s+([^\W\d_]+)", re.IGNORECASE), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.?\s+([^\W\d_]+)", re.IGNORECASE), r"\1^3"),
    (re.compile(r"([^\W\d_]+)\s+squared\b", re.IGNORECASE), r"\1^2"),
    (re.compile(r"([^\W\d_]+)\s+cubed\b", re.IGNORECASE), r"\1^3"),
    (re.compile(r"(?<=\w)\s+(?:old|long|tall|away|each|high|wide|deep|total|apiece)$", re.IGNORECASE), ""),
]
_PIECE = re.compile(
    r"\s*(?:(?P<word>[^\W\d_]+(?:[-'][^\W\d_]+)*\.?|[%$£€¥₹¢])(?:\s*\^\s*(?:\{\s*)?(?P<power>-?\d+)(?:\s*\})?)?"
    r"|(?P<sign>[()/*{}]))"
)


@lru_cache(4096)
def parse(text: str) -> Unit | None:
    """The unit that a text names, or None. Raises nothing."""
    text = text.strip().rstrip(".").replace("·", "*")
    if not text or len(text) > 80:
        return None
    return _units(text) or _noun(text)


def _units(text: str) -> Unit | None:
    """A product of known units with powers; a slash divides by the one that follows, or by what is in its brackets."""
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    powers: dict[str, int] = {}
    at, sign, signs = 0, 1, [1]
    while at < len(text):
        match = _PIECE.match(text, at)
        if match is None:
            return None
        at = match.end()
        if match["word"]:
            known = _known(match["word"].rstrip("."))
            if known is None:
                return None
            _add(powers, known, int(match["power"] or 1) * sign * signs[-1])
            sign = 1
        elif match["sign"] in "({":
            signs.append(signs[-1] * sign)
            sign = 1
        elif match["sign"] in ")}":
            signs.pop()
            if not signs:
                return None
        elif match["sign"] == "/":
            sign = -1
    parts = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(parts) if parts and len(signs) == 1 and sign == 1 else None


def _add(powers: dict[str, int], known: str, power: int) -> None:
    """Adds a unit, which may itself be composed: `mile/hour`, `centimeter^3`."""
    top, _, bottom = known.partition("/")
    name, _, own = top.partition("^")
    powers[name] = powers.get(name, 0) + power * int(own or 1)
    if bottom:
        powers[bottom] = powers.get(bottom, 0) - power


def _noun(text: str) -> Unit | None:
    """A noun in the plural, with up to three words before it: `different ways`, `red marbles`."""
    words = text.replace(",", " ,").split()
    if not 1 <= len(words) <= 4 or any(not re.fullmatch(r"[A-Za-z][a-z]+(?:-[a-z]+)?", w) for w in words):
        return None
    low = [w.lower() for w in words]
    if any(w in _NO_NOUNS or w.removesuffix("s") in _NO_NOUNS for w in low) or any(
        "-" in w and _has_number(w) for w in low
    ):
        return None
    if any(w.endswith(("th", "ths", "ieth", "fold", "illion", "illions", "ly")) for w in low):
        return None
    last = low[-1]
    plural = len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if not plural and _known(last) is None:
        return None
    return Unit(((" ".join([*low[:-1], _singular(last)]), 1),), noun=True)


def _has_number(word: str) -> bool:
    return any(part in _NO_NOUNS for part in word.split("-"))


def _singular(word: str) -> str:
    known = _known(word)
    if known:
        return known
    return word[:-3] + "y" if word.endswith("ies") else word.removesuffix("s")


def own_phrase(text: str) -> Unit | None:
    """The words that stand behind a gold's value, whatever they are: another answer must have the same ones, or none."""
    known = parse(text)
    if known is not None:
        return known
    words = text.lower().split()
    if (
        not words
        or any(w in _NO_NOUNS for w in words)
        or not all(re.fullmatch("[a-z]{3,}", w) for w in words)
        or len(words) > 4
    ):
        return None
    return Unit(((" ".join([*words[:-1], _singular(words[-1])]), 1),), noun=True)

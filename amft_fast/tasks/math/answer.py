"""The final answer of a response: where it stands, its normal form, and whether two answers are plainly equal or not.

Nothing here needs a library, and every function is linear in the text, so it is safe on anything a policy may write. What
cannot be decided here (`plain_verdict` returns None) is left to math_compare.py, which runs in a worker process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_RESPONSE = 1 << 18
"""Characters of a response that are read, from its end: an answer stands last."""
MAX_ANSWER = 2000
"""Answers longer than this are wrong unread. The longest gold answer of the benchmarks has 222 characters."""

# ------------------------------------------------------------------------------------------------- where the answer stands

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.]|\\[()\[\]]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\}|\\quad|\\,)*")
_ANCHOR = re.compile(
    r"(?:final\s+answer|\banswer)\**\s*(?:is|are|:|=)\s*(?::|therefore\b|thus\b)?[\s*:]*", re.IGNORECASE
)
_GSM8K = re.compile(r"####[ \t]*(.+)")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$((?:\\\$|[^$\n])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NEXT_FORMULA = re.compile(r"\s*(?:,\s*)?(?:and|or)?\s*(?:\$|\\\()")
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\s(?:because|since|as|so|which|where)\s")
_CLOSING = re.compile(r"(?:=|\bis|\bare|\bequals)\s*([^=]+?)$")


def extract(response: str) -> str | None:
    """The final answer as written, or None.

    What counts, in this order: the last outermost `\\boxed{...}` (boxes with nothing but commas, "and" or "or" between them
    are one list); `#### x`; what follows the last "answer is" or "answer:"; the end of the last line, if it is a formula, a
    bare number or letter, or follows "=" or "is". A text after `</think>` comes before the thoughts.
    """
    text = response[-MAX_RESPONSE:]
    after = text.rpartition("</think>")[2] if "</think>" in text else ""
    for part in (after, text):
        for find in (_boxed, _hashes, _anchored, _last_line):
            found = find(part) if part.strip() else None
            if found is not None:
                return found.strip() or None
    return None


def _boxed(text: str) -> str | None:
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    spans: list[tuple[int, int, int]] = []  # start of the command, start and end of the content
    open_braces: list[tuple[int, int] | None] = []
    for token in _BOX_TOKEN.finditer(text):
        word = token[0]
        if word == "{":
            open_braces.append(None)
        elif word == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while spans and spans[-1][0] > box[0]:
                    spans.pop()  # the inner boxes of this one
                spans.append((box[0], box[1], token.start()))
        elif word[-1] == "{" and len(word) > 2:
            open_braces.append((token.start(), token.end()))
    if not spans:
        return None
    last = [spans.pop()]
    while spans and last[0][0] - spans[-1][2] < 40 and _BETWEEN_BOXES.fullmatch(text, spans[-1][2] + 1, last[0][0]):
        last.insert(0, spans.pop())
    parts = list(dict.fromkeys(text[start:end].strip() for _, start, end in last))
    return ", ".join(parts)


def _hashes(text: str) -> str | None:
    found = _GSM8K.findall(text)
    return found[-1] if found else None


def _anchored(text: str) -> str | None:
    ends = [match.end() for match in _ANCHOR.finditer(text)]
    return _first_statement(text[ends[-1] : ends[-1] + MAX_ANSWER].lstrip("* \n")) if ends else None


def _first_statement(rest: str) -> str | None:
    """The first line of `rest` up to the end of its sentence; its formula when it opens with one."""
    math = _MATH.match(rest)
    if math:
        tail = rest[math.end() :].split("\n", 1)[0]
        if not _NEXT_FORMULA.match(tail):  # else a list: the sentence as a whole
            unit = _SENTENCE_END.split(tail, maxsplit=1)[0].strip(" *.,;")
            return _inner(math) + (f" \\text{{ {unit} }}" if re.fullmatch(r"[a-zA-Z% ]{1,40}", unit) else "")
    line = rest.split("\n", 1)[0]
    line = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" *").rstrip(" .,;:")
    return line or None


def _last_line(text: str) -> str | None:
    line = text.rstrip()[-MAX_ANSWER:].rpartition("\n")[2].strip(" *").rstrip(".!,;: *")
    maths = list(_MATH.finditer(line))
    if maths and not line[maths[-1].end() :].strip(" .*"):
        return _inner(maths[-1]).rpartition("=")[2] if "," not in _inner(maths[-1]) else _inner(maths[-1])
    if len(line) < 60 and (choice(line) or number(normal_form(split_unit(line)[0])) is not None):
        return line
    closing = _CLOSING.search(line[-200:])
    return closing[1] if closing else None


def _inner(match: re.Match) -> str:
    return next(g for g in match.groups() if g is not None)


# -------------------------------------------------------------------------------------------------------------- normal form

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "√": r"\sqrt ",
        "±": r"\pm ",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
    }
)
_STEPS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)"), ""),
    (re.compile(r"(?<!\\)\\!"), ""),  # 10,\!080
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,;:](?=\d{3}(?!\d))"), ""),  # 10\,080
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"([_^])\{(\w)\}"), r"\1\2"),
    (re.compile(r"\s+"), " "),
]


def normal_form(text: str) -> str:
    """The text with one way of writing for what has several: spacing, delimiters, fractions, signs. Idempotent on answers."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    if text.startswith("{") and text.endswith("}") and _closes_at(text) == len(text) - 1:
        text = text[1:-1].strip()
    return re.sub(r" ?([=+\-*/^_,(){}\[\]<>|&]) ?", r"\1", text)


def _closes_at(text: str) -> int:
    """Where the bracket that opens `text` closes; -1 when it does not."""
    depth = 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return -1


# ---------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Number:
    """An exact value; `places` is the power of ten of the last digit of a decimal, None for integers and fractions."""

    value: Fraction
    places: int | None = None
    digits: int = 0

    def equals(self, other: Number) -> bool:
        """Whether they are the same number: exactly, or one is the other rounded or cut to six digits or more."""
        return self.value == other.value or self.rounds(other.value) or other.rounds(self.value)

    def rounds(self, value: Fraction) -> bool:
        """Whether this decimal, of at least six significant digits, is `value` rounded or cut to its length."""
        if self.places is None or self.digits < 6:
            return False
        unit = Fraction(10) ** self.places
        short = abs(value) - abs(self.value)
        return (value >= 0) == (self.value >= 0) and (abs(short) * 2 <= unit or 0 <= short < unit)


_DIGITS = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,400}"
_DECIMAL = re.compile(
    rf"([+-]?)\s?(?=\.?\d)({_DIGITS})?(?:\.(\d{{0,400}}))?"
    r"(?:[eE]([+-]?\d{1,3})|\s?(?:\\times|\\cdot|\*|x)\s?10\^(?:\{([+-]?\d{1,3})\}|(\d)))?"
)
_FRACTION = re.compile(r"([+-]?)(?:(\d{1,400})\s?)?\\frac\{(-?)(\d{1,400})\}\{(-?)(\d{1,400})\}")
_SLASHED = re.compile(r"([+-]?)(?:(\d{1,400}) )?(\d{1,400})\.?/(\d{1,400})")


def number(form: str) -> Number | None:
    """The number that a normal form writes out, or None: integers (with thousands separators), decimals, powers of ten,
    fractions, mixed numbers."""
    match = _DECIMAL.fullmatch(form)
    if match:
        sign, whole, part, *exponents = match.groups()
        exponent = int(next((e for e in exponents if e), "0"))
        whole = re.sub("[, ]", "", whole or "")
        value = Fraction(int((whole + (part or "")) or "0")) * Fraction(10) ** (exponent - len(part or ""))
        places = exponent - len(part) if part else None
        digits = len((whole + (part or "")).lstrip("0"))
        return Number(-value if sign == "-" else value, places, digits)
    match = _FRACTION.fullmatch(form)
    if match:
        sign, whole, minus, top, minus_below, bottom = match.groups()
        if whole and (minus or minus_below):
            return None
        negative = (sign == "-") ^ (minus == "-") ^ (minus_below == "-")
    else:
        match = _SLASHED.fullmatch(form)
        if not match:
            return None
        sign, whole, top, bottom = match.groups()
        negative = sign == "-"
    if int(bottom) == 0:
        return None
    value = Fraction(int(top), int(bottom)) + int(whole or 0)
    return Number(-value if negative else value)


# ------------------------------------------------------------------------------------------------------------------ units

_UNIT_NAMES = {
    "percent": "% percent percentage pct",
    "degree": "degree deg",
    "dollar": "dollar usd buck",
    "cent": "cent",
    "pound (money)": "gbp",
    "euro": "euro eur",
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "meter metre",
    "km": "km kilometer kilometre",
    "inch": "inch in",
    "foot": "foot feet ft",
    "yard": "yard yd",
    "mile": "mile mi",
    "second": "second sec",
    "minute": "minute min",
    "hour": "hour hr",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "gram": "gram gm",
    "kg": "kg kilogram",
    "mg": "mg milligram",
    "pound": "pound lb",
    "ounce": "ounce oz",
    "ton": "ton",
    "liter": "liter litre",
    "ml": "ml milliliter millilitre",
    "gallon": "gallon gal",
    "mile/hour": "mph",
    "km/hour": "kmh kmph kph",
    "radian": "radian rad",
    "unit": "unit",
}
_LETTERS = {"m": "m", "s": "second", "g": "gram", "h": "hour", "L": "liter", "l": "liter", "K": "kelvin", "J": "joule"}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_IRREGULAR = {"inches": "inch", "feet": "foot"}
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|textit|textnormal|mathbf|mathit|operatorname|rm)"
_POWER = r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?"
_TEXT_UNIT = re.compile(rf"(?:\\[,; ]|~|\s)*{_TEXT}\s*\{{([^{{}}]*)\}}{_POWER}\s*\.?$")
_PLAIN_UNIT = re.compile(rf"(?<=[\d}})])\s*([a-zA-Z][a-zA-Z/. ]*?)\.?{_POWER}$")
_MONEY = re.compile(r"^\s*([+-]?)\s*(?:US)?\s*(\\?\$|\\text\s*\{\s*\\?\$\s*\}|£|€)\s*(?=[\d.])")


def split_unit(text: str) -> tuple[str, str | None]:
    """(the rest, the unit's name or None) of an answer: `3 \\text{ cm}^2` is `("3", "cm^2")`, `\\$5` is `("5", "dollar")`.

    In formulas only what is set as text, or is a unit's whole name, counts as a unit: in `2 m` the m is a variable.
    """
    text = text.strip().strip("$") if text.count("$") == 2 and text.strip()[:1] == "$" else text.strip()
    money = _MONEY.match(text)
    unit = None
    if money:
        unit = {"£": "pound (money)", "€": "euro"}.get(money[2], "dollar")
        text = money[1] + text[money.end() :]
    text = text.rstrip(" .$")
    degrees = re.search(r"(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*$", text)
    if degrees:
        return text[: degrees.start()], "degree"
    percent = re.search(rf"\\?%\s*$|{_TEXT}\s*\{{\s*\\?%\s*\}}\s*$", text)
    if percent:
        return text[: percent.start()].strip(), "percent"
    match, wrapped = _TEXT_UNIT.search(text), True
    if not match:
        match, wrapped = _PLAIN_UNIT.search(text), False
    if match and match.start() > 0:
        name = _unit_name(match[1], match[2], wrapped)
        if name:
            return text[: match.start()].rstrip(" \\,;"), name if unit is None or name == unit else f"{unit} {name}"
    return text, unit


def _unit_name(words: str, power: str | None, wrapped: bool) -> str | None:
    """The unit that these words name, as one canonical text; None when they are no unit (or, unwrapped, may be variables)."""
    words = words.strip(" .").replace("\\", "")
    parts = [p for p in re.split(r"\s+|(/)", re.sub(r"\bper\b", "/", words)) if p]
    prefix, known, names = "", False, []
    for part in parts:
        low = part.lower()
        if low in ("square", "sq", "sq."):
            power = "2"
        elif low in ("cubic", "cu", "cu."):
            power = "3"
        elif part == "/":
            names.append("/")
        else:
            singular = _IRREGULAR.get(low) or _UNITS.get(low) or _UNITS.get(low.removesuffix("s"))
            singular = _UNITS.get(singular, singular) if singular else None
            singular = singular or (_LETTERS.get(part) if wrapped else None)
            known |= singular is not None
            names.append(singular or low.removesuffix("s"))
    if not names or not (known or wrapped or all(len(n) > 2 or n == "/" for n in names)):
        return None
    if not wrapped and not known and any(n in ("sin", "cos", "tan", "log", "and", "pi", "mod") for n in names):
        return None
    name = prefix + " ".join(names).replace(" / ", "/")
    return f"{name}^{power}" if power and power != "1" else name


# ---------------------------------------------------------------------------------------------------------------- verdicts

_CHOICE = re.compile(r"\(?([A-J])\)?[.:]?")
_CHOICE_WITH_TEXT = re.compile(r"\(?([A-J])(?:\)|[.:])\s*(?:\S.*)", re.DOTALL)
_WRAPPED = re.compile(rf"^{_TEXT}\s*\{{(.*)\}}$", re.DOTALL)


def unwrap_text(form: str) -> str:
    """`\\text{(C)}` without its wrapping, when it is all there is."""
    match = _WRAPPED.match(form)
    return match[1].strip() if match and "}" not in match[1] else form


def choice(answer: str) -> str | None:
    """The letter A to J that an answer to a multiple choice names: `C`, `(C)`, `C.`, `\\text{C}`, `C) Days become shorter`."""
    form = unwrap_text(normal_form(answer.strip("* ")))
    match = _CHOICE.fullmatch(form)
    if match:
        return match[1]
    match = _CHOICE_WITH_TEXT.fullmatch(form)
    others = re.findall(r"(?<![A-Za-z])([A-J])(?:\)|[.:,]|\s+(?:and|or)\b|$)", form)
    return match[1] if match and set(others) <= {match[1]} else None


def plain_verdict(answer: str, gold: str) -> bool | None:
    """True or False where an answer is plainly right or wrong; None where it takes mathematics to tell.

    Plain are choice letters, equal texts, and numbers on both sides with or without units: a missing unit is forgiven, a
    different one is not.
    """
    if not answer.strip() or not gold.strip() or len(answer) > MAX_ANSWER:
        return False
    letter = unwrap_text(gold.strip().strip("$"))
    if _CHOICE.fullmatch(letter):
        return choice(answer) == choice(letter)
    a_body, a_unit = split_unit(answer)
    g_body, g_unit = split_unit(gold)
    if a_unit and g_unit and a_unit != g_unit:
        return False
    a_form, g_form = _bare(normal_form(a_body)), _bare(normal_form(g_body))
    a, g = number(a_form), number(g_form)
    if a is not None and g is not None:
        return same_amount(a, a_unit, g, g_unit)
    if a_form == g_form and (a_unit == g_unit or a_unit is None or g_unit is None):
        return a is not None or "percent" not in (a_unit, g_unit) or a_unit == g_unit
    words_a, words_g = unwrap_text(a_form), unwrap_text(g_form)
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", words_g) and words_a.casefold() == words_g.casefold():
        return True
    return None


def _bare(form: str) -> str:
    """A number without what is set around it: `\\textbf{(113)}`."""
    inner = unwrap_text(form)
    inner = inner[1:-1].strip() if inner[:1] == "(" and inner[-1:] == ")" else inner
    return inner if number(inner) is not None else form


def same_amount(a: Number, a_unit: str | None, g: Number, g_unit: str | None) -> bool:
    """Whether two numbers with units (which are not different ones) are the same.

    50% is 0.5. Where only one has the sign, it may be left out too (a problem that asks for a percentage): then only above 1,
    so that 1% never passes for a probability of 1.
    """
    if a_unit == g_unit or "percent" not in (a_unit, g_unit):
        return a.equals(g)
    if a.equals(g) and abs(a.value) > 1:
        return True
    hundredth = Fraction(1, 100)
    a_value = a.value * hundredth if a_unit == "percent" else a.value
    g_value = g.value * hundredth if g_unit == "percent" else g.value
    return a_value == g_value

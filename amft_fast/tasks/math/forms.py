"""Names, labels and written forms: what in an answer stands for itself, and never goes to algebra."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from amft_fast.tasks.math.amounts import cardinal, read_amount
from amft_fast.tasks.math.expression import Parser
from amft_fast.tasks.math.kinds import Numeral, Ratio, Residue, Words
from amft_fast.tasks.math.latex import Token, Unreadable, closing, tokens, trimmed
from amft_fast.tasks.math.signs import names
from amft_fast.tasks.math.tree import Node

ALL_REALS = {
    tuple(names(t)) for t in ("all real numbers", "all reals", "all real x", "real numbers", "all real values")
}
_TWO = set(names("no on up ok pm am me us he we so do go be"))


def without_case(word: str) -> str:
    """A word in small letters, unless its case means something: short ones, and those with capitals inside (NaCl)."""
    if len(word) < 3:
        return word.lower() if word.lower() in _TWO else word
    return word.lower() if word.islower() or word.isupper() or word.istitle() else word


def is_label(listed: Sequence[Token]) -> bool:
    """A word, a name, a string of letters, a chemical formula: two letters or more and no sign of mathematics."""
    letters, after_index, depth = 0, False, 0
    for token in listed:
        if token.text == "_" and token.kind == "sign":
            after_index = True
            continue
        if token.kind == "sign" and token.text in "{}":
            depth += 1 if token.text == "{" else -1
            after_index = after_index and depth > 0
            continue
        if after_index:
            after_index = depth > 0
            continue
        if token.kind == "cmd" and token.text in ("angle", "triangle", "bar", "vec", "odot"):
            letters += 1
            continue
        if token.kind not in ("word", "text", "letter", "roman"):
            return False
        letters += len(token.text) if token.kind in ("word", "text") else 1
    small = all(t.kind == "letter" and t.text.islower() for t in listed if t.kind in ("letter", "word", "text"))
    words = [t.text.lower() for t in listed]
    if cardinal(words) is not None or tuple(words) in ALL_REALS or {"and", "or"} & set(words[1:-1]):
        return False
    return letters > 1 and not small


def read_label(listed: Sequence[Token]) -> Words:
    joined = all(t.kind == "letter" for t in listed)
    key = tuple(without_case(t.text) for t in listed)
    return Words(("".join(key),) if joined else key)


def condition_of(part: Sequence[Token]) -> tuple[str, str] | None:
    """(name, set) of `where k \\in Z`, `k an integer`."""
    texts = [t.text for t in part if t.text.lower() not in ("where", "for", "with", "any", "all")]
    if len(texts) == 3 and texts[1] == "in" and texts[2] in "ZNQRC" and part[-1].kind == "cmd":
        return (texts[0], texts[2])
    if [t.lower() for t in texts[1:]] in (["is", "an", "integer"], ["an", "integer"], ["integer"]) and len(
        texts[0]
    ) == 1:
        return (texts[0], "Z")
    return None


def name_of(part: Sequence[Token]) -> tuple[str, Node | None] | None:
    """(name, as a variable) when the left side of an equation is one: x, a_5, f(x), \\angle A, AB, (x, y), Area. Else None."""
    if not part:
        return None
    text = "".join(t.text for t in part)
    words = [t for t in part if t.kind in ("word", "text")]
    first = part[0]
    if len(part) == 1 and first.kind in ("letter", "bold", "roman", "text"):
        return (text, ("sym", text) if first.kind == "letter" and text not in "ei" else None)
    if all(t.kind in ("word", "text") or (t.kind == "letter" and len(words) > 1) for t in part):
        long = all(len(t.text) > 3 or t.kind == "text" for t in words if t.kind != "letter")
        capital = len(part) == 1 and text.isupper() and len(text) <= 6
        return (
            (" ".join(t.text.lower() for t in part) if long else text, None)
            if long or capital or len(words) > 1
            else None
        )
    if first.kind == "cmd" and first.text in ("angle", "triangle", "bar", "vec", "hat", "bar", "tilde", "dot", "ddot"):
        plain = all(
            t.kind in ("letter", "word", "cmd") or t.text in ("{", "}", "_") or t.kind == "num" for t in part[1:]
        )
        return (text, None) if plain and not any(t.text in ("frac", "sqrt") for t in part) else None
    if first.text == "m" and len(part) > 2 and part[1].text == "angle":
        return name_of(part[1:])
    if (
        first.text == "|"
        and part[-1].text == "|"
        and len(part) == 3
        and part[1].text.isupper()
        and len(part[1].text) == 2
    ):
        return (part[1].text, None)
    if first.text in "([" and part[-1].text in ")]":
        inner = [t for t in part[1:-1] if t.text != ","]
        tuple_ = all(t.kind == "letter" for t in inner) and len(inner) * 2 - 1 == len(part) - 2
        area = first.text == "[" and len(inner) == 1 and inner[0].text.isupper() and len(part) == 3
        return (text, None) if (tuple_ and len(inner) > 1) or area else None
    try:
        parser = Parser(part, lenient=True)
        node = parser.expression()
    except Unreadable:
        node = None
    if node is not None and parser.at == len(part):
        if node[0] in ("sym", "call"):
            return (text.replace("{", "").replace("}", ""), node)
        if first.kind == "cmd" or len(part) < 4:
            return None
    capital = (
        (first.kind in ("letter", "roman") and first.text.isupper())
        or first.kind == "text"
        or (first.kind == "cmd" and first.text in ("Delta", "mu", "sigma", "lambda"))
    )
    call = len(part) > 3 and part[1].text == "(" and part[-1].text == ")" and closing(part, 1) == len(part) - 1
    return (text, None) if capital and call else None


_DATE = re.compile(r"\d{1,4}([/.])\d{1,2}\1\d{1,4}|\d{4}-\d{1,2}-\d{1,2}|\d{1,2}-\d{1,2}-\d{4}")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*([apAP])\.?\s?[mM]\.?")
_NUMERAL = re.compile(
    r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*(?:_\s*(\d|\{\s*(?:base\s*)?(\d+|[a-z]+)\s*\})|_?\s*\(?\s*base[ -]?(\d+|[a-z]+)\s*\)?)"
)
_BASES = {w: n for n, w in enumerate(names("two three four five six seven eight nine ten eleven twelve"), 2)} | {
    "sixteen": 16
}
_MOD = re.compile(r"(.*?)(?:\(\s*\\?(?:bmod|mod)(.*)\)|\\(?:pmod|bmod)(.*)|(?<![a-z])mod(?![a-z])(.*))")


def written_form(plain: str, gold: bool) -> tuple[Any, ...] | None:
    """The readings of dates, times, ratios, numbers in a base, residues; None for all else."""
    if _DATE.fullmatch(plain):
        return (Words(tuple(plain)),)
    clock = _CLOCK.fullmatch(plain)
    if clock:
        hour, minute, second, half = clock.groups()
        return (Words((str(int(hour)), minute or "00", second or "00", half.lower())),)
    numeral = _NUMERAL.fullmatch(plain)
    if numeral:
        name = numeral[3] or numeral[4] or numeral[2]
        base = int(name) if name.isdigit() else _BASES.get(name, 0)
        digits = numeral[1].upper()
        named = (
            digits[0].isdigit()
            or (len(digits) > 1 and base > 10 and not gold)
            or (gold and base == 16 and len(digits) > 1)
        )
        if named:
            inside = 2 <= base <= 36 and all(int(d, 36) < base for d in digits)
            return (Numeral(digits.lstrip("0") or "0", base),) if inside else (Words((digits, "_", name)),)
    if "mod" in plain:
        return _residue(plain, gold)
    if ":" in plain and re.fullmatch(r"[^:|]*(?::[^:|]*){1,5}", plain) and not re.search(r"\\\{|[=<>]|to", plain):
        try:
            return (Ratio(tuple(read_amount(trimmed(tokens(part)), gold) for part in plain.split(":"))),)
        except Unreadable:
            return (Words(tuple(plain)),)
    return None


def _residue(plain: str, gold: bool) -> tuple[Any, ...]:
    match = _MOD.fullmatch(plain)
    if match is None:
        return ()
    modulus = next((g for g in match.groups()[1:] if g is not None), "").strip().strip("{}()")
    subject, sign, value = match[1].rpartition("\\equiv")
    if not sign:
        subject, sign, value = match[1].rpartition("=")
    try:
        parts = [Parser(tokens(part), gold).whole() for part in (value.strip().strip(","), modulus)]
    except Unreadable:
        return ()
    return (Residue(subject.replace(" ", ""), parts[0], parts[1]),)

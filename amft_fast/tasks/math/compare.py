"""Whether an answer says the same as the gold answer, where that takes mathematics: lists, sets, intervals, tuples, matrices,
formulas. Runs in a worker process (math_worker.py), because formulas of a policy's making can take for ever.

Structure is compared here, part by part; what is left, single formulas, goes to math-verify, and its "yes" is checked by
evaluation: it rounds to six decimals, so that 2e-9 would pass for 1e-9, and calls two equations without solutions equal.
Without math-verify the comparison of structure, texts and numbers remains, which says "no" more often but never "yes" more
often.
"""

from __future__ import annotations

import logging
import random
import re
from functools import lru_cache
from typing import Any

from amft_fast.tasks.math.answer import (
    MAX_ANSWER,
    normal_form,
    number,
    plain_verdict,
    same_amount,
    split_unit,
    unwrap_text,
)

MAX_PARTS = 64
_MATRIX = re.compile(r"\\begin\{([bpvB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_AND = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:mathrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|lt|gt)(?![a-zA-Z])")
_PLUS_MINUS = re.compile(r"\\pm|\\mp")
# x = 5, f(x) = 2 x, m_{\max} = 7, x \in [1, 2]: the side that names.
_NAMED = re.compile(
    r"((?:\\?[a-zA-Z]+|\\angle [A-Z ]+)(?:_(?:\w|\{[^{}]*\}))?'?(?:\([a-zA-Z, ]*\))?)(=|\\in(?![a-zA-Z]))(.+)",
    re.DOTALL,
)


def same(answer: str, gold: str) -> bool:
    """Whether `answer` is as good as `gold`. Symmetric but for units, which an answer may leave out."""
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    plain = plain_verdict(answer, gold)
    return plain if plain is not None else _same(answer, gold)


def _same(answer: str, gold: str) -> bool:
    a, g = _tidy(answer), _tidy(gold)
    a_kind, a_parts = _structure(a)
    g_kind, g_parts = _structure(g)
    if a_kind == g_kind and a_kind != "formula":
        if len(a_parts) != len(g_parts):
            return False
        ordered = a_kind not in ("list", "union")
        return _all_same(a_parts, g_parts) if ordered else _matched(a_parts, g_parts)
    if "list" in (a_kind, g_kind):
        return False
    if a_kind == g_kind == "formula":
        return _same_formula(a, g)
    # What is left is an interval (or several) against an inequality, which math-verify reads.
    return bool(_RELATION.search(a) or _RELATION.search(g)) and _verified(a, g)


def _all_same(answers: list[str], golds: list[str]) -> bool:
    return all(same(a, g) for a, g in zip(answers, golds))


def _matched(answers: list[str], golds: list[str]) -> bool:
    """Whether the parts are the same in some order. Sameness of numbers and formulas is transitive enough to be greedy."""
    left = list(answers)
    for gold in golds:
        found = next((i for i, a in enumerate(left) if same(a, gold)), None)
        if found is None:
            return False
        del left[found]
    return True


def _tidy(text: str) -> str:
    """The normal form with connecting words as commas."""
    return normal_form(_AND.sub(",", re.sub(r",?\s*\$\s*,\s*\$", ",", text)))


@lru_cache(4096)
def _structure(form: str) -> tuple[str, list[str]]:
    """("list" | "tuple()" and so on by its brackets | "union" | "matrix r" | "formula", parts) of a normal form."""
    matrix = _MATRIX.fullmatch(form)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix("\\\\")) if row.strip()]
        return f"matrix {len(rows)}", [cell.strip() for row in rows for cell in row]
    braces = re.fullmatch(r"\\(?:lbrace|\{)(.*)\\(?:rbrace|\})", form, re.DOTALL)
    if braces and "\\{" not in braces[1] and "|" not in braces[1] and "\\mid" not in braces[1]:
        return "list", _plus_minus(_split(braces[1], ",;"))
    union = _split(form, "\\cup")
    if len(union) > 1:
        return "union", union
    parts = _split(form, ",;")
    if len(parts) > 1:
        return "list", _plus_minus(parts)
    if _PLUS_MINUS.search(form):
        return "list", _plus_minus(parts)
    if form[:1] in ("(", "[") and form[-1:] in (")", "]"):
        inner = _split(form[1:-1], ",;")
        if len(inner) > 1 and _balanced(form[1:-1]):
            return f"tuple{form[0]}{form[-1]}", inner
    return "formula", [form]


def _plus_minus(parts: list[str]) -> list[str]:
    """Each part with a single ± as its two values."""
    out = []
    for part in parts:
        if len(_PLUS_MINUS.findall(part)) == 1:
            out += [_PLUS_MINUS.sub("+", part).removeprefix("+"), _PLUS_MINUS.sub("-", part)]
        else:
            out.append(part)
    return out


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(form: str, separators: str) -> list[str]:
    """The parts of a form between separators (characters, or one command) outside all brackets, empty ones dropped."""
    parts, depth, begin, i = [], 0, 0, 0
    word = separators if separators.startswith("\\") else ""
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", form):
        return [form]
    while i < len(form):
        c = form[i]
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and (form.startswith(word, i) if word else c in separators and form[i - 1 : i] != "\\"):
            parts.append(form[begin:i])
            i += max(len(word), 1)
            begin = i
            continue
        i += 1
    parts.append(form[begin:])
    return [p.strip() for p in parts if p.strip()][: MAX_PARTS + 1]


# --------------------------------------------------------------------------------------------------------- single formulas


def _same_formula(answer: str, gold: str) -> bool:
    a_name, a_body = _named(answer)
    g_name, g_body = _named(gold)
    if (a_name or g_name) and not (a_name and g_name and a_name != g_name):
        return same(a_body, g_body)
    a_rest, a_unit = split_unit(answer)
    g_rest, g_unit = split_unit(gold)
    if a_unit and g_unit and a_unit != g_unit:
        return False
    if a_unit or g_unit:
        if "percent" in (a_unit, g_unit) and a_unit != g_unit:
            a, g = number(normal_form(a_rest)), number(normal_form(g_rest))
            return a is not None and g is not None and same_amount(a, a_unit, g, g_unit)
        if _same_formula(normal_form(a_rest), normal_form(g_rest)):
            return True
        if a_unit and g_unit:
            return False
    return answer == gold or _verified(answer, gold)


def _named(form: str) -> tuple[str, str]:
    """The name and the value of `x = 5` (the last value of a chain); ("", form) where nothing is named."""
    match = _NAMED.fullmatch(form)
    if not match or (match[2] == "=" and _RELATION.search(match[3])):
        return "", form
    value = match[3] if match[2] != "=" else match[3].rpartition("=")[2]
    return match[1].replace(" ", ""), value


def _verified(answer: str, gold: str) -> bool:
    """math-verify's "yes", unless evaluation contradicts it. False where it is not installed or cannot read one of them."""
    if not available() or _base_number(answer) or _base_number(gold):
        return False
    if _explosive(answer) or _explosive(gold):
        return False
    from math_verify import verify

    gold, answer = _apart(gold, answer)
    for g in _parse(gold):
        for a in _parse(answer):
            # Evaluation comes first: it is quick to say "no", where simplifying takes seconds.
            if _agree(g, a) is not False and verify(g, a, timeout_seconds=None, allow_set_relation_comp=True):
                return True
    return False


def _base_number(form: str) -> bool:
    """52_8: math-verify takes the subscript for a name; such numbers are compared as texts."""
    return re.fullmatch(r"\(?[0-9A-F]+\)?_(?:\w+|\{[^{}]*\})", form) is not None


def _explosive(form: str) -> bool:
    """Towers of powers, and numbers or factorials that alone fill the memory. What this lets through, the time limit ends."""
    power = r"\^\s*[{(]?\s*-?[\d.]+\s*[})]?\s*"
    return bool(
        re.search(
            rf"(?:{power}){{3}}|\^\{{[^{{}}]*\^\{{[^{{}}]*\^|\^[{{(]?\d{{6,}}|\d{{400,}}|\d{{6,}}\)?\s?!|!\s?\)?\s?!",
            form,
        )
    )


def _apart(*forms: str) -> list[str]:
    """The forms with capitals that also occur small renamed, in all of them alike: math-verify takes M and m for the same."""
    letters = {t for form in forms for t in re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", form)}
    free = [g for g in ("xi", "zeta", "eta", "kappa", "nu", "chi", "psi", "tau") if f"\\{g}" not in letters]
    clash = sorted(c for c in letters if len(c) == 1 and c.isupper() and c.lower() in letters)
    new = dict(zip(clash, free))
    return [re.sub(r"\\[a-zA-Z]+|[A-Z]", lambda m: f"\\{new[m[0]]} " if m[0] in new else m[0], form) for form in forms]


@lru_cache(1)
def available() -> bool:
    """Whether math-verify is installed."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return True


@lru_cache(4096)
def _parse(form: str) -> list[Any]:
    """What math-verify reads in a formula. Units are not left to it: it takes the t of `2 t` for tons."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, Rational

    plain = number(form)
    if plain is not None:
        exact = Rational(plain.value.numerator, plain.value.denominator)
        return [Float(exact, 30) if plain.places is not None and plain.digits >= 6 else exact]
    cleaning = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=cleaning)
    text = f"${unwrap_text(form).replace('$', '')}$"
    return parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None)


# ------------------------------------------------------------------------------------------------------- check of a "yes"


def _agree(gold: Any, answer: Any) -> bool | None:
    """Whether two parsed formulas have the same value at random points; None where that cannot be told."""
    from sympy import Basic, Eq, Tuple
    from sympy import FiniteSet as Finite

    if isinstance(gold, Finite | Tuple) and isinstance(answer, Finite | Tuple):
        if len(gold.args) != len(answer.args):
            return False
        return all(any(_agree(g, a) is not False for a in answer.args) for g in gold.args)
    if isinstance(answer, Eq) and not isinstance(gold, Eq):
        return _agree(gold, answer.rhs)
    if isinstance(gold, Eq) and not isinstance(answer, Eq):
        return _agree(gold.rhs, answer)
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        return _same_equation(gold, answer)
    if not isinstance(gold, Basic) or not isinstance(answer, Basic) or not (gold.is_number or gold.free_symbols):
        return None
    points = _values(gold, answer)
    if not points:
        return None
    return all(_near(x, y) for x, y in points)


def _same_equation(gold: Any, answer: Any) -> bool:
    """Whether the differences of the two sides are multiples of each other, or a variable is solved for in one of them."""
    difference, other = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    points = [(x, y) for x, y in _values(difference, other) if abs(x) > 1e-9 and abs(y) > 1e-9]
    if len(points) < 2:
        return False
    ratio = points[0][0] / points[0][1]
    return all(_near(x, y * ratio) for x, y in points)


def _values(gold: Any, answer: Any) -> list[tuple[complex, complex]]:
    """The values of both at the same random points (one value when nothing is free); empty where they have none."""
    if getattr(gold, "free_symbols", None) is None or getattr(answer, "free_symbols", None) is None:
        return []
    names = sorted({s.name for s in gold.free_symbols | answer.free_symbols})
    draw, points = random.Random(0), []
    for _ in range(4 if names else 1):
        at = {name: draw.uniform(0.5, 2.5) for name in names}
        try:
            x, y = (complex(e.doit().subs({s: at[s.name] for s in e.free_symbols}).evalf(30)) for e in (gold, answer))
        except Exception:
            return []
        if x == x and y == y and abs(x) < 1e300 and abs(y) < 1e300:
            points.append((x, y))
    return points


def _near(x: complex, y: complex) -> bool:
    """Equal up to what six significant digits of a decimal leave open."""
    return abs(x - y) <= 2e-6 * max(abs(x), abs(y)) + 1e-300

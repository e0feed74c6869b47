"""Reading an answer: from its text to what it is.

A few texts have two readings (`216,343` is a number with a separator of thousands, or a list). Words, dates, names and labels
have none but their own text, so that algebra never sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from amft_fast.tasks.math.amounts import one_family, read_amount, with_letter_as_unit
from amft_fast.tasks.math.forms import ALL_REALS, condition_of, is_label, read_label, without_case, written_form
from amft_fast.tasks.math.kinds import (
    Amount,
    Bracket,
    Chain,
    Items,
    Piece,
    Ranges,
    Sum,
    Under,
    Words,
    as_ranges,
    holes_of,
    reals,
    without,
)
from amft_fast.tasks.math.latex import (
    NEW_ROW,
    Token,
    Unreadable,
    closing,
    exploded,
    fold,
    step,
    tokens,
    trimmed,
    ungroup,
)
from amft_fast.tasks.math.matrices import MATRIX, SYSTEM, read_matrix
from amft_fast.tasks.math.relations import RELATIONS, related
from amft_fast.tasks.math.signs import names
from amft_fast.tasks.math.tree import INFINITY, MINUS_INFINITY

MAX_ITEMS = 200
"""Items of a list that are read."""


@dataclass(frozen=True)
class Reading:
    """`key`: the text as tokens, for plain equality; `values`: its readings."""

    key: tuple[str, ...]
    values: tuple[Any, ...]


@lru_cache(8192)
def read(text: str, gold: bool) -> Reading:
    """The readings of an answer, or of a gold answer. Raises Unreadable for what is not even tokens."""
    folded = fold(text)
    listed = tokens(folded)
    words = exploded(listed)
    key = _key(words)
    wordy = bool(words) and all(t.kind in ("word", "text", "letter") or t.text in (",", ".", "-", "'") for t in words)
    if wordy:
        key = tuple(without_case(k) for k in key if k != ".")
    values: list[Any] = []
    plain = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|textrm) ?\{([^{}]*)\}", r"\1", folded).strip()
    special = written_form(plain, gold)
    if special is not None:
        return Reading(key, special)
    forms = [ungroup(folded)]
    if forms[0] != folded and re.search(r"(?<!\d),0\d\d(?!\d)", folded) is None:
        forms.append(folded)
    for form in dict.fromkeys(forms):
        try:
            values += _whole(form, gold)
        except (Unreadable, RecursionError):
            continue
    return Reading(key, tuple(dict.fromkeys(values)))


def _key(listed: Sequence[Token]) -> tuple[str, ...]:
    """Texts of tokens, without the braces around one of them."""
    out = [f"bold {t.text}" if t.kind == "bold" else f"\\{t.text}" if t.kind == "cmd" else t.text for t in listed]
    i = 0
    while i + 2 < len(out):
        if out[i] == "{" and out[i + 2] == "}" and out[i + 1] not in ("{", "}") and (i < 1 or not out[i - 1].isdigit()):
            single = len(out[i + 1]) == 1 or out[i + 1].startswith("\\") or not (i and out[i - 1] == "^")
            if single:
                out[i : i + 3] = [out[i + 1]]
        i += 1
    return tuple(out)


# ------------------------------------------------------------------------------------------------------------- structure

_OTHER_RELATIONS = set(
    names("subset subseteq supset supseteq perp parallel sim cong equiv iff to Rightarrow implies propto ll gg")
)


def _whole(folded: str, gold: bool) -> list[Any]:
    system = SYSTEM.fullmatch(folded)
    if system:
        rows = (system[2] if system[2] is not None else system[3]).replace("&", " ").split(NEW_ROW)
        folded = ", ".join(row.strip().rstrip(",;") for row in rows if row.strip())
    matrix = MATRIX.search(folded)
    if matrix:
        return [read_matrix(folded, matrix, gold, _value)]
    if NEW_ROW in folded or "\\begin" in folded:
        raise Unreadable("rows")
    listed = trimmed(exploded(tokens(folded)))
    if not listed:
        raise Unreadable("empty")
    if gold and is_label(listed):
        return [read_label(listed)]
    out = []
    with suppress(Unreadable):
        out.append(_value(listed, gold))
    out += with_letter_as_unit(listed, gold)
    if not gold and is_label(listed):
        out.append(read_label(listed))
    return out


def _split(listed: Sequence[Token], is_mark: Callable[[Token], bool]) -> tuple[list[list[Token]], list[str]]:
    """The parts between marks that stand outside all brackets, and the marks."""
    parts, marks, depth = [[]], [], 0
    for token in listed:
        depth += step(token)
        if depth == 0 and is_mark(token):
            marks.append(token.text.lower())
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, marks


def _value(listed: list[Token], gold: bool) -> Any:
    """The one reading of some tokens. Raises Unreadable."""
    listed = trimmed(listed)
    french = _french(listed)
    if french is not None:
        listed = french
    if tuple(t.text.lower() for t in listed) in ALL_REALS:
        return reals()
    for at, token in enumerate(listed):  # k\\pi where k \\in Z
        if at and token.kind in ("word", "text") and token.text.lower() in ("where", "with", "for"):
            bounded = condition_of(listed[at:])
            if bounded is not None:
                return Under(_value(listed[:at], gold), (bounded,))
    if listed[-1].text == ")" and len(listed) > 6:  # 2k\\pi (k \\in Z)
        begin = next(
            (i for i in range(len(listed)) if listed[i].text == "(" and closing(listed, i) == len(listed) - 1), 0
        )
        bounded = condition_of(listed[begin + 1 : -1]) if begin else None
        if bounded is not None:
            return Under(_value(listed[:begin], gold), (bounded,))
    parts, marks = _split(
        listed, lambda t: t.text in (",", ";") or (t.kind in ("word", "text") and t.text.lower() in ("and", "or"))
    )
    if marks:
        conditions = [condition_of(part) for part in parts]
        at = next((i for i, c in enumerate(conditions) if c is not None), 0)
        if at and None not in conditions[at:] and set(marks[at - 1 :]) <= {",", ";", "and"}:
            rest = _list(parts[:at], marks[: at - 1], gold) if at > 1 else _value(parts[0], gold)
            return Under(rest, tuple(c for c in conditions[at:] if c is not None))
        return _list(parts, marks, gold)
    parts, marks = _split(listed, lambda t: t.text in RELATIONS and t.kind in ("sign", "cmd"))
    if any(t.kind == "cmd" and t.text in _OTHER_RELATIONS for t in listed):
        return _other_relation(listed, gold)
    if marks:
        return related(parts, [RELATIONS[m] for m in marks], gold, _value)
    parts, marks = _split(listed, lambda t: t.kind == "cmd" and t.text in ("cup", "setminus"))
    if marks:
        return _union(parts, marks, gold)
    if any(t.kind == "cmd" and t.text in ("pm", "mp") for t in listed):
        return Items(tuple(_value(form, gold) for form in _plus_minus(listed)))
    return _single(listed, gold)


def _french(listed: list[Token]) -> list[Token] | None:
    """]a, b[ with its brackets turned."""
    turned = (listed[0].kind, listed[0].text) == ("sign", "]") or (listed[-1].kind, listed[-1].text) == ("sign", "[")
    if not turned or len(listed) < 4:
        return None
    out, begin = [], 0
    cuts = [i for i, t in enumerate(listed) if t.kind == "cmd" and t.text == "cup"] + [len(listed)]
    for cut in cuts:
        piece = listed[begin:cut]
        if len(piece) < 4 or piece[0].text not in "[]" or piece[-1].text not in "[]":
            return None
        first, last = ("(" if piece[0].text == "]" else "["), (")" if piece[-1].text == "[" else "]")
        out += [Token("sign", first, False), *piece[1:-1], Token("sign", last, False), *listed[cut : cut + 1]]
        begin = cut + 1
    return out


def _plus_minus(listed: list[Token]) -> list[list[Token]]:
    """Both forms of what holds one ±, or several that go together."""
    forms = []
    for plus, minus in (("+", "-"), ("-", "+")):
        form = []
        for token in listed:
            if token.kind == "cmd" and token.text in ("pm", "mp"):
                form.append(Token("sign", plus if token.text == "pm" else minus, token.space))
            else:
                form.append(token)
        forms.append(form)
    if len([t for t in listed if t.text in ("pm", "mp")]) > 1:
        raise Unreadable("±")
    return forms


def _list(parts: list[list[Token]], marks: list[str], gold: bool) -> Any:
    if any(
        not part and (i == 0 or mark not in ("and", "or")) for i, (part, mark) in enumerate(zip(parts, [*marks, ""]))
    ):
        raise Unreadable("empty item")  # one is empty in "1, 2, and 3"
    kept = [part for part in parts if part]
    if len(kept) > MAX_ITEMS or len(kept) < 2:
        raise Unreadable("items")
    items: list[Any] = []
    for part in kept:
        value = _item(part, gold)
        both = isinstance(value, Items) and not value.braces
        items += value.items if both else [value]
    if all(isinstance(v, Amount) and v.unit for v in items) and one_family(items) and "or" not in marks:
        return Sum(tuple(items))
    if all(isinstance(v, Ranges) for v in items) and len({v.name for v in items}) == 1:
        if set(marks) == {"or"}:
            return Ranges(tuple(p for v in items for p in v.pieces), items[0].name)
        if set(marks) == {"and"} or set(marks) == {","}:
            return _both_hold(items)
    return Items(tuple(items))


def _item(part: list[Token], gold: bool) -> Any:
    if len(part) == 1 and (part[0].kind, part[0].text) == ("cmd", "ldots"):
        return Words(("...",))
    if is_label(part):
        return read_label(part)
    if len(part) == 1 and part[0].kind == "text" and len(part[0].text) == 1:
        return Amount(("sym", part[0].text))
    return _value(part, gold)


def _both_hold(items: Sequence[Ranges]) -> Any:
    """x > 1 and x < 4: one interval, when one bounds from below and the other from above."""
    holes = [holes_of(v) for v in items]
    if None not in holes:  # x ≠ 1, x ≠ 2
        return without([p for h in holes for p in h], items[0].name)
    if len(items) != 2 or any(len(v.pieces) != 1 for v in items):
        return Items(tuple(items))
    one, two = items[0].pieces[0], items[1].pieces[0]
    if one.high.node == INFINITY and two.low.node == MINUS_INFINITY:
        return Ranges((Piece(one.low, one.low_closed, two.high, two.high_closed),), items[0].name)
    if two.high.node == INFINITY and one.low.node == MINUS_INFINITY:
        return Ranges((Piece(two.low, two.low_closed, one.high, one.high_closed),), items[0].name)
    return Items(tuple(items))


def _other_relation(listed: list[Token], gold: bool) -> Any:
    """Relations that nothing is known of: their sides are compared, in their order."""
    parts, marks = _split(listed, lambda t: t.kind == "cmd" and t.text in _OTHER_RELATIONS)
    if len(parts) < 2 or not all(parts):
        raise Unreadable("relation")
    return Chain(tuple(Words(_key(part)) for part in parts), tuple(marks))


def _single(listed: list[Token], gold: bool) -> Any:
    first, last = listed[0], listed[-1]
    if len(listed) == 1 and first.kind == "cmd" and first.text in ("R", "emptyset"):
        return reals() if first.text == "R" else Items((), True)
    if (first.kind, first.text) == ("sign", "\\{") and closing(listed, 0) == len(listed) - 1 and last.text == "\\}":
        return _braces(listed[1:-1], gold)
    brackets = first.kind == "sign" and first.text in "([" and last.kind == "sign" and last.text in ")]"
    angles = (first.text, last.text) == ("langle", "rangle")
    if (brackets or angles) and closing(listed, 0) == len(listed) - 1:
        parts, marks = _split(listed[1:-1], lambda t: t.text in (",", ";"))
        if marks:
            if len(parts) > MAX_ITEMS or not all(parts):
                raise Unreadable("items")
            return Bracket(first.text, last.text, tuple(_item(part, gold) for part in parts))
    return read_amount(listed, gold)


def _braces(inner: list[Token], gold: bool) -> Any:
    if not inner:
        return Items((), True)
    bars = [i for i, t in enumerate(inner) if t.kind == "sign" and t.text in "|:"]
    if bars:  # {x | 1 < x < 4}
        left, right = inner[: bars[0]], inner[bars[0] + 1 :]
        parts, _ = _split(left, lambda t: t.text == "in")
        if len(parts) == 2 and [t.text for t in parts[1]] != ["R"]:
            raise Unreadable("set")
        value = _value(right, gold)
        if not isinstance(value, Ranges) or len(parts[0]) != 1 or value.name != parts[0][0].text:
            raise Unreadable("set")
        return Ranges(value.pieces)
    parts, _ = _split(inner, lambda t: t.text in (",", ";"))
    items: list[Any] = []
    for part in parts:
        if not part:
            raise Unreadable("empty item")
        value = _item(part, gold)
        items += value.items if isinstance(value, Items) and not value.braces else [value]
    return Items(tuple(items), True)


def _union(parts: list[list[Token]], marks: list[str], gold: bool) -> Any:
    values = [_value(part, gold) if part else None for part in parts]
    if None in values:
        raise Unreadable("union")
    if "setminus" in marks:
        whole, holes = values[0], values[1]
        if len(values) != 2 or not isinstance(whole, Ranges) or not isinstance(holes, Items) or whole != reals():
            raise Unreadable("set minus")
        return without(holes.items)
    if all(isinstance(v, Items) and v.braces for v in values):
        return Items(tuple(item for v in values for item in v.items), True)
    pieces: list[Piece] = []
    for value in values:
        if isinstance(value, Items) and value.braces:
            pieces += [Piece(item, True, item, True) for item in value.items if isinstance(item, Amount)]
        else:
            pieces += as_ranges(value).pieces
    return Ranges(tuple(pieces))

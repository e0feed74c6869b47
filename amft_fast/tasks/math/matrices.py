"""Matrices: whatever brackets they are written with, with a name or a number before them."""

from __future__ import annotations

import re
from typing import Any

from amft_fast.tasks.math.expression import Parser
from amft_fast.tasks.math.forms import name_of
from amft_fast.tasks.math.kinds import Matrix, Named
from amft_fast.tasks.math.latex import NEW_ROW, Token, Unreadable, exploded, tokens, trimmed
from amft_fast.tasks.math.relations import Read

MATRIX = re.compile(
    r"\\begin \{((?:small)?[bpvBV]?matrix|array)\}(?:\s*\{[lcr| ]*\})?((?:(?!\\begin ).)*)\\end \{\1\}", re.DOTALL
)
SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin \{(cases|aligned|align\*?|gathered)\}((?:(?!\\begin |if|\\text ).)*)\\end \{\1\}"
    r"|\\\{\s*\\begin \{array\}\s*\{[lcr]*\}((?:(?!\\begin |if|\\text ).)*)\\end \{array\}",
    re.DOTALL,
)


def read_matrix(folded: str, match: re.Match, gold: bool, value_of: Read) -> Any:
    """The matrix that `match` (of MATRIX) is in `folded`; `value_of` reads a cell. Raises Unreadable."""
    before, after = folded[: match.start()].strip(), folded[match.end() :].strip()
    kind = match[1].replace("small", "").replace("matrix", "").replace("array", "")
    if after[:1] in (")", "]", "|") and before[-1:] == {")": "(", "]": "[", "|": "|"}[after[0]] and kind == "":
        kind = "v" if after[0] == "|" else "p"
        before, after = before[:-1].strip(), after[1:].strip()
    if after:
        raise Unreadable("after a matrix")
    rows = match[2].replace("\\hline", "").split(NEW_ROW)
    if rows and not rows[-1].strip():
        rows.pop()
    cells = tuple(tuple(value_of(trimmed(exploded(tokens(cell))), gold) for cell in _cells(row)) for row in rows)
    if not cells or len({len(row) for row in cells}) != 1:
        raise Unreadable("ragged matrix")
    kind = {"": "p", "b": "p"}.get(kind, kind)
    name = None
    if "=" in before:
        left, _, before = before.rpartition("=")
        name = name_of(exploded(tokens(left)))
        if name is None:
            raise Unreadable("name of a matrix")
    scale = None
    if before.strip():
        scaling = tokens(before.strip().removesuffix("*"))
        if [t.text for t in scaling] == ["-"]:
            scaling = [*scaling, Token("num", "1", False)]
        scale = Parser(scaling, gold).whole()
    matrix = Matrix(kind, cells, scale)
    return Named(name[0], matrix) if name else matrix


def _cells(row: str) -> list[str]:
    cells = row.split("&")
    if not all(cell.strip() for cell in cells):
        raise Unreadable("empty cell")
    return cells

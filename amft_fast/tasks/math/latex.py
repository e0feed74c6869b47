"""From what people type to tokens: one way of writing for what Unicode, TeX and plain text write in many, nothing dropped.

`fold` maps a text to a small dialect (`\\times`, `·` and `*` are `*`, `½` is `\\frac{1}{2}`, `\\left(` is `(`); `tokens` cuts
that into tokens. A command that is not known stays in, so that what cannot be read is never taken for what is left without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from amft_fast.tasks.math.signs import GREEK, names, without_unicode

DOLLAR = "\ue000"
"""A dollar sign that is money, after `fold`."""
NEW_ROW = "\ue001"
"""A line break in a matrix, after `fold`."""


class Unreadable(ValueError):
    """A text that is not of the form asked for."""


# ------------------------------------------------------------------------------------------------------------------ TeX

_SAME = {
    "tfrac dfrac cfrac": "frac",
    "dbinom tbinom": "binom",
    "leq leqslant leqq": "le",
    "geq geqslant geqq": "ge",
    "neq": "ne",
    "dots cdots dotsc dotsb dotsm": "ldots",
    "varnothing": "emptyset",
    "rightarrow longrightarrow": "to",
    "reals": "R",
    "infin": "infty",
    "land": "wedge",
    "lor": "vee",
    "lnot": "neg",
    "tg": "tan",
    "ctg": "cot",
    "arctg": "arctan",
    "overline": "bar",
    "varphi": "phi",
    "vartheta": "theta",
    "varepsilon": "epsilon",
    "overrightarrow": "vec",
    "widehat": "hat",
    "mod": "bmod",
    "thickapprox simeq": "approx",
}
_ALIASES = {old: new for names, new in _SAME.items() for old in names.split()}
_SIGN_OF = {
    "lt": "<",
    "gt": ">",
    "cdot": "*",
    "ast": "*",
    "div": "/",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "lbrack": "[",
    "rbrack": "]",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "mid": "|",
    "lVert": "\\|",
    "rVert": "\\|",
    "Vert": "\\|",
    "colon": ":",
    "prime": "'",
    "quad": " ",
    "qquad": " ",
    "space": " ",
    "dollar": DOLLAR,
    "textdollar": DOLLAR,
    "degree": "\\degree ",
    "textdegree": "\\degree ",
}
_DROPPED = set(
    names(
        "displaystyle textstyle scriptstyle limits nolimits big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr left right "
        "middle boxed fbox strut nonumber hfill noindent centering normalsize large Large small boldmath"
    )
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s?|\\(.)", re.DOTALL)
_STEPS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\\\\s*(?:\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?"), NEW_ROW),
    (re.compile(r"\\(?:hspace|vspace)\*?\s*\{[^{}]*\}|\\tag\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:textcolor|color)\s*\{[^{}]*\}|\\(?:underline|smash)(?=\s*\{)"), ""),
    (re.compile(r"\{\s*\\rm(?![a-zA-Z])([^{}]*)\}"), r"\\mathrm{\1}"),
    (re.compile(r"\{\s*\\bf(?![a-zA-Z])([^{}]*)\}"), r"\\mathbf{\1}"),
    (re.compile(r"\\math(?:bb|bf)\s*\{?\s*([RZNQC])(?![a-zA-Z])\s*\}?"), r"\\\1 "),
    (re.compile(r"\\left\s*\.|\\right\s*\."), ""),
    (re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\{,\}\s*"), ","),
    (re.compile(r"\\text(?:rm)?\s*\{\s*\\?\$\s*\}"), DOLLAR),
    (re.compile(r"\\text(?:rm)?\s*\{\s*\\?%\s*\}"), "%"),
    (re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))"), r"\\degree "),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\not\s*\\in(?![a-zA-Z])"), r"\\notin "),
]
_THIN = re.compile(r"(?<=\d)(?:\\[!,;:]\s*|\\ |\{,\}\s*)(?=\d{3}(?!\d))")
_NO_SPACE = re.compile(r"(?<=\d),\\!\s*(?=\d{3}(?!\d))")
_AFTER: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\*\*\s*(\d+|[a-z](?![a-zA-Z]))"), r"^{\1}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"<=>|<->"), r"\\iff "),
    (re.compile(r"=<|<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\.{3,}"), r"\\ldots "),
    (re.compile(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*\{\s*(\d+)\s*\}"), r"\1.\2(\3)"),
    (re.compile(r"(?<!\d)(\d*)\.(\d*)\\dot\s*\{?\s*(\d)\s*\}?(\d*)\\dot\s*\{?\s*(\d)\s*\}?"), r"\1.\2(\3\4\5)"),
    (re.compile(r"(?<!\d)(\d*)\.(\d*)\\dot\s*\{?\s*(\d)\s*\}?"), r"\1.\2(\3)"),
    (re.compile(r"\s+"), " "),
]


def _command(match: re.Match) -> str:
    name, sign = match.groups()
    if name is None:
        if sign in ",;:> ":
            return " "
        return "" if sign in "!()[]" else DOLLAR if sign == "$" else sign if sign in "%#_&" else match[0]
    name = _ALIASES.get(name, name)
    if name in _DROPPED:
        return ""
    return _SIGN_OF.get(name) or f"\\{name} "


@lru_cache(8192)
def fold(text: str) -> str:
    """The text in the dialect that `tokens` reads. Linear in the text."""
    text = _THIN.sub("", _NO_SPACE.sub(",", without_unicode(text).replace("\\$", DOLLAR)))
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    text = _COMMAND.sub(_command, text)
    if "$" in text:
        if text.count("$") % 2:  # one is money, or a slip
            text = re.sub(r"\$(?=\s*\d)", DOLLAR, text, count=1)
        text = text.replace("$", " " if "$$" not in text else "")
    for pattern, replacement in _AFTER:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text[-1:] in (".", ",", ";", ":") and not text.endswith("\\" + text[-1]):
        text = text[:-1].rstrip()
    return text


# --------------------------------------------------------------------------------------------------------------- tokens


class Token(NamedTuple):
    """kind: num, letter, bold, word, text, cmd, sign. `space`: whether one stands before it."""

    kind: str
    text: str
    space: bool


FUNCTIONS = set(
    names(
        "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp sqrt max min gcd lcm abs floor ceil"
    )
)
PLAIN_COMMANDS = {
    **{name: name for name in [*FUNCTIONS, *GREEK.values(), "infty"]},
    "inf": "infty",
    "infinity": "infty",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
}
_TEXTS = names("text mbox hbox textrm textnormal textsf texttt")
_FONTS = names("mathrm operatorname mathit mathsf mathbf textbf textit boldsymbol bm pmb mathcal emph rm")
_TOKEN = re.compile(
    rf"""(?P<space>\s*)(?:
    \\(?P<group>{"|".join(_TEXTS + _FONTS)})\*?(?:\s*\{{(?P<content>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|\s+(?P<bare>[A-Za-z]))
    |(?P<num>\d+(?:\.\d*)?\(\d+\)(?=[^\d]|$)|\.\d+\(\d+\)|(?:\d+\.\d+|\d+\.(?!\d)|\d+|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)
    |\\(?P<cmd>[a-zA-Z]+)\s?
    |(?P<word>[A-Za-z]{{2,}})|(?P<letter>[A-Za-z])
    |(?P<sign>\\.|'+|[^\s])
    )""",
    re.VERBOSE | re.DOTALL,
)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d{1,3}(?: \d{3})+(?![\d/]| \d)")


def ungroup(text: str) -> str:
    """A folded text with the separators of thousands gone, where they stand in no bracket: a bracket may hold a list."""
    if not _GROUPED.search(text):
        return text
    out, depth, i = [], 0, 0
    while i < len(text):
        c = text[i]
        if text.startswith(("\\{", "\\}"), i):
            depth += 1 if text[i + 1] == "{" else -1
            out.append(text[i : i + 2])
            i += 2
            continue
        depth += (c in "([") - (c in ")]")
        match = _GROUPED.match(text, i) if c.isdigit() and depth <= 0 else None
        if match and not text[:i].endswith(tuple("0123456789.,_^")):
            out.append(re.sub("[, ]", "", match[0]))
            i = match.end()
            continue
        if c.isdigit():
            j = i
            while j < len(text) and text[j].isdigit():
                j += 1
            out.append(text[i:j])
            i = j
            continue
        out.append(c)
        i += 1
    return "".join(out)


def tokens(folded: str) -> list[Token]:
    """The tokens of a folded text."""
    out: list[Token] = []
    _tokens(folded, out, 0)
    return out


def _tokens(text: str, out: list[Token], depth: int) -> None:
    end, ends = 0, len(text.rstrip())
    while end < ends:
        match = _TOKEN.match(text, end)
        if match is None:
            raise Unreadable(text[end : end + 20])
        end = match.end()
        space = bool(match["space"])
        if match["group"]:
            _group(match["group"], match["content"] if match["bare"] is None else match["bare"], space, out, depth)
        elif match["num"]:
            out.append(Token("num", match["num"], space))
        elif match["cmd"]:
            out.append(Token("cmd", match["cmd"], space))
        elif match["word"]:
            word = match["word"]
            known = PLAIN_COMMANDS.get(word) or (
                PLAIN_COMMANDS.get(word.lower()) if word.istitle() and word != "Pi" else None
            )
            known = known if (word not in _GREEK_WORDS or word in _PLAIN_GREEK) and not _is_time(word, out) else None
            out.append(Token("cmd", known, space) if known else Token("word", word, space))
        elif match["letter"]:
            out.append(Token("letter", match["letter"], space))
        else:
            out.append(Token("sign", match["sign"], space))


def _is_time(word: str, before: list[Token]) -> bool:
    """Whether `min` and `sec` are minutes and seconds: behind a number."""
    return word in ("min", "sec") and bool(before) and before[-1].kind == "num"


_GREEK_WORDS = set(GREEK.values())
_PLAIN_GREEK = set(names("alpha beta gamma delta theta lambda mu pi rho sigma tau phi omega epsilon"))


def _group(name: str, content: str, space: bool, out: list[Token], depth: int) -> None:
    """`\\text{...}` with words in it is one token; else it is what it holds."""
    content = content.strip()
    if depth > 3:
        raise Unreadable(content[:20])
    if content in FUNCTIONS and not _is_time(content, out):
        out.append(Token("cmd", content, space))
        return
    if name in _TEXTS and re.search(r"[A-Za-z]", content) and not re.search(r"[\\_^]", content):
        if re.fullmatch(r"\(?[A-Za-z]\)?\.?|[A-Za-z]?\d+[A-Za-z]?", content):
            kind = "text" if re.fullmatch("[A-Za-z]", content) else ""
            if kind:
                out.append(Token("text", content, space))
                return
        else:
            out.append(Token("text", content, space))
            return
    if re.fullmatch("[A-Za-z]", content) and name in ("mathbf", "textbf", "boldsymbol", "bm", "pmb", "mathcal"):
        out.append(Token("bold", content, space))
        return
    if re.fullmatch("[A-Za-z]", content) and name in ("mathrm", "operatorname", "rm"):
        out.append(Token("roman", content, space))
        return
    if name in _FONTS and re.fullmatch(r"[A-Za-z][A-Za-z .\-]*[A-Za-z.]", content):
        out.append(Token("text", content, space))
        return
    begin = len(out)
    _tokens(content, out, depth + 1)
    if len(out) > begin:
        out[begin] = out[begin]._replace(space=space)


# ------------------------------------------------------------------------------------------------------------- brackets

_OPENING = {"(", "[", "\\{", "{"}
_ENDING = {")", "]", "\\}", "}"}


def trimmed(listed: list[Token]) -> list[Token]:
    """Without braces or brackets of TeX around everything."""
    while len(listed) > 1 and listed[0].text == "{" and closing(listed, 0) == len(listed) - 1:
        listed = listed[1:-1]
    return listed


def closing(listed: Sequence[Token], at: int) -> int:
    """Where the bracket at `at` closes; -1 where it does not."""
    depth = 0
    for i in range(at, len(listed)):
        depth += step(listed[i])
        if depth == 0:
            return i
    return -1


def step(token: Token) -> int:
    if token.kind == "sign":
        return (token.text in _OPENING) - (token.text in _ENDING)
    if token.kind == "cmd":
        return (token.text in ("langle", "lfloor", "lceil")) - (token.text in ("rangle", "rfloor", "rceil"))
    return 0


def exploded(listed: Sequence[Token]) -> list[Token]:
    """Texts cut into words, commas and numbers."""
    out: list[Token] = []
    for token in listed:
        if token.kind != "text" or re.fullmatch(r"[A-Za-z]+", token.text):
            out.append(token)
            continue
        space = token.space
        for piece in re.finditer(r"(\s*)([A-Za-z]+(?:['\-.][A-Za-z]+)*|\d+(?:\.\d+)?|[^\s])", token.text):
            kind = "text" if piece[2][0].isalpha() else "num" if piece[2][0].isdigit() else "sign"
            out.append(Token(kind, piece[2], space or bool(piece[1])))
            space = False
    return out

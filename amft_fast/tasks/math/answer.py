"""The final answer of a response: where it stands.

Nothing here needs a library, and every function is linear in the text, so it is safe on anything a policy may write. Whether
two answers are the same is told in compare.py.
"""

from __future__ import annotations

import re

from amft_fast.tasks.math import units
from amft_fast.tasks.math.kinds import Words
from amft_fast.tasks.math.latex import Unreadable
from amft_fast.tasks.math.reading import read
from amft_fast.tasks.math.signs import names

MAX_RESPONSE = 1 << 18
"""Characters of a response that are read, from its end: an answer stands last."""
MAX_ANSWER = 2000
"""Answers longer than this are wrong unread. The longest gold answer of the benchmarks has 222 characters."""
NEXT_BOX = "\ue002"
"""Between the boxes of one answer: they are a list, or one answer written in two ways."""


def extract(response: str) -> str | None:
    """The final answer as written, or None. Several boxes are joined by commas.

    What counts, in this order: the last outermost `\\boxed{...}` (boxes with nothing but commas, "and" or "or" between them
    are one list); the last `<answer>...</answer>`; `#### x`; what follows the last "answer is" or "answer:", in some other
    languages too; what ends the last line: a formula, a bare value, what follows "=" or "is", or the only number of its
    last sentence, where nothing there takes it back. A text after `</think>` comes before the thoughts. Where the last box is
    cut off, there is no answer.
    """
    found = final_answer(response)
    return found and found.replace(NEXT_BOX, ", ")


def final_answer(response: str) -> str | None:
    """`extract` with NEXT_BOX between boxes, as compare.py takes it."""
    text = response[-MAX_RESPONSE:]
    after = text.rpartition("</think>")[2] if "</think>" in text else ""
    for part in (after, text):
        if not part.strip():
            continue
        boxed, cut = _boxed(part)
        if boxed is not None or cut:
            return (boxed or "").strip() or None
        for find in (_tagged, _hashes, _anchored, _is_the_answer, _last_line):
            found = find(part)
            if found is not None:
                return found.strip() or None
    return None


# ----------------------------------------------------------------------------------------------------------- boxes and marks

_BOX_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)(?![a-zA-Z])[ ]?([+-]?[\w.,/%]*\w%?|\\[a-zA-Z]+)|\\.|[{}]", re.DOTALL
)
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.]|\\[()\[\]]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\}|\\quad|\\,)*")
_GSM8K = re.compile(r"####[ \t]*(.+)")


def _boxed(text: str) -> tuple[str | None, bool]:
    """(what the last box holds, or None; whether the last box is cut off)"""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None, False
    spans: list[tuple[int, int, int]] = []  # start of the command, start and end of the content
    open_braces: list[tuple[int, int] | None] = []
    last = -1
    for token in _BOX_TOKEN.finditer(text):
        word = token[0]
        if token[1]:
            last = token.start()
            spans.append((token.start(), *token.span(1)))
        elif word == "{":
            open_braces.append(None)
        elif word == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while spans and spans[-1][0] > box[0]:
                    spans.pop()  # the inner boxes of this one
                spans.append((box[0], box[1], token.start()))
        elif word[-1] == "{" and len(word) > 2:
            last = token.start()
            open_braces.append((token.start(), token.end()))
    if not spans or (spans[-1][0] < last and not spans[-1][0] <= last < spans[-1][2]):
        return None, last >= 0
    run = [spans.pop()]
    while spans and run[0][0] - spans[-1][2] < 40 and _BETWEEN_BOXES.fullmatch(text, spans[-1][2] + 1, run[0][0]):
        run.insert(0, spans.pop())
    parts = dict.fromkeys(text[start:end].strip() for _, start, end in run)
    return NEXT_BOX.join(part for part in parts if part), False


def _tagged(text: str) -> str | None:
    small = text.lower()
    end = small.rfind("</answer>")
    begin = small.rfind("<answer>", 0, end) if end >= 0 else -1
    return _statement(text[begin + len("<answer>") : end]) if begin >= 0 else None


def _hashes(text: str) -> str | None:
    found = _GSM8K.findall(text)
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------------------------ statements

_FINAL = r"(?:final|correct|right|best|required)"
_ANCHOR = re.compile(
    rf"\b(?:{_FINAL}\s+)?answers?\b[*_`]*\s*(?:is|are|:|=|：|equals|(?:should|must|will|would)\s+be)[*_`]*\s*(?::|therefore\b|thus\b)?"
    r"|(?m:^[#*_>\s✅]*final\s+answer[*_:\s]*$)"
    r"|(?:答案|结果|答)\s*(?:是|为|為|：|:|等于)|答え\s*(?:は|：|:)|(?:정답|답)\s*(?:은|:)"
    r"|\b(?:respuesta|resposta|risposta)(?:\s+(?:final|finale|correcta|correta|corretta))?\s*(?:es\b|é|è|:)"
    r"|\br[ée]ponse(?:\s+(?:finale|correcte))?\s*(?:est\b|:)|\bAntwort\s*(?:ist\b|lautet\b|:)"
    r"|\bответ\s*(?:[:—-]|равен\b)",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"(?:^|[\n.:;,])\s*(?:(?:so|thus|hence|therefore|then)\b,?\s*)?([^\n]{1,80}?)\s+(?:is|are)\s+(?:the|our|my)\s+"
    rf"(?:{_FINAL}\s+)?answers?\b",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$((?:\\\$|[^$\n])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(
    r"(?<!\\)\.(?=[\s*_`]|$)|(?<![\w)\]}!\\])!(?=\s|$)|。|！|です|입니다"
    r"|,?\s(?:because|since|as|so|which|where|thus|hence|therefore)\s|\s\((?:since|because|as)\s"
)
_PICTURES = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\ufe0f]")
_MARKDOWN = " \t\n*_`"
_HEADING = re.compile(r"\A\s*(?:[>#]+\s+)+")


def _anchored(text: str) -> str | None:
    ends = [match.end() for match in _ANCHOR.finditer(text)]
    return _statement(text[ends[-1] : ends[-1] + MAX_ANSWER]) if ends else None


def _is_the_answer(text: str) -> str | None:
    found = _IS_THE_ANSWER.findall(text[-MAX_ANSWER:])
    return _unmarked(found[-1]) if found else None


def _statement(rest: str) -> str | None:
    """What the first sentence of `rest` states: a formula, a value, with the words that belong to it."""
    rest = _unmarked(_PICTURES.sub("", rest).strip(_MARKDOWN + ":："))
    math = _MATH.match(rest)
    if math:
        tail = _SENTENCE_END.split(rest[math.end() :].split("\n", 1)[0], maxsplit=1)[0].rstrip(_MARKDOWN + ".,;!")
        gap, tail = (" " if tail[:1] in " *_`" else ""), tail.lstrip(_MARKDOWN)
        return f"${_inner(math)}${gap}{tail}" if tail else _inner(math)
    line = _SENTENCE_END.split(rest.split("\n", 1)[0], maxsplit=1)[0].strip(_MARKDOWN).rstrip(".,;: ")
    return line.strip(_MARKDOWN) or None


def _unmarked(text: str) -> str:
    """Without the signs of Markdown around it: emphasis, code, a heading, a quotation."""
    return _HEADING.sub("", text.strip(_MARKDOWN)).strip(_MARKDOWN)


def _inner(match: re.Match) -> str:
    return next(g for g in match.groups() if g is not None).strip()


# --------------------------------------------------------------------------------------------------------- the last line

_TAKEN_BACK = re.compile(
    r"\b(?:not|no|never|cannot|wrong|incorrect|false|between|least|most|than|about|approx|approximately|roughly|nearly|almost|"
    r"around|or|either|neither|if|unless|suppose|assume|assuming|maybe|perhaps|possibly|probably|might|could|would|should|"
    r"guess|up to|over|under|every|each|instead|except|but|without|until|before|after|doubt|whether|when|twice|double|triple|"
    r"half|thirds?|quarters?|plus|minus|times|divided|multiplied|squared|cubed)\b|n't\b|\?",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"(?:\bis|\bare|\bequals|\bbe|=|:|\bget|\bgets|\bgives|\bhave|\bhas|\bobtain|\bfind)[\s*_]*$", re.IGNORECASE
)
_CLOSING = re.compile(r".*\b(?:is|are|equals)\b\s+(?:therefore |thus |then |equal to |simply |just )?(.+)", re.DOTALL)
_IS_CORRECT = re.compile(r"(?:^|\s)\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right)(?:\s+(?:one|option|choice))?$")
_WORD = re.compile(r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|log|ln|sqrt|pi)\b)[A-Za-z]{2,}[:,]?\s")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.,/^=+*<>~≈-])[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?(?![\w/^=+*]|[.,]\d)"
)
_ITEM_BEFORE = re.compile(
    r"\b(?:step|case|part|question|problem|exercise|figure|fig|page|chapter|section|equation|eq|method|option|line|line number|"
    r"number|no|day|week|round|level|example|theorem|lemma|table|grade|year|version|row|column|term)\s*#?$",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"(?<=[.!?。])\s+(?=[^\s])")


def _last_line(text: str) -> str | None:
    lines = [line for line in text.rstrip()[-MAX_ANSWER:].split("\n") if line.strip(_MARKDOWN)]
    if not lines:
        return None
    line = _SENTENCES.split(lines[-1].strip())[-1]
    line = _unmarked(_unmarked(line).rstrip(".,;:。 "))
    maths = list(_MATH.finditer(line))
    if maths:
        before, after = line[: maths[-1].start()], line[maths[-1].end() :].strip(" .*!")
        if len(maths) > 1 and not _LEADS.search(before):
            run = line[maths[0].start() :]
            joined = re.fullmatch(r"(?:,|and|or|\s)*", _MATH.sub("", run))
            return _unless_taken_back(line[: maths[0].start()], run) if joined else None
        if not after:
            return _unless_taken_back(before[maths[-2].end() :] if len(maths) > 1 else before, _inner(maths[-1]))
    elif len(line) < 60 and _has_value(line):
        return line
    named = _IS_CORRECT.search(line)
    if named:
        return named[1]
    if "=" in line and not maths:
        begin = max((m.end() for m in _WORD.finditer(line[: line.index("=")])), default=0)
        return _unless_taken_back(line[:begin], line[begin:].lstrip("= "))
    closing = _CLOSING.fullmatch(line[-200:]) if not maths else None
    if closing and _has_value(closing[1]):
        return closing[1]
    only = _only_number(line) if not maths else None
    return only or (closing[1] if closing else None)


def _unless_taken_back(before: str, found: str) -> str | None:
    return None if _TAKEN_BACK.search(before) else found


def _has_value(text: str) -> bool:
    """Whether a text is a number, a formula, a list and so on, rather than words."""
    try:
        values = read(text, False).values
    except Unreadable:
        return False
    return any(not isinstance(v, Words) for v in values) or choice(text) is not None


_AFTER_NUMBER = set(
    names("in on at now today altogether total left from for with there because since as again together overall during")
)


def _only_number(sentence: str) -> str | None:
    """The one number of a sentence that does not take it back, with the unit behind it: "Sam has 13 red apples now."."""
    found = list(_NUMBER_IN_TEXT.finditer(sentence))
    if len(found) != 1 or len(re.findall(r"\d+(?:[.,]\d+)*", sentence)) != 1 + ("/" in found[0][0]):
        return None
    if _TAKEN_BACK.search(sentence) or _ITEM_BEFORE.search(sentence[: found[0].start()].rstrip(" (")):
        return None
    number, rest = found[0][0], sentence[found[0].end() :]
    if not re.match(r"\s+[A-Za-z]", rest):
        return None if rest.lstrip()[:1] in tuple("([{\\") else number
    words = re.findall(r"[A-Za-z]+", rest)
    for n in (3, 2, 1):
        if units.parse(" ".join(words[:n])) is not None:
            return f"{number} {' '.join(words[:n])}"
    if words[0].lower() in units.MAGNITUDES:
        return f"{number} {words[0]}"
    return number if words[0].lower() in _AFTER_NUMBER else None


# --------------------------------------------------------------------------------------------------------------- choices

CHOICE = re.compile(r"\(?([A-J])\)?[.:]?")
_CHOICE_WITH_TEXT = re.compile(r"\(?([A-J])(?:\)|[.:])[.:]?\s*(\S.*)", re.DOTALL)
_OPTION = re.compile(r"(?:the\s+)?(?:option|choice|answer|letter)s?\s+(?=\(?[A-J]\b)", re.IGNORECASE)
_WRAPPER = re.compile(
    r"\\(?:text|mbox|textbf|textrm|textit|mathbf|mathrm|mathit|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
_OTHER_LETTER = re.compile(
    r"(?<![A-Za-z\\])([A-J])(?:\)|[.:,]|\s+(?:and|or|is|are|was|not|instead|too|also|both|seems|looks|may|might|could)\b|$)"
)


def unwrapped(text: str) -> str:
    """A text without `\\text{...}` and its like around parts of it."""
    return _WRAPPER.sub(r"\1", text)


def choice(answer: str) -> str | None:
    """The letter A to J that an answer to a multiple choice names: `C`, `(C)`, `C.`, `\\text{C}`, `C) Days become shorter`."""
    text = unwrapped(answer.replace("$", "").strip(_MARKDOWN))
    text = re.sub(r"\\(?:left|right|displaystyle|textstyle)(?![a-zA-Z])|\\[()\[\]]", "", text)
    text = re.sub(r"\\[ ,;:!]|~|\\q?quad(?![a-zA-Z])|[{}]", " ", text).strip(_MARKDOWN)
    text = re.sub(r"\(\s*([A-J])\s*\)", r"(\1)", _OPTION.sub("", text, count=1))
    match = CHOICE.fullmatch(text)
    if match:
        return match[1]
    match = _CHOICE_WITH_TEXT.fullmatch(text)
    if match is None or not set(_OTHER_LETTER.findall(match[2])) <= {match[1]}:
        return None
    return match[1]

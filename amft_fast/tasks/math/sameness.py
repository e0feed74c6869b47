"""When two texts are the same problem: strictly, for duplicates, and loosely, to keep evaluation problems out of training.

A problem taken for another is lost, so duplicates are the same text but for how it is spaced and set. A benchmark's problem
that is trained on spoils the benchmark, so there case and punctuation do not count, and a part in common is enough.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from hashlib import blake2b

# Between these and their neighbours a space changes nothing; one on a single side of a sign may (3 -2 is no difference).
_LOOSE = re.compile(r"\s+([^\w\s\\,'\"])\s+")
_DELIMITERS = re.compile(r"\$+|(?<!\\)\\[()\[\]]")
_PROSE = re.compile(r"[\"'(]*([^\W\d_]{2,})[\"')]*[.,;:?!]*")
_QUOTES = "'\"“”‘’"


def digest(text: str) -> str:
    """16 hex digits that hang on the text alone."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def problem_key(problem: str) -> str:
    """The identity of a problem: the same for two texts that differ in spacing, in the dollars around formulas, in the case
    of words (not of names in formulas, nor of single letters) or in the last full stop or question mark."""
    text = unicodedata.normalize("NFC", problem)
    formula, parts, at = False, [], 0
    for mark in _DELIMITERS.finditer(text):
        parts.append(text[at : mark.start()] if formula else _folded(text[at : mark.start()]))
        formula, at = not formula, mark.end()
    parts.append(text[at:] if formula else _folded(text[at:]))
    joined = " ".join("".join(parts).split()).rstrip(" .?")
    while joined != (joined := _LOOSE.sub(r"\1", joined)):
        pass
    return digest(joined)


def _folded(prose: str) -> str:
    return re.sub(r"\S+", lambda word: _fold(word[0]), prose)


def _fold(word: str) -> str:
    """A word without case, if it is one: capitalised, or of four letters or more."""
    found = _PROSE.fullmatch(word)
    return word.casefold() if found and (len(found[1]) > 3 or found[1][1:].islower()) else word


def words(text: str) -> list[str]:
    """The words of a problem without case, dollars and the punctuation around them; what stands within a word stays."""
    bare = (_DELIMITERS.sub("", word).lstrip(_QUOTES).rstrip(_QUOTES + ".,;:?") for word in text.casefold().split())
    return [word for word in bare if word]


class Fingerprints:
    """Evaluation problems, to be kept out of training: found again as a whole, or by any 13 words in a row."""

    N = 13

    def __init__(self) -> None:
        self.names: list[str] = []
        self.taken: Counter[str] = Counter()
        self._in: dict[int, int] = {}  # digest of a text or of 13 words -> the sets it stands in, a bit each

    def add(self, problem: str, name: str = "") -> None:
        """A problem of the set `name`."""
        if name not in self.names:
            self.names.append(name)
        bit = 1 << self.names.index(name)
        for key in self._keys(problem):
            self._in[key] = self._in.get(key, 0) | bit

    def overlap(self, problem: str) -> list[str]:
        """The sets that hold the problem, or one that shares 13 words in a row with it."""
        found = 0
        for key in self._keys(problem):
            found |= self._in.get(key, 0)
        return [name for i, name in enumerate(self.names) if found >> i & 1]

    def _keys(self, problem: str) -> list[int]:
        w = words(problem)
        rows = (" ".join(w[i : i + self.N]) for i in range(len(w) - self.N + 1))
        return [int(digest(key), 16) for key in ("".join(w) + "\n", *rows)]

"""From rows to problems that can be trained on: what is unusable is counted and named, the rest lies on disk, by splits.

The demonstrations of a training set are gigabytes: they are streamed once into a temporary file and read back one at a time.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, overload

from amft_fast.errors import UserError
from amft_fast.tasks.math.answer import extract, plain_verdict
from amft_fast.tasks.math.sources import LAYOUTS, BadRow, Fingerprints, Row, Source, problem_key, read_row

CountTokens = Callable[[list[str]], list[int]]
EXAMPLES = 5


@dataclass(frozen=True)
class Problem:
    """One problem of a split. `id` hangs on its text alone."""

    id: str
    problem: str
    answer: str
    response: str | None = None
    system: str | None = None
    choices: bool = False


@dataclass(frozen=True)
class Limits:
    """What makes a row over-long: tokens of problem and demonstration, by `count` (characters / 3 without a tokenizer)."""

    problem: int = 1024
    response: int = 8192
    count: CountTokens = lambda texts: [len(t) // 3 for t in texts]


@dataclass
class Tally:
    """What became of the rows of a data set: how many were read and kept, and why others were not, with the first places."""

    name: str
    rows: int = 0
    kept: int = 0
    demos: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, why: str = "") -> None:
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(f"{place}{': ' + why if why else ''}")

    def lines(self) -> list[str]:
        """The tally as text: one line, and one for each kind of unused row with the first places."""
        out = [f"{self.name}: {self.rows:,} rows, {self.kept:,} problems used, {self.demos:,} with a demonstration"]
        for kind, n in self.counts.most_common():
            more = ", ..." if n > len(self.examples[kind]) else ""
            out.append(f"  {kind}: {n:,} ({'; '.join(self.examples[kind])}{more})")
        return out


class Store(Sequence):
    """Problems in a temporary file, read back by index; the file goes when the store does. Safe to read from threads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="amft-math-")  # noqa: SIM115 (lives as long as the store)
        self._ends = array("Q", [0])
        self.with_demo: list[int] = []

    def append(self, problem: Problem) -> None:
        data = json.dumps(vars(problem), ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._file.write(data)
        if problem.response is not None:
            self.with_demo.append(len(self))
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Problem:
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self._ends[i], self._ends[i + 1]
        self._file.flush()
        return Problem(**json.loads(os.pread(self._file.fileno(), end - begin, begin).decode("utf-8", "surrogatepass")))


class View(Sequence):
    """`make` of the store's problems at `indices`, made when asked for."""

    def __init__(self, store: Store, indices: Sequence[int], make: Callable[[Problem], Any]) -> None:
        self._store, self._indices, self._make = store, indices, make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> View: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return View(self._store, self._indices[i], self._make)
        return self._make(self._store[self._indices[i]])


def load(
    name: str,
    sources: Sequence[Source],
    store_of: Callable[[str], Store | None],
    *,
    columns: dict[str, str] | None = None,
    keep: dict[str, Any] | None = None,
    limits: Limits | None = None,
    forbidden: Fingerprints | None = None,
    max_problems: int | None = None,
) -> Tally:
    """Reads `sources` once, front to back, into the stores that `store_of(problem id)` names (None: left out by the split).

    Rows are left out and tallied when they are malformed, empty, over-long, seen before, or overlap with `forbidden`. `keep`
    gives values of columns that rows must have, others are passed over uncounted. Raises UserError when no row is usable.
    """
    tally, seen, limits = Tally(name), set(), limits or Limits()
    first_bad = ""
    for batch in _batches(_usable(sources, columns or {}, keep or {}, tally), 256):
        problem_tokens = limits.count([row.problem for _, row in batch])
        response_tokens = limits.count([row.response or "" for _, row in batch])
        for (place, row), n_problem, n_response in zip(batch, problem_tokens, response_tokens):
            if n_problem > limits.problem:
                tally.add("over-long problem", place, f"{n_problem} tokens")
                continue
            key = problem_key(row.problem)
            if key in seen:
                tally.add("duplicate", place)
                continue
            seen.add(key)
            if forbidden is not None and forbidden.overlap(row.problem):
                tally.add("also in an evaluation set", place)
                continue
            response = row.response
            if response is not None and n_response > limits.response:
                tally.add("over-long demonstration (the problem is used without it)", place, f"{n_response} tokens")
                response = None
            if max_problems is not None and tally.kept >= max_problems:
                return tally
            store = store_of(key)
            if store is not None:
                store.append(Problem(f"math/{key}", row.problem, row.answer, response, row.system, row.choices))
                tally.kept += 1
                tally.demos += response is not None
    if not tally.kept:
        kinds = ", ".join(f"{n} {kind}" for kind, n in tally.counts.items()) or "none had the values asked for"
        first_bad = next((e[0] for e in tally.examples.values()), "")
        raise UserError(
            f"{name}: no usable row among the {tally.rows} of {', '.join(s.text for s in sources)} ({kinds}); looked for "
            f"{_looked_for(columns)}{'; the first: ' + first_bad if first_bad else ''}"
        )
    return tally


def _looked_for(columns: dict[str, str] | None) -> str:
    if columns:
        return "the columns " + ", ".join(f"{name} ({role})" for role, name in columns.items())
    return f"one of the layouts {LAYOUTS}; another is mapped with columns = {{problem = ..., answer = ...}}"


def _usable(
    sources: Sequence[Source], columns: dict[str, str], keep: dict[str, Any], tally: Tally
) -> Iterator[tuple[str, Row]]:
    """The rows that can be read and have a problem and an answer."""
    for source in sources:
        for place, raw in source.rows():
            if isinstance(raw, dict) and any(raw.get(name) != value for name, value in keep.items()):
                continue
            tally.rows += 1
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = read_row(raw, columns)
            except BadRow as e:
                tally.add("malformed", place, str(e))
                continue
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                tally.add("malformed", place, f"{type(e).__name__}: {e}"[:200])
                continue
            empty = next((what for what in ("problem", "answer") if not getattr(row, what).strip()), None)
            if empty:
                tally.add("empty", place, f"no {empty}")
                continue
            bad_demo = _bad_demo(row)
            if bad_demo:
                tally.add(f"{bad_demo} (the problem is used without it)", place)
                row = replace(row, response=None)
            yield place, row


def _bad_demo(row: Row) -> str:
    """What is wrong with a demonstration; empty when nothing is, or there is none."""
    if row.response is None:
        return ""
    if not row.response.strip():
        return "empty demonstration"
    found = extract(row.response) if "\\boxed" in row.response else None
    wrong = found is not None and plain_verdict(found, row.answer) is False
    return "demonstration with another answer" if wrong else ""


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch

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
from typing import Any, Literal, overload

from amft_fast.errors import UserError, shown
from amft_fast.tasks.math.compare import plain_verdict
from amft_fast.tasks.math.golds import agrees, gold_fault
from amft_fast.tasks.math.layouts import LAYOUTS, Row, read_row
from amft_fast.tasks.math.sameness import Fingerprints, problem_key
from amft_fast.tasks.math.sources import BadRow, Source, first_line

CountTokens = Callable[[list[str]], list[int]]
Needed = Literal["gold", "something to learn", "nothing"]
EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Problem(Row):
    """One problem of a split: a row with an `id` that hangs on its text alone, and the `place` where it was read."""

    id: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Limits:
    """What makes a row over-long: tokens of problem and demonstration, by `count` (characters / 3 without a tokenizer).

    `context` is what the model holds in all, of which prompts take `scaffold` tokens beside the problem, and sampled answers
    `answer`.
    """

    problem: int = 1024
    response: int = 8192
    count: CountTokens = field(default=lambda texts: [len(t) // 3 for t in texts])
    context: int | None = None
    scaffold: int = 0
    answer: int = 0

    def room(self, problem: int) -> int | None:
        """The tokens left for an answer behind a problem of so many; None where nothing is known to bound them."""
        return None if self.context is None else self.context - self.scaffold - problem


@dataclass
class Tally:
    """What became of the rows of a data set: how many were read and kept, and why others were not, with the first places."""

    name: str
    rows: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kept: int = 0
    demos: int = 0
    no_gold: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, place: str, why: str = "") -> None:
        self.counts[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append(f"{place}{': ' + why if why else ''}")

    def lines(self) -> list[str]:
        """The tally as text: one line, and one for each kind of unused row with the first places."""
        out = [f"{self.name}: {self.rows:,} rows, {self.kept:,} problems used, {self.demos:,} with a demonstration"]
        if self.no_gold:
            out[0] += f", {self.no_gold:,} without a gold answer (to imitate only)"
        for kind, n in self.counts.most_common():
            more = ", ..." if n > len(self.examples[kind]) else ""
            out.append(f"  {kind}: {n:,} ({'; '.join(self.examples[kind])}{more})")
        return out + self.notes


class Store(Sequence):
    """Problems in a temporary file, read back by index; the file goes when the store does. Safe to read from threads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="amft-math-")  # noqa: SIM115 (lives as long as the store)
        self._ends = array("Q", [0])
        self.with_demo: list[int] = []
        self.with_answer: list[int] = []

    def append(self, problem: Problem) -> None:
        data = json.dumps(vars(problem), ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._file.write(data)
        if problem.response is not None:
            self.with_demo.append(len(self))
        if problem.answer is not None:
            self.with_answer.append(len(self))
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Problem:
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self._ends[i], self._ends[i + 1]
        self._file.flush()
        found = json.loads(os.pread(self._file.fileno(), end - begin, begin).decode("utf-8", "surrogatepass"))
        return Problem(**found | {"history": tuple(map(tuple, found["history"]))})


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
    drop_forbidden: bool = True,
    needed: Needed = "something to learn",
    max_problems: int | None = None,
) -> Tally:
    """Reads `sources` once, front to back, into the stores that `store_of(problem id)` names (None: left out by the split).

    Rows are left out and tallied when they are malformed, empty, over-long, seen before, or overlap with `forbidden` (with
    `drop_forbidden` false these are counted only). `keep` gives values of columns that rows must have, others are passed over
    uncounted. Rows that lack what is `needed` beside a problem are left out, too. Raises UserError when no row is usable.
    """
    tally, limits = Tally(name), limits or Limits()
    seen: dict[str, tuple[Store, int] | None] = {}  # where each problem is kept; None for one that was left out
    for place, row in _fitting(_usable(sources, columns or {}, keep or {}, needed, tally), limits, tally):
        if row.answer is None and needed == "gold":
            tally.add("no gold answer", place)
            continue
        key = problem_key(row.asked)
        if key in seen:
            first = seen[key] and seen[key][0][seen[key][1]]
            tally.add(*_duplicate(first, row, place))
            continue
        seen[key] = None
        sets = forbidden.overlap(row.asked) if forbidden is not None else []
        if sets:
            forbidden.taken.update(sets)
            if drop_forbidden:
                tally.add("also in an evaluation set", place, ", ".join(sets))
                continue
        if max_problems is not None and tally.kept >= max_problems:
            break
        store = store_of(key)
        if store is not None:
            seen[key] = store, len(store)
            store.append(Problem(id=f"math/{key}", place=place, **vars(row)))
            tally.kept += 1
            tally.demos += row.response is not None
            tally.no_gold += row.answer is None
    if not tally.kept:
        kinds = ", ".join(f"{n} {kind}" for kind, n in tally.counts.items()) or "none had the values asked for"
        first_bad = next((e[0] for e in tally.examples.values()), "")
        raise UserError(
            f"{name}: no usable row among the {tally.rows} of {', '.join(s.text for s in sources)[:500]} ({kinds}); "
            f"looked for {_looked_for(columns)}{'; the first: ' + first_bad if first_bad else ''}"
        )
    if forbidden is not None and forbidden.names:
        taken = ", ".join(f"{name} {forbidden.taken[name]:,}" for name in forbidden.names)
        what = "left out" if drop_forbidden else "kept, as task.math.drop_overlap is false"
        tally.notes.append(f"  problems that are in an evaluation set too, {what}, by set: {taken}")
    return tally


def _duplicate(first: Problem | None, row: Row, place: str) -> tuple[str, str, str]:
    """How a row is tallied whose problem was read before, as `first` where that was kept."""
    if first is None or None in (first.answer, row.answer) or first.answer == row.answer:
        return "duplicate", place, f"of {first.place}" if first else ""
    if plain_verdict(row.answer, first.answer):
        return "duplicate", place, f"of {first.place}"
    golds = f"{shown(row.answer, 40)} here, {shown(first.answer, 40)} at {first.place}"
    return "duplicate with another gold answer (the first is used)", place, golds


def _fitting(rows: Iterator[tuple[str, Row]], limits: Limits, tally: Tally) -> Iterator[tuple[str, Row]]:
    """The rows that are not over-long; demonstrations that are, are taken off theirs."""
    for batch in _batches(rows, 256):
        problem_tokens = limits.count([row.asked for _, row in batch])
        response_tokens = limits.count([row.response or "" for _, row in batch])
        for (place, row), n_problem, n_response in zip(batch, problem_tokens, response_tokens):
            room = limits.room(n_problem)
            if n_problem > limits.problem:
                tally.add("over-long problem", place, f"{n_problem} tokens")
                continue
            if room is not None and room < limits.answer:
                why = f"a problem of {n_problem} tokens leaves {max(room, 0)} of {limits.context} for an answer"
                tally.add("problem too long for the model's context", place, why)
                continue
            long = ""
            if row.response is not None and n_response > limits.response:
                long = "over-long demonstration"
            elif row.response is not None and room is not None and n_response > room:
                long = "demonstration too long for the model's context"
            if long:
                rest = " (the problem is used without it)" if row.answer is not None else ""
                tally.add(f"{long}{rest}", place, f"{n_response} tokens")
                if row.answer is None:
                    continue
                row = replace(row, response=None)
            yield place, row


def _looked_for(columns: dict[str, str] | None) -> str:
    if columns:
        return "the columns " + ", ".join(f"{name} ({role})" for role, name in columns.items())
    return f"one of the layouts {LAYOUTS}; another is mapped with columns = {{problem = ..., answer = ...}}"


def _usable(
    sources: Sequence[Source], columns: dict[str, str], keep: dict[str, Any], needed: Needed, tally: Tally
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
                row = read_row(raw, columns, bare=needed == "nothing")
            except (BadRow, KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as e:
                tally.add("malformed", place, str(e) if isinstance(e, BadRow) else first_line(e))
                continue
            texts = {"problem": row.problem, "answer": "-" if row.answer is None else row.answer}
            empty = next((what for what, text in texts.items() if not text.strip()), None)
            if empty:
                tally.add("empty", place, f"no {empty}")
                continue
            fault = gold_fault(row.answer) if row.answer is not None and needed != "nothing" else ""
            if fault:
                tally.add(fault, place, row.answer[:80])
                continue
            bad_demo = _bad_demo(row)
            if bad_demo and row.answer is None:
                tally.add(bad_demo, place)
                continue
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
    boxed = row.answer is not None and ("\\boxed" in row.response or "\\fbox" in row.response)
    return "demonstration with another answer" if boxed and not agrees(row.response, row.answer) else ""


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch

"""Reads a run's folder back: what metrics.py and run.py wrote, as plain lists. Imports no torch."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amft_fast.errors import UserError

# Keys of a line of evals.jsonl that are not splits.
_NOT_SPLITS = ("step", "at", "tokens", "wall_s", "full")


def finite(value: Any) -> float | None:
    """`value` as a float when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


@dataclass
class Record:
    """One run as its files tell it. `damaged` names each file that held what could not be read, with the number of lines."""

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    eval_samples: list[dict[str, Any]] = field(default_factory=list)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Steps finished, the warm-up's included."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def planned(self) -> int | None:
        """Steps the config asks for, the warm-up's included; None when it gives a budget of tokens instead."""
        steps = finite(self.setting("train.steps"))
        if steps is None or self.setting("train.token_budget") is not None:
            return None
        return int(steps + (finite(self.setting("train.warmup_steps")) or 0))

    @property
    def finished(self) -> bool:
        """Whether summary.json is of the run as configured: after a resume with more steps it is of the earlier one."""
        budget = finite(self.setting("train.token_budget"))
        reached, wanted = ("steps", self.planned) if budget is None else ("tokens", budget)
        return bool(self.summary) and (finite(self.summary.get(reached)) or 0) >= (wanted or 0)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up that are on record."""
        return sum(m.get("phase") == "warmup" for m in self.metrics)

    @property
    def wall_s(self) -> float | None:
        """Seconds of work: from the summary, or from the steps (evaluations in between and all) when there is none."""
        if self.finished:
            return finite(self.summary.get("wall_s"))
        seconds = [finite(m.get(k)) or 0.0 for m in self.metrics for k in ("seconds", "time/eval", "time/checkpoint")]
        walls = [finite(e.get("wall_s")) or 0.0 for e in self.evals]
        return max([sum(seconds), *walls]) or None

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, as the trainer counts them."""
        known = finite(self.summary.get("tokens")) if self.finished else None
        return int(sum(finite(m.get("tokens")) or 0 for m in self.metrics) if known is None else known)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the resolved config by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a field, over the steps that have it; None where the value was not finite."""
        rows = [m for m in self.metrics if name in m]
        return [m["step"] for m in rows], [finite(m[name]) for m in rows]

    def last(self, name: str) -> float | None:
        """The newest finite value of a field."""
        return next((y for y in reversed(self.series(name)[1]) if y is not None), None)

    def fields(self, prefix: str) -> list[str]:
        """Names of the fields that start with `prefix` and have a finite value somewhere, in order of appearance."""
        names = dict.fromkeys(name for m in self.metrics for name in m if name.startswith(prefix))
        return [name for name in names if self.last(name) is not None]

    def splits(self) -> list[str]:
        """The splits that were evaluated, in order of appearance."""
        return list(dict.fromkeys(s for e in self.evals for s in splits_of(e)))

    def ends(self) -> tuple[dict[str, dict], dict[str, dict], dict[str, Any] | None]:
        """Results per split at the start and at the end, and the evaluation the latter come from (None: from the summary).

        An unfinished run ends at its newest evaluation after the start.
        """
        start = next((e for e in self.evals if e["at"] == 0), None)
        first = splits_of(start) if start else {}
        if self.finished:
            return splits_of(self.summary.get("start")) or first, splits_of(self.summary.get("end")), None
        later = [e for e in self.evals if e["at"] > 0]
        return first, splits_of(later[-1]) if later else {}, later[-1] if later else None

    def after_warmup(self) -> dict[str, dict]:
        """Results per split of the whole evaluation after the warm-up, where there was one."""
        found = (e for e in self.evals if e.get("full") and e["at"] == self.warmup and self.warmup > 0)
        return splits_of(next(found, None))


def splits_of(row: Any) -> dict[str, dict[str, Any]]:
    """The part of an evaluation that is results by split."""
    if not isinstance(row, dict):
        return {}
    return {k: v for k, v in row.items() if k not in _NOT_SPLITS and isinstance(v, dict) and "sampled" in v}


def read(folder: Path) -> Record:
    """The run in `folder`. Raises UserError when there is no such folder or no metrics.jsonl in it; what is damaged is
    left out and counted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{str(folder)!r} is not the folder of a run: it has no metrics.jsonl")
    record = head(folder)
    record.metrics = _lines(record, "metrics.jsonl", "step", unique=True)
    record.evals = _lines(record, "evals.jsonl", "at", unique=True)
    record.samples = _lines(record, "samples.jsonl", "step", unique=False)
    record.eval_samples = _lines(record, "eval_samples.jsonl", "at", unique=False)
    return record


def head(folder: Path) -> Record:
    """The run without its rows: settings, environment, summary."""
    record = Record(folder)
    record.environment, record.summary = _object(record, "environment.json"), _object(record, "summary.json")
    record.config_text = _text(record, "config.toml")
    try:
        record.config = tomllib.loads(record.config_text)
    except tomllib.TOMLDecodeError:
        record.damaged["config.toml"] = 1
    return record


def _text(record: Record, name: str) -> str:
    """The text of a file, empty when there is none."""
    try:
        return (record.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise UserError(f"{str(record.folder / name)!r} cannot be read: {e.strerror}") from None


def _object(record: Record, name: str) -> dict[str, Any]:
    text = _text(record, name)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        record.damaged[name] = 1
        return {}
    return value


def _lines(record: Record, name: str, key: str, unique: bool) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file in the order of their whole number `key`; of equal ones the last when `unique`."""
    out: list[dict[str, Any]] = []
    for line in _text(record, name).split("\n"):
        if not line.strip():
            continue
        row = row_of(line, key)
        if row is None:
            record.damaged[name] = record.damaged.get(name, 0) + 1
        else:
            out.append(row)
    if unique:
        out = list({row[key]: row for row in out}.values())
    return sorted(out, key=lambda row: row[key])


def row_of(line: str, key: str) -> dict[str, Any] | None:
    """The object of one line; None for what is none with a whole number `key`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get(key)) is int and 0 <= row[key] < 1 << 53 else None

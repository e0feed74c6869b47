"""What `amft-fast watch` knows of a run: its folder's files, read on as they grow. Beside the run or after it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from amft_fast.errors import UserError
from amft_fast.report import reader
from amft_fast.report.reader import finite, row_of, splits_of
from amft_fast.run import lock
from amft_fast.run.progress import Pace, clock_text

KEPT = 500  # steps, for trends and means
SHOWN = ("success", "reward", "entropy", "mu", "tokens_per_s")


class Tail:
    """A JSON-lines file that grows. A resumed run replaces it by one without the lines from there on: then it is read anew."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.at, self.file = 0, None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The rows that are new, and whether they are of a file begun anew. A line that is still being written is left."""
        try:
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                anew = self.file is not None and (stat.st_ino != self.file or stat.st_size < self.at)
                self.file, self.at = stat.st_ino, 0 if anew else self.at
                f.seek(self.at)
                data = f.read()
        except FileNotFoundError:
            return [], False
        except OSError as e:
            raise UserError(f"{str(self.path)!r} cannot be read: {e.strerror}") from None
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        rows = (row_of(line, self.key) for line in whole.decode(errors="replace").split("\n") if line.strip())
        return [row for row in rows if row is not None], anew


class Monitor:
    """A run as it goes. `record.metrics` has the newest steps alone.

    Raises UserError when there is no run in the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no run folder {str(folder)!r}")
        if not any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", lock.FILE)):
            raise UserError(f"{str(folder)!r} is not the folder of a run: it has neither config.toml nor metrics.jsonl")
        self.folder = folder
        self.steps, self.evals = Tail(folder / "metrics.jsonl", "step"), Tail(folder / "evals.jsonl", "at")
        self.samples = Tail(folder / "samples.jsonl", "step")
        self._begin()

    def _begin(self) -> None:
        """As before the first row; settings and summary are read here and when a run goes on or ends."""
        self.record = reader.head(self.folder)
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.alarms: list[tuple[int, str]] = []
        self.sample: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        self.tokens = self.seconds = self.whole_evaluation = 0.0
        self.warmup = finite(self.record.setting("train.warmup_steps")) or 0.0
        self.warmup_tokens = 0.0
        self.pace = Pace(-self.warmup)

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """What is new: ("step" or "eval", its row), in the order in which it was written."""
        running = lock.is_held(self.folder)
        rows, anew = self.steps.read()
        if anew:
            self._begin()
            self.evals.at = self.samples.at = 0
        elif not self.record.config or not running:
            self._read_head()
        new = [("step", row) for row in rows]
        for row in rows:
            self._take_step(row)
        for row in self.evals.read()[0]:
            self.evaluation = row
            new.append(("eval", row))
        for row in self.samples.read()[0]:
            self.sample = row
        self.running = (running is None and not self.record.finished) or bool(running)
        # An evaluation at n comes before the step n.
        return sorted(new, key=lambda pair: pair[1]["step"] + 0.5 if pair[0] == "step" else pair[1]["at"])

    def _read_head(self) -> None:
        record = reader.head(self.folder)
        record.metrics = self.record.metrics
        self.record = record
        if not self.record.metrics:
            self.warmup = finite(record.setting("train.warmup_steps")) or 0.0
            self.pace = Pace(-self.warmup)

    def _take_step(self, row: dict[str, Any]) -> None:
        self.recent.append(row)
        self.record.metrics = list(self.recent)
        tokens = finite(row.get("tokens")) or 0.0
        self.tokens += tokens
        if row.get("phase") == "warmup":
            self.warmup_tokens += tokens
        took = {name: finite(row.get(name)) or 0.0 for name in ("seconds", "time/eval", "time/checkpoint")}
        self.seconds += sum(took.values())
        if row["step"] == 0:  # before it stands an evaluation of everything, as at the end
            self.whole_evaluation = took.pop("time/eval")
            self.pace.evaluation(1, self.whole_evaluation)
        steps, moved = finite(self.record.setting("train.steps")) or 0.0, 1.0
        clock = row["step"] + 1 - self.warmup
        budget = finite(self.record.setting("train.token_budget"))
        if budget is not None and clock > 0:
            left = max(budget - self.warmup_tokens, 1.0)
            clock, moved = steps * (self.tokens - self.warmup_tokens) / left, steps * tokens / left
        self.pace.step(clock, moved, sum(took.values()))
        alarms = row.get("alarms")
        if isinstance(alarms, dict):
            self.alarms += [(row["step"], str(text)) for text in alarms.values()]

    # ------------------------------------------------------------------------------------------------------- what is shown

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        total = self.warmup + (finite(self.record.setting("train.steps")) or 0.0)
        done = self.warmup + self.pace.clock
        return min(max(done / total, 0.0), 1.0) if total else 0.0

    @property
    def done(self) -> str:
        """`12/250` steps; without the total where a budget of tokens decides."""
        planned = self.record.planned
        return f"{self.record.done}/{planned}" if planned else str(self.record.done)

    @property
    def state(self) -> str:
        """running, finished, or stopped."""
        return "running" if self.running else "finished" if self.record.finished else "stopped"

    def eta(self) -> str:
        """What is left, in words; nothing before the first step and after the end."""
        in_warmup = self.pace.clock <= 0
        steps = finite(self.record.setting("train.steps")) or 0.0
        left = self.pace.left(0 if in_warmup else steps, 0 if in_warmup else int(self.whole_evaluation > 0))
        if left is None or not self.running:
            return ""
        return f"warm-up ends in {clock_text(left)}" if in_warmup else f"eta {clock_text(left)}"

    def mean(self, name: str, steps: int = 50) -> float | None:
        """Of a figure over the newest steps."""
        values = [y for y in self.record.series(name)[1][-steps:] if y is not None]
        return sum(values) / len(values) if values else None

    def lines(self, new: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        """New rows as plain lines, with the alarms among them."""
        for kind, row in new:
            if kind == "eval":
                yield f"eval at {row['at']}: " + evaluated(row)
                continue
            figures = ((name, finite(row.get(name))) for name in SHOWN)
            text = " ".join(f"{name} {value:.3g}" for name, value in figures if value is not None)
            planned = f"/{self.record.planned}" if self.record.planned else ""
            # The pace is known as of the newest row alone.
            eta = f"  {self.eta()}" if row is self.recent[-1] and self.eta() else ""
            yield f"step {row['step'] + 1}{planned}  {text}{eta}"
            alarms = row.get("alarms")
            if isinstance(alarms, dict):
                yield from (f"alarm at step {row['step']}: {text}" for text in alarms.values())


def evaluated(row: dict[str, Any]) -> str:
    """Greedy and sampled success of each split of an evaluation."""

    def percent(value: Any) -> str:
        number = finite(value)
        return "–" if number is None else f"{number:.1%}"

    return "  ".join(
        f"{split} {percent(figures.get('greedy'))}/{percent(figures.get('sampled'))}"
        for split, figures in splits_of(row).items()
    )


def trend(values: list[float], width: int) -> str:
    """Values as a row of blocks of different height: the mean of each of `width` stretches."""
    if not values:
        return ""
    n = min(width, len(values))
    edges = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (m - low) / (high - low)) if high > low else 3] for m in means)

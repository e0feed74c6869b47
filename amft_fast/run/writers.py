"""What a run writes while it goes: metrics.jsonl and the like, TensorBoard files, progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from amft_fast.config import Config


def plain(value: Any) -> Any:
    """A JSON value: numbers that are not finite become null, which strict readers can read."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


class JsonLines:
    """An append-only file of JSON objects with a `step`; on resume, lines from the resumed step on are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < resume_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut off by a crash
        aside = path.with_suffix(".part")
        aside.write_text("".join(line + "\n" for line in kept))
        os.replace(aside, path)
        self.file: TextIO = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(plain(record)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars for TensorBoard, or nothing when switched off."""

    def __init__(self, folder: Path, enabled: bool, resume_step: int) -> None:
        self.writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=resume_step or None)

    def write(self, step: int, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Progress:
    """A bar with ETA on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, total: int, start: int, every: int, enabled: bool | None) -> None:
        self.total, self.every, self.begin, self.start = total, every, time.perf_counter(), start
        self.said = -1
        self.bar = None
        if enabled if enabled is not None else sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def step(self, done: int, figures: dict[str, float | None]) -> None:
        """`done` steps are finished; `figures` are shown beside them."""
        text = " ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif done // self.every > self.said or done == self.total:
            self.said = done // self.every
            rate = (time.perf_counter() - self.begin) / max(done - self.start, 1)
            eta = rate * (self.total - done)
            self.say(f"step {done}/{self.total}  {text}  eta {eta // 60:.0f}m{eta % 60:02.0f}s")

    def say(self, text: str) -> None:
        """A line of its own, without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class RunFiles:
    """The files of a run that grow while it goes."""

    def __init__(self, folder: Path, cfg: Config, total: int, resume_step: int) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.metrics: Any = JsonLines(folder / "metrics.jsonl", resume_step)
        self.evals: Any = JsonLines(folder / "evals.jsonl", resume_step)
        self.samples: Any = JsonLines(folder / "samples.jsonl", resume_step)
        self.tensorboard: Any = TensorBoard(folder / "tb", cfg.log.tensorboard, resume_step)
        self.progress: Any = Progress(total, resume_step, cfg.log.every, cfg.log.progress)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def close(self) -> None:
        for part in (self.metrics, self.evals, self.samples, self.tensorboard, self.progress):
            part.close()


class NoFiles(RunFiles):
    """What ranks other than 0 have instead: nothing is written and nothing said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.metrics = self.evals = self.samples = self.tensorboard = self.progress = self

    def write(self, *record: Any) -> None: ...
    def step(self, done: int, figures: dict[str, float | None]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...

"""Trackers (`log.to`): TensorBoard, Weights & Biases, Trackio and MLflow, told of a run while it goes.

Each works in a thread of its own: a slow one holds no step up, and what fails in one (no network, a full disk) is said once and
ends nothing but its own part. A tracker's id of the run lies in the run's folder, so that a resumed run goes on there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol

from pydantic import BaseModel

from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.run.writers import replace_text

IDS = "trackers.json"  # {tracker: its id of the run}
START_SECONDS = CLOSE_SECONDS = 60.0  # how long a run waits for a tracker; what is late goes on beside it
MOST_WAITING = 10_000  # records that a tracker may be behind
PICTURE = "picture"  # of a kept answer: kilobytes of image as text, for report.html


@dataclass(frozen=True)
class Place:
    """What a tracker is told of the run when it starts. `id` is what its `start` returned before; None for a new run."""

    folder: Path
    project: str
    name: str
    settings: dict[str, Any]  # by dotted name
    step: int  # the first to come
    id: str | None


class Tracker(Protocol):
    """One tracker's side; all methods are called in the same thread, in this order, and may raise what they like."""

    def start(self, place: Place) -> str | None: ...  # goes on with `place.id`; returns the id to go on with
    def figures(self, step: int, figures: dict[str, float]) -> None: ...
    def table(self, step: int, rows: list[dict[str, Any]]) -> None: ...  # kept completions, all with the same columns
    def finish(self, report: Path | None, finished: bool) -> None: ...  # not finished: the run may be resumed


class TensorBoard:
    """Files under `tb/`; the report is beside them. What was written beyond the step of a resumption is purged."""

    def start(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence()
        # Not from the step itself on: the evaluation at it stands before the checkpoint, and is not made again.
        self.writer = SummaryWriter(str(place.folder / "tb"), purge_step=place.step + 1 if place.step else None)
        rows = [{"setting": k, "value": v} for k, v in place.settings.items()]
        self.step = place.step
        self.writer.add_text("settings", markdown(rows), self.step)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.step = step
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.writer.add_text("samples", markdown(rows), step)

    def finish(self, report: Path | None, finished: bool) -> None:
        if report is not None:
            self.writer.add_text("report", f"`{report.resolve()}`", self.step)
        self.writer.close()


class Wandb:
    """Weights & Biases. Its own step cannot go back, as that of a resumed run does: charts are drawn over the figure `step`."""

    def start(self, place: Place) -> str:
        import wandb

        self.run = wandb.init(
            project=place.project,
            name=place.name,
            id=place.id,
            resume="allow" if place.id else None,
            dir=os.environ.get("WANDB_DIR", str(place.folder)),
            reinit="create_new",  # two runs in one process are two
            settings=wandb.Settings(console="off", quiet=True),
        )
        self.run.config.update(place.settings, allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return self.run.id

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({**figures, "step": step})

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)
        self.run.log({"samples": table, "step": step})

    def finish(self, report: Path | None, finished: bool) -> None:
        if report is not None:
            import wandb

            artifact = wandb.Artifact(f"report-{self.run.id}", type="report")
            artifact.add_file(str(report))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=int(not finished))


class Trackio:
    """Trackio knows a run that it shall go on with by its name, so the name is one that no other folder's run has."""

    def start(self, place: Place) -> str:
        import trackio

        name = place.id or f"{place.name}-{uuid.uuid4().hex[:8]}"
        resume = "allow" if place.id else "never"
        self.run = trackio.init(place.project, name, config=place.settings, resume=resume, embed=False)
        return name

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        import trackio

        self.run.log({"samples": trackio.Table(data=rows)}, step=step)

    def finish(self, report: Path | None, finished: bool) -> None:
        import trackio

        if report is not None:
            self.run.log_artifact(str(report), name=f"report-{self.run.name}", type="report")
        trackio.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI. Its parameters cannot change: those of a resumed run are in config.toml alone."""

    PARAMS, VALUE = 100, 6000  # most in a batch, most characters of one

    def start(self, place: Place) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if place.id:
            self.id = place.id
            self.client.update_run(self.id, status="RUNNING")
        else:
            found = self.client.get_experiment_by_name(place.project)
            experiment = found.experiment_id if found else self.client.create_experiment(place.project)
            self.id = self.client.create_run(experiment, run_name=place.name).info.run_id
            params = [Param(k, str(v)[: self.VALUE]) for k, v in place.settings.items()]
            for i in range(0, len(params), self.PARAMS):
                self.client.log_batch(self.id, params=params[i : i + self.PARAMS])
        self.client.log_artifact(self.id, str(place.folder / "config.toml"))
        return self.id

    def figures(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in figures.items()}
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in named.items()])

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self.client.log_table(self.id, columns, f"samples/step-{step:06d}.json")

    def finish(self, report: Path | None, finished: bool) -> None:
        if report is not None:
            self.client.log_artifact(self.id, str(report))
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


# Each name in `log.to`: its class, and the module that it needs.
KINDS: dict[str, tuple[Callable[[], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
    "mlflow": (Mlflow, "mlflow"),
}


def check(cfg: Config) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in cfg.log.to:
        if importlib.util.find_spec(KINDS[name][1]) is None:
            raise UserError(
                f"log.to: {name} needs a package that is not installed: pip install 'amft-fast[trackers]', or leave it out"
            )


def make(cfg: Config, say: Callable[[str], None]) -> list[Tracked]:
    """The trackers of `log.to`, as listeners (run/listeners.py)."""
    return [Tracked(name, KINDS[name][0](), cfg, say) for name in dict.fromkeys(cfg.log.to)]


class Tracked:
    """A tracker as a listener: what it is told it gets in a thread of its own, and once it fails it gets nothing more."""

    def __init__(self, name: str, tracker: Tracker, cfg: Config, say: Callable[[str], None]) -> None:
        self.name, self.tracker, self.cfg, self.say = name, tracker, cfg, say
        self.waiting: Queue[Callable[[], Any]] = Queue(MOST_WAITING)
        self.rows: list[dict[str, Any]] = []  # completions of the present step: they come one by one
        self.started, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def on_start(self, folder: Path, step: int) -> None:
        self._tell(lambda: self._start(folder, step))
        self.thread.start()
        if not self.started.wait(START_SECONDS):
            self.say(f"{self.name} (log.to) has not started after {START_SECONDS:.0f} s: the run goes on meanwhile")

    def on_step(self, record: dict[str, Any]) -> None:
        self._figures(record["step"], record)

    def on_eval(self, record: dict[str, Any]) -> None:
        splits = {f"eval/{split}": row for split, row in record.items() if isinstance(row, dict)}
        self._figures(record["at"], {f"{split}/{name}": v for split, row in splits.items() for name, v in row.items()})

    def on_sample(self, record: dict[str, Any]) -> None:
        if self.rows and self.rows[0]["step"] != record["step"]:
            self._table()
        self.rows.append({k: v for k, v in record.items() if k != PICTURE})

    def on_end(self, folder: Path, finished: bool) -> None:
        self._table()
        report = folder / "report.html"
        self._tell(lambda: self._finish(report if report.exists() else None, finished))
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive() and not self.over.is_set():
            self.over.set()
            self.say(
                f"{self.name} (log.to) has not taken everything in after {CLOSE_SECONDS:.0f} s: some of it may be missing"
            )

    def _figures(self, step: int, record: dict[str, Any]) -> None:
        self._table()
        numbers = {
            k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"
        }
        self._tell(lambda: self.tracker.figures(step, numbers))

    def _table(self) -> None:
        """Passes the completions of a step on, once all of them have come."""
        rows, self.rows = self.rows, []
        if rows:
            columns = dict.fromkeys(name for row in rows for name in row)
            alike = [{name: _cell(row.get(name)) for name in columns} for row in rows]
            self._tell(lambda: self.tracker.table(rows[0]["step"], alike))

    # ------------------------------------------------------------------------------------------------------- its thread

    def _tell(self, what: Callable[[], Any]) -> None:
        if self.over.is_set():
            return
        try:
            self.waiting.put_nowait(what)
        except Full:
            self._give_up(f"it is {MOST_WAITING} records behind")

    def _start(self, folder: Path, step: int) -> None:
        ids = _ids(folder)
        settings, name = flat(self.cfg), folder.resolve().name
        place = Place(folder, self.cfg.log.project, name, settings, step, ids.get(self.name))
        mine = self.tracker.start(place)
        if mine is not None and ids.get(self.name) != mine:
            with _writing:
                replace_text(folder / IDS, json.dumps(_ids(folder) | {self.name: mine}))
        self.started.set()

    def _finish(self, report: Path | None, finished: bool) -> None:
        self.tracker.finish(report, finished)
        self.over.set()

    def _work(self) -> None:
        while not self.over.is_set():
            what = self.waiting.get()  # never in vain: who gives up in the run's thread has found work waiting here
            try:
                what()
            except Exception as e:
                self._give_up(brief(e))
                with suppress(Exception):  # gives back what it may hold; what was told so far is kept
                    self.tracker.finish(None, False)

    def _give_up(self, why: str) -> None:
        if self.over.is_set():
            return
        self.over.set()
        self.started.set()
        self.say(f"{self.name} (log.to) is told nothing more of this run, which goes on without it: {why}")


_writing = threading.Lock()


def _ids(folder: Path) -> dict[str, str]:
    """The trackers' ids of the run in `folder`; none where the file is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / IDS).read_text())
        if isinstance(found, dict):
            return {name: mine for name, mine in found.items() if isinstance(mine, str)}
    return {}


def flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; those that are None are left out."""
    out: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            out |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            out[prefix + name] = value
    return out


def brief(error: Exception) -> str:
    """An exception in one line."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _cell(value: Any) -> Any:
    """A value as a table takes it."""
    return (
        value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, ensure_ascii=False)
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of TensorBoard's text page."""
    head = list(rows[0])
    cells = (
        [re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", str(v)).replace("\n", " ⏎ ") for v in row.values()] for row in rows
    )
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _silence() -> None:
    """An OSError that ends a thread of TensorBoard's prints no traceback: it is raised again where more is written."""
    shown = threading.excepthook
    if getattr(shown, "spares_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
            shown(args)

    hook.spares_tensorboard = True
    threading.excepthook = hook

"""Python: `from amft_fast import train, evaluate, compare, Config`.

    run = train(model="configs/demo_base", data="my.jsonl", rewards=[exact], **{"train.method": "rl", "train.steps": 50})
    run.summary["end"]["test"]["sampled"], run.metrics.plot("step", "reward"), run.report()

What the command line does with a file and flags, these do with keywords: `config` is a file or a `Config`, every setting a
keyword with dots, or a section as a dict. A user's mistake is a `UserError`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.interfaces import Task

Rewards = Sequence[str | Callable[..., Any]]


@dataclass(frozen=True)
class Run:
    """A run's folder, as its files tell it. `code` is 0 for one that came to its end, 130 or 143 for one that was stopped."""

    path: Path
    code: int = 0

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty for a run that was stopped."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @property
    def metrics(self) -> Any:
        """metrics.jsonl as a pandas DataFrame, a row per step."""
        return _frame(self._lines("metrics.jsonl"))

    @property
    def evals(self) -> Any:
        """evals.jsonl as a DataFrame, a row per evaluation, a split's figures as split/name."""
        return _frame([_flat(line) for line in self._lines("evals.jsonl")])

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The completions that were kept."""
        return self._lines("samples.jsonl")

    @property
    def model(self) -> Path:
        """The trained policy, a transformers folder (with `checkpoint.export`)."""
        return self.path / "model"

    def report(self) -> Report:
        """report.html, written anew; a notebook shows it."""
        from amft_fast.report.page import write_report

        return Report(Path(write_report(self.path)))

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class Report:
    """A page, which notebooks show in a frame."""

    path: Path

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 800px; border: 0"></iframe>'


def train(
    model: str | Path | None = None,
    data: Any = None,
    rewards: Rewards = (),
    *,
    config: str | Path | Config | None = None,
    task: Task | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    on_step: Callable[[dict[str, Any]], Any] | None = None,
    on_eval: Callable[[dict[str, Any]], Any] | None = None,
    on_checkpoint: Callable[[Path], Any] | None = None,
    **settings: Any,
) -> Run:
    """Trains, and returns the run.

    model      folder of a checkpoint or hub name
    data       a file, a list of files, a list of rows, a datasets.Dataset or a DataFrame: task `data` (docs/rewards.md)
    rewards    functions or names, of task `data`
    task       a task of one's own, an object (interfaces.Task), instead of one by name
    callbacks  objects with any of the methods of run/listeners.Listener; `on_step` and the like are single ones
    settings   any setting: {"train.lr": 1e-4}, or a section as a dict: train={"lr": 1e-4}

    Without `run.dir` the run gets a folder of its own under runs/. Ctrl-C saves and stops; afterwards signal handlers are as
    they were. Raises UserError for what the user can mend.
    """
    cfg, task = _config_and_task(config, model, data, rewards, task, settings, fresh=not resume)
    from amft_fast.run import launch

    single = {"on_step": on_step, "on_eval": on_eval, "on_checkpoint": on_checkpoint}
    given = type("Callbacks", (), {name: staticmethod(f) for name, f in single.items() if f is not None})()
    code = launch.train(cfg, resume, task, [*callbacks, given])
    return Run(Path(cfg.run.dir), code)


def evaluate(
    model: str | Path | None = None,
    data: Any = None,
    rewards: Rewards = (),
    *,
    config: str | Path | Config | None = None,
    task: Task | None = None,
    **settings: Any,
) -> dict[str, dict[str, float]]:
    """{split: figures} of a model: greedy and sampled success, pass@k and what the task reports. Arguments as in `train`.

    Raises UserError, and KeyboardInterrupt when it was stopped.
    """
    cfg, task = _config_and_task(config, model, data, rewards, task, settings, fresh=False)
    from amft_fast.run import launch

    try:
        return launch.evaluate(cfg, task)
    except InterruptedError:
        raise KeyboardInterrupt from None


def compare(
    config: str | Path | Config,
    methods: Sequence[str],
    *,
    seeds: int = 3,
    out: str | Path = "runs/compare",
    cores: int | None = None,
    budget: int | None = None,
    final_seeds: int | None = None,
    finalists: int = 6,
    stop_behind: float | None = None,
    baseline: str | None = None,
    sweep: str | None = None,
    sweep_share: float = 0.5,
    **settings: Any,
) -> dict[str, Any]:
    """Several methods at equal compute, each run a process of its own; returns what compare.json holds.

    The arguments are the options of the command. Finished runs under `out` are kept. Rewards and tasks are named in the
    settings, as other processes must find them. Raises UserError, also when a run fails.
    """
    import os

    from amft_fast.run.writers import replace_text
    from amft_fast.study import compare as study
    from amft_fast.study.stages import Seeds
    from amft_fast.study.sweep import parse_sweep

    cfg, _ = _config_and_task(config, None, None, (), None, settings, fresh=False)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.toml"
    replace_text(file, config_file.to_toml(cfg))
    arms = Seeds(seeds, max(seeds, final_seeds or 0), finalists, stop_behind, baseline)
    swept = None if sweep is None else parse_sweep(sweep, sweep_share)
    design = study.Design(list(methods), arms, swept, budget, cores or os.cpu_count() or 1)
    if study.compare(str(file), design, out, []):
        raise UserError(f"some runs of the comparison failed; their folders under {out} have a log.txt")
    return json.loads((out / "compare.json").read_text())


# -------------------------------------------------------------------------------------------------------------- arguments


def _config_and_task(
    config: str | Path | Config | None,
    model: str | Path | None,
    data: Any,
    rewards: Rewards,
    task: Task | None,
    settings: dict[str, Any],
    fresh: bool,
) -> tuple[Config, Task | None]:
    """The config of all that was given; and the task, where it is not the config's own to make."""
    if task is not None and (data is not None or rewards):
        raise UserError("task: give a task of your own, or data and rewards, not both")
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    asked = dict(settings)
    if model is not None:
        asked["model.path"] = str(model)
    rows: Iterable[tuple[str, Any]] = ()
    if data is not None or rewards:
        asked["task.name"] = "data"
    files, rows = _files_and_rows(data)
    if files:
        asked["task.data.train"] = files
    named = [r for r in rewards if isinstance(r, str)]
    own_functions = len(named) < len(rewards)
    if rewards and not own_functions:
        asked["task.data.rewards"] = named
    weights = asked.pop("task.data.weights", None) if own_functions else None  # counted once the functions are there
    cfg = config_file.from_settings(config, asked)
    if fresh and not _names_folder(config, asked):
        cfg.run.dir = _free_folder()
    if own_functions or rows:
        from amft_fast.tasks.data.task import DataTask

        section = cfg.task.data
        try:
            task = DataTask(section, rows, rewards if own_functions else (), weights)
        except ValueError as e:
            raise UserError(f"task.data: {e}") from None
    return cfg, task


def _files_and_rows(data: Any) -> tuple[list[str], list[tuple[str, Any]]]:
    """Names of files as they are; rows with their places."""
    if data is None:
        return [], []
    if isinstance(data, str | Path):
        return [str(data)], []
    if isinstance(data, Mapping):  # a DatasetDict, or one row
        raise UserError(
            f"data must be one split or a list of rows, got a {type(data).__name__} of {', '.join(map(str, data))}"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame
        data = data.to_dict("records")
    try:
        each = list(data)
    except TypeError:
        raise UserError(f"data must be a file, files, rows or a dataset, got {type(data).__name__}") from None
    if each and all(isinstance(one, str | Path) for one in each):
        return [str(one) for one in each], []
    for i, row in enumerate(each):
        if not isinstance(row, dict):
            raise UserError(f"data[{i}] must be a row, a dict of columns, got {type(row).__name__}")
    if not each:
        raise UserError("data holds no rows")
    return [], [(f"data[{i}]", row) for i, row in enumerate(each)]


def _names_folder(config: Any, asked: dict[str, Any]) -> bool:
    run = asked.get("run")
    said = "run.dir" in asked or (isinstance(run, dict) and "dir" in run)
    return said or (config is not None and "dir" in config_file.from_settings(config, {}).run.model_fields_set)


_naming = threading.Lock()


def _free_folder() -> str:
    """runs/run, or the first of runs/run-2, ... that is not there yet; made here, so that two threads get two."""
    with _naming:
        n = 1
        while (folder := Path("runs") / ("run" if n == 1 else f"run-{n}")).exists():
            n += 1
        folder.mkdir(parents=True)
    return str(folder)


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _frame(lines: list[dict[str, Any]]) -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("a DataFrame takes pandas: pip install 'amft-fast[notebook]'") from None
    return pandas.DataFrame(lines)

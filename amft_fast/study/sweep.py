"""The sweep of a study: one short run for each value of a setting and each method, judged on `val` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.study.jobs import Job, Method, slug

# One evaluation at the start and one at the end, on val; nothing kept of what lies between.
FLAGS = ("--eval.splits", '["val"]', "--eval.every", "1000", "--checkpoint.keep_best", "false")


@dataclass(frozen=True)
class Sweep:
    """A setting `section.field` and its values as written; each run has `share` of the study's budget."""

    setting: str
    values: tuple[str, ...]
    share: float = 0.5

    def jobs(self, method: Method, out: Path, budget: int) -> list[Job]:
        """The runs of a method in `out`/sweep, one a value; none where its label gives the setting itself."""
        if method.sets(self.setting):
            return []
        labels = [f"{method.label}+{self.setting}={value}" for value in self.values]
        return [
            Job(
                label,
                0,
                out / "sweep" / slug(label) / "seed-0",
                round(self.share * budget),
                (*method.flags, *self.flags(value), *FLAGS),
                method.label,
            )
            for label, value in zip(labels, self.values)
        ]

    def flags(self, value: str) -> tuple[str, str]:
        return f"--{self.setting}", value


def parse_sweep(text: str, share: float) -> Sweep:
    """`section.field=value,value...`. Raises UserError for what is none, or an unknown setting."""
    setting, eq, rest = text.removeprefix("--").partition("=")
    values = [value for value in rest.split(",") if value]
    if not eq or len(values) < 2:
        raise UserError(f"--sweep: give section.field=value,value..., for example train.lr=1e-4,2e-4, got {text!r}")
    if len(set(values)) < len(values):
        raise UserError(f"--sweep: a value of {setting} is given twice, got {rest!r}")
    known = config_file.setting_names(Config)
    if setting not in known and not setting.startswith(config_file.OPTION.removeprefix("--")):
        raise UserError(f"--sweep: unknown setting {setting!r}{config_file.did_you_mean(setting, known)}")
    return Sweep(setting, tuple(values), share)


@dataclass
class Chosen:
    """What the sweep came to: figures on val by method and value, and the value that each method's runs have."""

    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    value: dict[str, str] = field(default_factory=dict)

    def as_json(self, sweep: Sweep) -> dict[str, Any]:
        return {"setting": sweep.setting, "share": sweep.share, "chosen": self.value, "val": self.figures}


def choose(sweep: Sweep, methods: Sequence[Method], out: Path, budget: int) -> Chosen:
    """The best value of each method by success on val at the end, of sampled answers, then greedy, then the first named; of the
    runs that are done, and none for a method without one. Raises UserError where a run is of another study."""
    chosen = Chosen()
    for method in methods:
        found = {}
        for job, value in zip(sweep.jobs(method, out, budget), sweep.values):
            if job.done:
                job.check(sweep.setting, value)
                val = job.summary()["end"].get("val")
                if val is None:
                    raise UserError(
                        f"{job.folder} holds a run that was not evaluated on val: delete it, or take another --out"
                    )
                found[value] = {name: val[name] for name in ("sampled", "greedy")}
        if found:
            chosen.figures[method.label] = found
            chosen.value[method.label] = max(found, key=lambda value: (found[value]["sampled"], found[value]["greedy"]))
    return chosen

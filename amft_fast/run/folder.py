"""The folder of a run: made, taken up again, or refused; and what it says of the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from pydantic import BaseModel

from amft_fast import __version__
from amft_fast.config import Config
from amft_fast.config_file import load, to_toml
from amft_fast.doctor.installed import cpu_name
from amft_fast.errors import UserError
from amft_fast.run import trackers
from amft_fast.run.writers import replace_text


def check_folder(cfg: Config, resume: bool) -> None:
    """Raises UserError when an earlier run is there that is neither to be resumed nor to be overwritten."""
    if (Path(cfg.run.dir) / "metrics.jsonl").exists() and not resume and not cfg.run.overwrite:
        raise UserError(
            f"run.dir {cfg.run.dir!r} holds an earlier run: go on with --resume, take another --run.dir, or delete it with "
            "--run.overwrite"
        )


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError when less than `needed` bytes, those of one checkpoint, are free where the run's folder lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"run.dir {str(folder)!r}: {free / 1e9:.3g} GB are free there and one checkpoint takes {needed / 1e9:.3g} GB: make "
            "room, or take another --run.dir"
        )


def take_folder(cfg: Config, resume: bool) -> list[str]:
    """Makes the folder this run's, once nothing can refuse it any more: what is to be overwritten goes, the config is written.

    Returns the settings that a resumed run had otherwise before, as `name old -> new`. Raises UserError when it cannot be
    written.
    """
    folder = Path(cfg.run.dir)
    changes = changed_settings(folder, cfg) if resume else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First, and each at once: a kill in here must leave no half of the earlier run's checkpoints to go on from.
        for name in ("checkpoints", "tb", "model"):
            aside = folder / f".deleted-{name}"
            shutil.rmtree(aside, ignore_errors=True)  # of such a kill
            if not resume and (folder / name).is_dir():
                os.replace(folder / name, aside)
                shutil.rmtree(aside, ignore_errors=True)
        replace_text(folder / "config.toml", to_toml(cfg))
        if not resume:
            rows = ("evals.jsonl", "samples.jsonl", "eval_samples.jsonl", "metrics.jsonl")
            for name in ("summary.json", "report.html", "report.png", trackers.IDS, *rows):
                (folder / name).unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)  # told now, not after the steps before the first of them
    except OSError as e:
        raise UserError(f"run.dir {cfg.run.dir!r} cannot be written: {e.filename}: {e.strerror}") from None
    replace_text(folder / "environment.json", json.dumps(environment(), indent=1))
    return changes


def changed_settings(folder: Path, cfg: Config) -> list[str]:
    """`name old -> new` of the settings in which a config differs from that of the run in `folder`, its place apart."""
    try:
        before = load(folder / "config.toml")
    except UserError:  # none there, or of another version: nothing to compare with
        return []

    def pairs(old: BaseModel, new: BaseModel, prefix: str) -> Iterator[str]:
        for name in type(new).model_fields:
            a, b = getattr(old, name), getattr(new, name)
            if isinstance(b, BaseModel):
                yield from pairs(a, b, f"{prefix}{name}.")
            elif a != b and prefix + name not in ("run.dir", "run.overwrite"):
                yield f"{prefix}{name} {a} -> {b}"

    return list(pairs(before, cfg, ""))


def environment() -> dict[str, str]:
    """Versions and device, for the record."""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "amft_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }

"""Checkpoints: written aside, synced to disk, renamed; a half-written or damaged one is passed over with a sentence.

A checkpoint is a folder `step-000120/` with `state.safetensors` (tensors) and `state.json` (everything else, and the size and
SHA-256 of the tensors). `best` is a link to the one with the best metric. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Writes the checkpoint of `step` under `folder`, atomically, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"step-{step:06d}", folder / f".writing-step-{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside / "state.safetensors")
    record = {"format": FORMAT, "step": step, "sha256": _sha256(aside / "state.safetensors"), **state}
    (aside / "state.json").write_text(json.dumps(record, indent=1))
    for name in ("state.safetensors", "state.json"):
        _sync(aside / name)
    _sync(aside)
    if final.exists():  # the same step saved again, after a resume or on a signal
        shutil.rmtree(final)
    os.replace(aside, final)
    _sync(folder)
    return final


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint. Raises ValueError that says what is wrong with it."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"{path}: format {state['format']}, this version reads {FORMAT}")
        if _sha256(path / "state.safetensors") != state["sha256"]:
            raise ValueError(f"{path}: state.safetensors does not have the checksum that state.json names")
        return load_file(path / "state.safetensors"), state
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"{path}: incomplete or damaged ({type(e).__name__}: {e})") from None


def latest(
    folder: Path, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint under `folder` that is whole, or None; damaged ones are named through `say`."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return path, *load(path)
        except ValueError as e:
            say(f"checkpoint passed over: {e}")
    return None


def mark_best(folder: Path, path: Path) -> None:
    """Points `best` at `path`, atomically."""
    aside = folder / ".best"
    aside.unlink(missing_ok=True)
    aside.symlink_to(path.name, target_is_directory=True)
    os.replace(aside, folder / "best")


def prune(folder: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints and the best one, and what a crash left half-written."""
    best = (folder / "best").resolve() if (folder / "best").exists() else None
    for path in sorted(folder.glob("step-*"))[:-keep_last]:
        if path.resolve() != best:
            shutil.rmtree(path)
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)

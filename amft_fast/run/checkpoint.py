"""Checkpoints: written aside, synced to disk, renamed; a half-written or damaged one is passed over with a sentence.

A checkpoint is a folder `step-000120/` with tensors (`state.safetensors`, or `rank-00003.safetensors` and so on, one for each
process of the run) and `state.json` (everything else, and the SHA-256 of those files), which rank 0 writes when all of them are
there. `best` is a link to the one with the best metric. Nothing in it is pickled. A rank's file holds its own part of each
tensor; what a process needs of them is read from all the files, however many ranks wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from amft_fast.engine.parts import Part, Tensors
from amft_fast.engine.world import ALONE, World

FORMAT = 2


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


def save(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor | Part], state: dict[str, Any], world: World = ALONE
) -> Path:
    """Writes the checkpoint of `step` under `folder`, atomically, and returns its path.

    Every rank calls it with its own tensors; `state` is rank 0's. They must see the same file system.
    """
    final, aside = folder / f"step-{step:06d}", folder / f".writing-step-{step:06d}"
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    world.barrier()
    name = "state.safetensors" if world.size == 1 else f"rank-{world.rank:05d}.safetensors"
    _write(aside / name, tensors)
    files = dict(world.gather([(name, _sha256(aside / name))]))
    if world.main:
        record = {"format": FORMAT, "step": step, "files": files, **state}
        (aside / "state.json").write_text(json.dumps(record, indent=1))
        _sync(aside / "state.json")
        _sync(aside)
        if final.exists():  # the same step saved again, after a resume or on a signal
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync(folder)
    world.barrier()
    return final


def _write(path: Path, tensors: Mapping[str, torch.Tensor | Part]) -> None:
    """One rank's file, on disk when this returns. Where a part lies in its tensor is told in the file's own header."""
    data = {k: v.data if isinstance(v, Part) else v for k, v in tensors.items()}
    places = {k: [v.start, list(v.shape)] for k, v in tensors.items() if isinstance(v, Part)}
    header = {"parts": json.dumps(places)} if places else None
    save_file({k: v.detach().cpu().contiguous() for k, v in data.items()}, path, header)
    _sync(path)


def load(path: Path, world: World = ALONE) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and state of one checkpoint. Raises ValueError that says what is wrong with it, the same on every rank."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"{path}: format {state['format']}, this version reads {FORMAT}")
        error = _damage(path, state["files"], world)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        error, state = f"{path}: incomplete or damaged ({type(e).__name__}: {e})", {}
    except ValueError as e:
        error, state = str(e), {}
    errors = [e for e in world.gather([error]) if e]
    if errors:
        raise ValueError(errors[0])
    return Tensors.read([path / name for name in state["files"]]), state


def _damage(path: Path, files: dict[str, str], world: World) -> str | None:
    """What is wrong with this rank's share of the files, or None."""
    try:
        for name in list(files)[world.rank :: world.size]:
            if _sha256(path / name) != files[name]:
                return f"{path}: {name} does not have the checksum that state.json names"
            with safe_open(path / name, "pt"):
                pass
    except (OSError, SafetensorError) as e:
        return f"{path}: incomplete or damaged ({type(e).__name__}: {e})"
    return None


def latest(
    folder: Path, say: Callable[[str], None] = print, world: World = ALONE
) -> tuple[Path, Tensors, dict[str, Any]] | None:
    """The newest checkpoint under `folder` that is whole, or None; damaged ones are named through `say`."""
    for path in world.broadcast(sorted(folder.glob("step-*"), reverse=True)):
        try:
            return path, *load(path, world)
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

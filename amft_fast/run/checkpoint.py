"""Checkpoints: written aside, synced to disk, renamed; a half-written or damaged one is passed over with a sentence.

A checkpoint is a folder `step-000120/` with tensors (`state.safetensors`, or `rank-00003.safetensors` and so on, one for each
process of the run) and `state.json` (everything else, the SHA-256 of those files and its own), which rank 0 writes when all of
them are there. `best` is a link to the one with the best metric. Nothing in it is pickled. A rank's file holds its own part of
each tensor; what a process needs of them is read from all the files, however many ranks wrote them.

At every moment a kill leaves what was whole before: a step that is saved again stands aside, under a name that `latest` knows,
until the new one has its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from amft_fast.engine.parts import Part, Tensors
from amft_fast.engine.world import ALONE, World
from amft_fast.errors import UserError

FORMAT = 3
OLDER = 2  # read too: its state.json has no checksum of its own, and says nothing of seed, task and data
# Beside checkpoints for a moment only: one being written, one being deleted, one whose successor is being put in its place.
WRITING, DELETED, REPLACED = ".writing-", ".deleted-", ".replaced-"


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(record: dict[str, Any]) -> str:
    """The SHA-256 of what state.json holds, its own checksum apart; the same for every way to write the same JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)


def name_of(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:06d}"


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints under `folder`, whole or not, oldest first; files and links of such names are none."""
    found = ((re.fullmatch(r"step-(\d{6,18})", p.name), p) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(m[1]), p) for m, p in found if m and p.is_dir() and not p.is_symlink())


def _remove(path: Path) -> None:
    """Deletes a file, link or folder; renamed first, so that a kill in the middle leaves no half of a checkpoint."""
    with suppress(OSError):  # what cannot be deleted may stay
        aside = path.with_name(DELETED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def _restore(folder: Path) -> None:
    """Gives checkpoints their place back that a kill caught while their successors were being put there."""
    for aside in list(folder.glob(REPLACED + "*")):
        final = folder / aside.name.removeprefix(REPLACED)
        if final.exists():
            _remove(aside)
        else:
            os.replace(aside, final)


def _everywhere(world: World, folder: Path, step: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` gave, by rank. Raises UserError on all ranks when the files of one could not be written."""
    result, error = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as e:
        error = getattr(e, "strerror", None) or str(e)
    except UserError as e:
        error = e
    done = world.gather([(result, error)])
    errors = [e for _, e in done if e]
    if errors and isinstance(errors[0], UserError):
        raise errors[0]
    if errors:
        if world.main:
            shutil.rmtree(folder / (WRITING + name_of(step)), ignore_errors=True)  # its room is needed
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {errors[0]}; earlier ones are as they were: make "
            "room there, then go on with --resume"
        )
    return [r for r, _ in done]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor | Part],
    state: dict[str, Any],
    world: World = ALONE,
    first: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the checkpoint of `step` under `folder` (made if missing, its parent is not), atomically, and returns its path.

    Every rank calls it with its own tensors; `state` and `first`, what must be done before, are of rank 0. They must see the
    same file system. Raises UserError, on all ranks, when it cannot be written (no room, say); what was there before is then
    still there.
    """
    final, aside = folder / name_of(step), folder / (WRITING + name_of(step))
    name = "state.safetensors" if world.size == 1 else f"rank-{world.rank:05d}.safetensors"

    def begin() -> None:
        if world.main:
            first()
            folder.mkdir(exist_ok=True)
            _restore(folder)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()

    def write() -> tuple[str, str]:
        _write(aside / name, tensors)
        return name, _sha256(aside / name)

    def publish() -> None:
        if world.main:
            record = {"format": FORMAT, "step": step, "files": files, **state}
            record["sha256"] = _digest(json.loads(json.dumps(record)))
            (aside / "state.json").write_text(json.dumps(record, indent=1))
            _sync(aside / "state.json")
            _sync(aside)
            _put(aside, final)

    _everywhere(world, folder, step, begin)
    files = dict(_everywhere(world, folder, step, write))
    _everywhere(world, folder, step, publish)
    return final


def _put(aside: Path, final: Path) -> None:
    """Gives `aside` the name `final`. What has it (the same step, saved before a resume or a signal) goes when that is done."""
    replaced = final.with_name(REPLACED + final.name)
    old = final.exists() or final.is_symlink()
    if old:
        os.replace(final, replaced)
    os.replace(aside, final)
    _sync(final.parent)
    if old:
        _remove(replaced)


def _write(path: Path, tensors: Mapping[str, torch.Tensor | Part]) -> None:
    """One rank's file, on disk when this returns. Where a part lies in its tensor is told in the file's own header."""
    data = {k: v.data if isinstance(v, Part) else v for k, v in tensors.items()}
    places = {k: [v.start, list(v.shape)] for k, v in tensors.items() if isinstance(v, Part)}
    header = {"parts": json.dumps(places)} if places else None
    save_file({k: v.detach().cpu().contiguous() for k, v in data.items()}, path, header)
    _sync(path)


def load(path: Path, world: World = ALONE) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and state of one checkpoint. Raises ValueError that says what is wrong with it, the same on every rank."""
    state: dict[str, Any] = {}
    try:
        state = _read_state(path)
        error = _damage(path, state["files"], world)
    except (OSError, ValueError, RecursionError) as e:
        error = f"{path}: incomplete or damaged ({type(e).__name__}: {e})"
    errors = [e for e in world.gather([error]) if e]
    if errors:
        raise ValueError(errors[0])
    return Tensors.read([path / name for name in state["files"]]), state


def _read_state(path: Path) -> dict[str, Any]:
    """What state.json says. Raises ValueError when it is not what `save` has written."""
    state = json.loads((path / "state.json").read_bytes())
    if not isinstance(state, dict):
        raise ValueError("state.json holds no object")
    if state.get("format") not in (OLDER, FORMAT):
        raise ValueError(f"format {state.get('format')}, this version reads {OLDER} and {FORMAT}")
    named = state.pop("sha256", None)
    if named != (_digest(state) if state["format"] == FORMAT else None):
        raise ValueError("state.json does not have the checksum that it names")
    files, step = state.get("files"), state.get("step")
    if not isinstance(files, dict) or not files or any(Path(name).name != name for name in files):
        raise ValueError("state.json names no files of this folder")
    number = re.fullmatch(r"step-(\d+)", path.name)
    if number and int(number[1]) != step:
        raise ValueError(f"state.json is of step {step}")
    return state


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
    """The newest checkpoint under `folder` that is whole, or None when there is none; damaged ones are named through `say`.

    Raises UserError when there are checkpoints and none is whole: to start anew is not what was asked for.
    """
    if world.main:
        with suppress(OSError):  # a folder that may only be read
            _restore(folder)
    found = world.broadcast([path for _, path in reversed(steps(folder))])
    for path in found:
        try:
            return path, *load(path, world)
        except ValueError as e:
            say(f"checkpoint passed over: {e}")
    if found:
        raise UserError(
            f"--resume: no checkpoint under {folder} is whole; delete that folder to start from the beginning in its place"
        )
    return None


def mark_best(folder: Path, path: Path) -> None:
    """Points `best` at `path`, atomically. Raises UserError where the file system has no links."""
    aside, best = folder / ".best", folder / "best"
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(path.name, target_is_directory=True)
        if best.is_dir() and not best.is_symlink():  # copied without links: a link cannot take a folder's place
            _remove(best)
        os.replace(aside, best)
    except OSError as e:
        raise UserError(
            f"checkpoint.keep_best: no link can be made in {folder}: {e.strerror}; set it to false"
        ) from None


def prune(folder: Path, keep_last: int, newest: Path) -> None:
    """Deletes what is older than the last `keep_last` checkpoints up to `newest`, but for the best, and what a crash left.

    `newest` is the one just written. Later ones than it are damaged (else the run had gone on from them) and stay: they neither
    count nor take the place of whole ones.
    """
    best = (folder / "best").resolve() if (folder / "best").exists() else None
    found = [path for _, path in steps(folder)]
    older = found[: found.index(newest) + 1] if newest in found else []
    for path in older[:-keep_last]:
        if path.resolve() != best:
            _remove(path)
    for prefix in (WRITING, DELETED):
        for path in folder.glob(prefix + "*"):
            shutil.rmtree(path, ignore_errors=True)

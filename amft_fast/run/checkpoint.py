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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from amft_fast.engine.world import ALONE, World

FORMAT = 2


@dataclass(frozen=True)
class Part:
    """`data` [n] is `whole.view(-1)[start : start + n]` of a tensor of shape `shape`."""

    data: torch.Tensor
    start: int
    shape: tuple[int, ...]


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, read from its files when asked for, wherever their parts lie."""

    def __init__(self, parts: dict[str, list[tuple[int, int, Callable[[int, int], torch.Tensor]]]], shapes) -> None:
        self._parts = parts  # (start, size, read a range of it) of each part
        self.shapes: dict[str, tuple[int, ...]] = shapes

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor | Part]) -> Tensors:
        """The same view of tensors in memory."""
        if isinstance(tensors, Tensors):
            return tensors
        parts = {k: v if isinstance(v, Part) else Part(v.reshape(-1), 0, tuple(v.shape)) for k, v in tensors.items()}
        readers = {k: [(p.start, p.data.numel(), lambda a, b, p=p: p.data[a:b])] for k, p in parts.items()}
        return cls(readers, {k: p.shape for k, p in parts.items()})

    @classmethod
    def read(cls, paths: list[Path]) -> Tensors:
        """The tensors in these files."""
        parts: dict[str, list[tuple[int, int, Callable[[int, int], torch.Tensor]]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            file = safe_open(path, "pt")
            places = json.loads((file.metadata() or {}).get("parts", "{}"))
            for key in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(key).get_shape())
                start, whole = places.get(key, (0, shape))
                parts.setdefault(key, []).append((start, prod(shape), _reader(file, key, len(shape))))
                shapes[key] = tuple(whole)
        return cls(parts, shapes)

    def part(self, key: str, start: int, size: int) -> torch.Tensor:
        """`size` elements from `start` on of the flattened tensor. Raises ValueError when the files do not hold them all."""
        out, done = [], 0
        for begin, length, read in sorted(self._parts[key], key=lambda p: p[0]):
            low, high = max(start, begin), min(start + size, begin + length)
            if low < high:
                out.append(read(low - begin, high - begin))
                done += high - low
        if done != size:
            raise ValueError(f"{key}: the files hold {done} of {size} elements from {start} on")
        return out[0] if len(out) == 1 else torch.cat(out) if out else torch.zeros(0)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.part(key, 0, prod(self.shapes[key])).view(self.shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _reader(file: Any, key: str, dims: int) -> Callable[[int, int], torch.Tensor]:
    if dims == 1:
        return lambda a, b: file.get_slice(key)[a:b]
    return lambda a, b: file.get_tensor(key).reshape(-1)[a:b]


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

"""Tensors by name, each in parts that may lie on several ranks or in several files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


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

    def under(self, prefix: str) -> Tensors:
        """Those whose names begin so, without it."""
        names = {k: k.removeprefix(prefix) for k in self.shapes if k.startswith(prefix)}
        parts = {short: self._parts[k] for k, short in names.items()}
        return Tensors(parts, {short: self.shapes[k] for k, short in names.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _reader(file: Any, key: str, dims: int) -> Callable[[int, int], torch.Tensor]:
    if dims == 1:
        return lambda a, b: file.get_slice(key)[a:b]
    return lambda a, b: file.get_tensor(key).reshape(-1)[a:b]

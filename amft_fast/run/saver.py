"""Checkpoints written beside the steps: a step waits for the copy to host memory alone, the next save for the last one's end.

The ranks' writers agree over connections of their own, so nothing that the steps send to each other comes between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from amft_fast.config import CheckpointConfig
from amft_fast.engine.parts import Part
from amft_fast.engine.world import World
from amft_fast.run import checkpoint

SETTLE_S = 60.0  # for other ranks' parts of what is being written, when this one ends by an error


class Saver:
    """Writes checkpoints into `folder`, deletes old ones and points at the best.

    `first` is called on rank 0 before a checkpoint may stand, in the writer's thread; `done` with its path once it does, in the
    thread of the caller. All ranks call the methods alike.
    """

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig,
        world: World,
        first: Callable[[], None] = lambda: None,
        done: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.cfg, self.world, self.first, self.done = folder, cfg, world, first, done
        self.own_world = world.aside() if cfg.background else world
        self.copies: dict[str, torch.Tensor] = {}  # in host memory, used again
        self.thread: Thread | None = None
        self.path = folder
        self.error: BaseException | None = None

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor | Part], state: dict[str, Any], best: bool, wait: bool
    ) -> Path:
        """Saves the checkpoint of `step`, `best` or not, and returns its path; when there is no time to `wait`, as soon as the
        state is copied. Raises UserError when it, or the one before, could not be written."""
        self.wait()
        self.path = self.folder / checkpoint.name_of(step)
        if wait or not self.cfg.background:
            self._write(step, tensors, state, best)
            self.done(self.path)
            return self.path
        tensors = self._copied(tensors)
        state = json.loads(json.dumps(state)) if self.world.main else {}
        self.thread = Thread(target=self._try, args=(step, tensors, state, best), daemon=True, name="checkpoint")
        self.thread.start()
        return self.path

    def wait(self) -> None:
        """Returns when nothing is being written. Raises UserError, on all ranks, when the last could not be."""
        if self.thread is None:
            return
        self.thread.join()
        errors = [e for e in self.world.gather([self.error]) if e is not None]
        self.thread = self.error = None
        if errors:
            raise errors[0]
        self.done(self.path)

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that `wait` will raise."""
        return self.error is not None

    def settle(self) -> None:
        """Before the end of a run that was broken off: lets what is being written come to its end."""
        if self.thread is not None:
            self.thread.join(None if self.world.size == 1 else SETTLE_S)

    def mark_best(self, step: int) -> None:
        if self.world.main and self.cfg.keep_best:
            checkpoint.mark_best(self.folder, self.folder / checkpoint.name_of(step))

    def _try(self, *given: Any) -> None:
        try:
            self._write(*given)
        except BaseException as e:
            self.error = e

    def _write(self, step: int, tensors: Mapping[str, Any], state: dict[str, Any], best: bool) -> None:
        path = checkpoint.save(self.folder, step, tensors, state, self.own_world, self.first)
        if self.world.main:
            checkpoint.prune(self.folder, self.cfg.keep_last, path)
        if best:
            self.mark_best(step)

    @torch.no_grad()
    def _copied(self, tensors: Mapping[str, torch.Tensor | Part]) -> dict[str, torch.Tensor | Part]:
        """The tensors as they are now, in host memory of their own (pinned for those of a GPU)."""
        copies, out = {}, {}
        for name, x in tensors.items():
            data = x.data if isinstance(x, Part) else x
            into = self.copies.get(name)
            if into is None or into.shape != data.shape or into.dtype != data.dtype:
                into = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            copies[name] = into.copy_(data, non_blocking=True)
            out[name] = Part(into, x.start, x.shape) if isinstance(x, Part) else into
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.copies = copies
        return out

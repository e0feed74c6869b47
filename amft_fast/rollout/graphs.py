"""Decoding steps captured in CUDA graphs: a step of 28 layers is then one launch instead of eight hundred.

A few numbers of rows are captured, each when it has been stepped some times without; a batch in between rides in the next
larger one, whose further rows write where no row lives. A graph holds addresses: whoever moves the cache calls `clear`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

EAGER = 1  # steps of a size before it is captured: they compile kernels and make cuBLAS's workspaces


def padded_rows(rows: int) -> int:
    """The number of rows that so many ride in: a power of two up to 64, then a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


class Graphs:
    """`core(ids, position)` reads one token of each row [A] of int64 and writes what it finds where the caller knows."""

    def __init__(self, core: Callable[[torch.Tensor, torch.Tensor], None], room: int, device: torch.device) -> None:
        self.core = core
        self.inputs = torch.zeros(2, room, dtype=torch.int64, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.eager: Counter[int] = Counter()
        self.pool = None

    def run(self, inputs: np.ndarray) -> None:
        """One step of the rows whose (token, position) these are, [2, A]."""
        rows = padded_rows(inputs.shape[1])
        padded = np.zeros((2, rows), np.int64)
        padded[:, : inputs.shape[1]] = inputs
        self.inputs[:, :rows].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        if rows not in self.graphs and self.eager[rows] >= EAGER:
            self._capture(rows)
        if rows in self.graphs:
            self.graphs[rows].replay()
            return
        self.eager[rows] += 1
        self.core(*self.inputs[:, :rows])

    def _capture(self, rows: int) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.core(*self.inputs[:, :rows])
        self.graphs[rows], self.pool = graph, graph.pool()

    def clear(self) -> None:
        self.graphs.clear()

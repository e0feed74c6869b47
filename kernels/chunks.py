"""How the rows are cut: chunks for the matrix products, blocks for the row mathematics.

Legend: N rows, n rows of a chunk, r rows of a block, V vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# Workspace when `chunk_bytes` is None. A GPU wants few large chunks, since each pays one pass over the fp32 dW: from 1 to 2
# GiB saves about a millisecond of 43 at V = 131072, N = 8192 (docs/loss_head.md), which a card of 80 GB has room for. On a CPU
# 256–512 rows already make an efficient GEMM, and the smaller the chunk the more of it is still in L3.
_GPU_BYTES, _LARGE_GPU_BYTES, _LARGE_GPU = 1 << 30, 2 << 30, 80_000_000_000
_CPU_BYTES = 64 << 20

# A block's logits and its two scratch blocks share the last-level cache of a desktop or one CCX of a server.
_BLOCK_BYTES = 4 << 20

# A logit product of fewer rows than this reads the weight too often: at 1024 rows reading [V, H] takes a quarter of the time of
# multiplying it (3 TB/s, 790 TFLOP/s).
_LEAST_ROWS = 1024

# Rows of a GEMM's tile: a chunk of 547 rows would be computed as 640.
_TILE = 128

# A slab of the vocabulary narrower than this makes a poor GEMM.
_LEAST_COLUMNS = 512

Index = slice | torch.Tensor


class RowPlan(NamedTuple):
    """Which rows are worked on, and how many at a time.

    Logits are made for a chunk of rows. The products of ∂L/∂x are taken for a group of chunks, whose ∂L/∂x is kept; where a
    group is one chunk, ∂L/∂x lies over the logits.
    """

    rows: int  # N, ignored rows included
    active: torch.Tensor | None  # numbers of the rows to work on; None: all
    chunk_rows: int
    block_rows: int
    group_rows: int

    @property
    def count(self) -> int:
        return self.rows if self.active is None else len(self.active)

    @property
    def keeps(self) -> bool:
        """Whether ∂L/∂x of a group has memory of its own."""
        return self.group_rows > self.chunk_rows

    def groups(self) -> Iterator[slice]:
        """Groups as slices of the active rows."""
        for start in range(0, self.count, self.group_rows):
            yield slice(start, min(start + self.group_rows, self.count))

    def parts(self, within: slice | None = None) -> Iterator[slice]:
        """Chunks (of a group) as slices of the active rows."""
        first, end = (0, self.count) if within is None else (within.start, within.stop)
        for start in range(first, end, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, end))

    def index_of(self, part: slice) -> Index:
        """Where a slice of the active rows lies among all rows."""
        return part if self.active is None else self.active[part]

    def chunks(self) -> Iterator[Index]:
        for part in self.parts():
            yield self.index_of(part)

    def blocks(self, rows: int) -> Iterator[slice]:
        """The blocks of a chunk of `rows` rows."""
        for start in range(0, rows, self.block_rows):
            yield slice(start, start + self.block_rows)


def default_chunk_bytes(device: torch.device, memory: int | None = None) -> int:
    """The workspace on a device; `memory`: of that device, in bytes, where it is not this machine's."""
    if device.type != "cuda":
        return _CPU_BYTES
    if memory is None:
        memory = torch.cuda.get_device_properties(device).total_memory
    return _LARGE_GPU_BYTES if memory >= _LARGE_GPU else _GPU_BYTES


def plan_rows(
    valid_N: torch.Tensor,
    vocab: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    backend: str,
    grad_dtype: torch.dtype | None = None,
) -> RowPlan:
    """Rows per group, chunk and block, within `chunk_bytes` of workspace. `grad_dtype`: of a ∂L/∂x that may be kept."""
    active = _active_rows(valid_N, backend)
    count, row_bytes = len(valid_N) if active is None else len(active), vocab * dtype.itemsize
    budget = _logit_bytes(valid_N, chunk_bytes, backend)
    group_rows = chunk_rows = even_rows(count, budget // row_bytes)
    if backend == "triton" and grad_dtype is not None and 2 * grad_dtype.itemsize <= dtype.itemsize:
        group_rows, chunk_rows = _group(count, budget, row_bytes, chunk_rows)
    return RowPlan(
        len(valid_N), active, chunk_rows, _block_rows(valid_N, chunk_rows, row_bytes, chunk_bytes), group_rows
    )


def _group(count: int, budget: int, row_bytes: int, chunk_rows: int) -> tuple[int, int]:
    """(rows per group, rows per chunk) with the fewest groups, since each costs a pass over the fp32 dW.

    ∂L/∂x over the logits takes 4 bytes a logit, kept apart it takes 2, besides a chunk of logits. So a budget makes fewer
    groups of kept ones than chunks in place, unless a chunk would get too small or the number stays the same.
    """
    for groups in range(1, -(-count // chunk_rows)):
        rows = -(-count // groups)
        room = (budget - rows * row_bytes // 2) // row_bytes
        if room >= _LEAST_ROWS:
            return rows, room // _TILE * _TILE or even_rows(rows, room)
    return chunk_rows, chunk_rows


def plan_tiles(
    valid_N: torch.Tensor, vocab: int, hidden: int, dtype: torch.dtype, chunk_bytes: int | None, backend: str
) -> tuple[RowPlan, int]:
    """Rows and columns of a tile of logits for a backward that goes slab by slab of the vocabulary.

    All rows in one tile if they leave room for a slab worth a GEMM: then each slab of dW is written once.
    """
    active = _active_rows(valid_N, backend)
    count = max(1, len(valid_N) if active is None else len(active))
    logits = _logit_bytes(valid_N, chunk_bytes, backend) // dtype.itemsize
    most = logits // count
    if valid_N.device.type == "cpu":  # a slab of dW in fp32, where the weight is narrower, has to fit as well
        most = min(most, _budget(valid_N, chunk_bytes) // (8 * hidden * dtype.itemsize))
    columns = even_rows(vocab, max(most, min(vocab, _LEAST_COLUMNS, logits)))
    chunk_rows = even_rows(count, logits // columns)
    block_rows = _block_rows(valid_N, chunk_rows, columns * dtype.itemsize, chunk_bytes)
    return RowPlan(len(valid_N), active, chunk_rows, block_rows, chunk_rows), columns


def _active_rows(valid_N: torch.Tensor, backend: str) -> torch.Tensor | None:
    """On the CPU ignored rows are left out of the products altogether. On CUDA counting them would stop the host, so
    there they are worked on, with zero weight."""
    if valid_N.device.type != "cpu" or backend == "triton":
        return None
    active = valid_N.nonzero()[:, 0]
    return None if len(active) == len(valid_N) else active


def _budget(valid_N: torch.Tensor, chunk_bytes: int | None) -> int:
    return chunk_bytes or default_chunk_bytes(valid_N.device)


def _logit_bytes(valid_N: torch.Tensor, chunk_bytes: int | None, backend: str) -> int:
    """The logits' share of the workspace."""
    budget = _budget(valid_N, chunk_bytes)
    if backend == "triton":  # the gradient overwrites the logits
        return budget
    if valid_N.device.type == "cpu":  # 1/8 for the two scratch blocks, 1/8 for the slabs of the products
        return 3 * budget // 4
    return 2 * budget // 7  # both scratch blocks span the chunk, and the cast gradient is half as large


def _block_rows(valid_N: torch.Tensor, chunk_rows: int, row_bytes: int, chunk_bytes: int | None) -> int:
    if valid_N.device.type != "cpu":
        return chunk_rows
    return max(1, min(chunk_rows, min(_BLOCK_BYTES, _budget(valid_N, chunk_bytes) // 16) // row_bytes))


def even_rows(count: int, most: int) -> int:
    """Rows per chunk such that the chunks are about equal: a last chunk of three rows would waste a pass over dW."""
    chunks = -(-count // max(1, most))
    return max(1, -(-count // max(1, chunks)))

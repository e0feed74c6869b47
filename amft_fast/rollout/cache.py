"""Keys and values of the rows under way, each row at a place of its own, written in place.

No row is padded and none is copied when another ends. Queries of the heads that share a key head lie side by side, so keys are
read once for all of them. Legend: A rows under way, R places, G key heads, Q query heads of each, D head size, C room of a row
in tokens, L keys looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

SECTION = 16  # rows that look at equally many keys where lengths differ


class StaticCache:
    """[R, G, C, D] keys and values for each layer. `lengths` [R]: the tokens that are there, on the host."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        self.room, self.heads, self.capacity, self.size = shape
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.lengths = np.zeros(self.room, np.int64)
        self._flatten()

    def _flatten(self) -> None:
        self.flat_keys, self.flat_values = ([t.view(-1, self.size) for t in x] for x in (self.keys, self.values))

    def reserve(self, tokens: int) -> bool:
        """Room for so many tokens in each row; True when the tensors are new ones. A layer at a time: no two whole caches."""
        if tokens <= self.capacity:
            return False
        filled = int(self.lengths.max())
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros(self.room, self.heads, tokens, self.size)
                tensors[i][:, :, :filled] = old[:, :, :filled]
        self.capacity = tokens
        self._flatten()
        return True

    def slots(self, position_A: torch.Tensor) -> torch.Tensor:
        """Where the rows' next keys lie among all [R · G · C] of a layer: [A · G]."""
        first = torch.arange(len(position_A) * self.heads, device=position_A.device) * self.capacity
        return first + position_A.repeat_interleave(self.heads)

    def append(self, layer: int, slots: torch.Tensor, key_AGD: torch.Tensor, value_AGD: torch.Tensor) -> None:
        """One more token of each of the first rows."""
        self.flat_keys[layer].index_copy_(0, slots, key_AGD.reshape(-1, self.size))
        self.flat_values[layer].index_copy_(0, slots, value_AGD.reshape(-1, self.size))

    def fill(self, layer: int, places: torch.Tensor, key_ALGD: torch.Tensor, value_ALGD: torch.Tensor) -> None:
        """The first tokens of the rows at these places."""
        for cached, new in ((self.keys[layer], key_ALGD), (self.values[layer], value_ALGD)):
            cached[:, :, : new.shape[1]].index_copy_(0, places, new.transpose(1, 2))

    def move(self, order: np.ndarray) -> None:
        """The row that was at place order[i] is at place i now."""
        for to, at in enumerate(order.tolist()):
            if to != at:
                length = int(self.lengths[at])
                self.lengths[to] = length
                for cached in (*self.keys, *self.values):
                    cached[to, :, :length] = cached[at, :, :length]


class Sections:
    """What the first rows look at in one step, where keys are sliced by the host (a CPU): runs of rows, each with as many keys
    as its longest row has. There is no mask where all rows of a run are equally long."""

    def __init__(self, lengths: Sequence[int], cache: StaticCache, scale: float) -> None:
        self.cache, self.scale, heads = cache, scale, cache.heads
        like = cache.keys[0]
        self.written_out = like.dtype in (
            torch.float32,
            torch.float64,
        )  # others want sums in a wider type: torch's kernel
        lengths = np.asarray(lengths)
        even = len(lengths) == 0 or lengths.min() == lengths.max()
        wide = len(lengths) if even else SECTION
        self.runs = []
        for start in range(0, len(lengths), wide or 1):
            own = lengths[start : start + wide]
            bias = None
            if own.min() != own.max():
                hidden = np.arange(own.max())[None] >= own[:, None]
                bias = like.new_zeros(len(own), 1, int(own.max())).masked_fill_(
                    torch.from_numpy(hidden)[:, None], -torch.inf
                )
                bias = bias.repeat_interleave(heads, 0) if self.written_out else bias[:, None]
            self.runs.append((start, start + len(own), int(own.max()), bias))

    def attend(self, layer: int, q_AQD: torch.Tensor) -> torch.Tensor:
        """[A, heads · D] of queries [A, heads, D]."""
        if not self.written_out:
            rows = [self._kernel(layer, q_AQD, *run) for run in self.runs]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        # Products over [A · G] of queries [heads of a group, D]: strides are given, since each view is an operation.
        heads, size, room = self.cache.heads, self.cache.size, self.cache.capacity * self.cache.size
        query = (q_AQD * self.scale).view(len(q_AQD) * heads, -1, size)
        key, value, rows = self.cache.keys[layer], self.cache.values[layer], []
        for start, end, length, bias in self.runs:
            some = query if len(self.runs) == 1 else query[start * heads : end * heads]
            at, many = start * heads * room, (end - start) * heads
            keys = key.as_strided((many, size, length), (room, 1, size), at)
            scores = torch.bmm(some, keys) if bias is None else torch.baddbmm(bias, some, keys)
            values = value.as_strided((many, length, size), (room, size, 1), at)
            rows.append(torch.bmm(scores.softmax(-1), values))
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(len(q_AQD), -1)

    def _kernel(self, layer: int, q_AQD: torch.Tensor, start: int, end: int, length: int, bias) -> torch.Tensor:
        query = q_AQD[start:end].unflatten(1, (self.cache.heads, -1))
        key, value = (x[layer][start:end, :, :length] for x in (self.cache.keys, self.cache.values))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return out.reshape(end - start, -1)

"""From sequences to micro-batches: right-padded rows or packed rows, and only the tokens that a loss reads.

Legend: B rows, L columns of a micro-batch, N tokens with a loss in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

# Per-token numbers that a sequence may carry, with the value of a token that has none.
FIELDS = {
    "nll_weight": 0.0,
    "pg_weight": 0.0,
    "entropy_weight": 0.0,
    "value_weight": 0.0,
    "advantages": 0.0,
    "old_logprobs": 0.0,
    "behavior_logprobs": 0.0,
    "ref_logprobs": 0.0,
    "returns": 0.0,
    "temperature": 1.0,
}


@dataclass
class Sequence:
    """One token sequence on the CPU.

    `ids` [T] int64; `trained` [T] bool marks the tokens that some loss reads (never the first: nothing predicts it);
    `fields` holds [T] float arrays under names of `FIELDS`; `images` the pictures that the ids have places for.
    """

    ids: np.ndarray
    trained: np.ndarray
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    images: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.trained[0] = False

    def with_fields(self, **fields: np.ndarray | float) -> Sequence:
        """A copy that shares the ids and has these fields as well; a number fills all tokens."""
        arrays = {k: np.broadcast_to(np.asarray(v, np.float64), self.ids.shape) for k, v in fields.items()}
        return replace(self, fields={**self.fields, **arrays})


@dataclass
class Batch:
    """One micro-batch.

    `input_ids` [B, L] int64; `position_ids` [B, L] int64 when packed (they restart at each sequence), else None:
    right-padding needs no mask under causal attention. `rows` [N] are the flat positions whose hidden state predicts a
    trained token, `targets` [N] those tokens. `fields` are [N] floats; one that no sequence carries is absent.
    `members` lists the sequences in order and `counts` how many of the N rows each has. Where one has images, `texts` holds
    the ids and images of all: the policy makes pixels of them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    fields: dict[str, torch.Tensor]
    members: list[int]
    counts: list[int]
    texts: list[tuple[np.ndarray, tuple[Any, ...]]] = field(default_factory=list)

    def get(self, name: str) -> torch.Tensor | None:
        return self.fields.get(name)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory and without waiting where that is a GPU."""
        if torch.device(device).type == "cpu":
            return self

        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            rows=move(self.rows),
            targets=move(self.targets),
            fields={k: move(v) for k, v in self.fields.items()},
        )


def plan(lengths: list[int], max_tokens: int, packed: bool) -> list[list[int]]:
    """Groups sequences into micro-batches of at most `max_tokens` tokens, padding included; a longer one rides alone.

    Padded: neighbours in length share a micro-batch, longest first. Packed: first-fit decreasing. Both are deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    if not packed:
        for i in order:
            if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups
    room: list[int] = []
    for i in order:
        slot = next((g for g, free in enumerate(room) if free >= lengths[i]), None)
        if slot is None:
            groups.append([])
            room.append(max(max_tokens, lengths[i]))
            slot = len(groups) - 1
        groups[slot].append(i)
        room[slot] -= lengths[i]
    return groups


def deal(lengths: list[int], max_tokens: int, packed: bool, ranks: int) -> list[list[list[int]]]:
    """Micro-batches for each of several ranks: equally many, at most `max_tokens` tokens each, balanced by tokens.

    The k-th micro-batches of all ranks run at the same time and are neighbours in size. A list may be empty.
    """
    groups = plan(lengths, max_tokens, packed)
    rounds = -(-len(groups) // ranks)
    groups = _level(lengths, max_tokens, rounds * ranks) if packed else _tighten(lengths, groups, rounds * ranks)
    groups.sort(key=lambda g: (-sum(lengths[i] for i in g), g))
    groups += [[] for _ in range(rounds * ranks - len(groups))]
    return [groups[rank::ranks] for rank in range(ranks)]


def _tighten(lengths: list[int], groups: list[list[int]], limit: int) -> list[list[int]]:
    """The padded plan of the smallest bound that still needs at most `limit` micro-batches."""
    low, high = 0, max((len(g) * lengths[g[0]] for g in groups), default=0)
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        tighter = plan(lengths, middle, False)
        if len(tighter) <= limit:
            groups, high = tighter, middle
        else:
            low = middle
    return groups


def _level(lengths: list[int], max_tokens: int, count: int) -> list[list[int]]:
    """`count` packed micro-batches of about equal tokens: the longest sequence left goes to the emptiest one.

    First-fit needed no more than `count`; where levelling would break the bound, first-fit's plan stays.
    """
    heap = [(0, g) for g in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, g = heapq.heappop(heap)
        if load and load + lengths[i] > max_tokens:
            return plan(lengths, max_tokens, True)
        groups[g].append(i)
        heapq.heappush(heap, (load + lengths[i], g))
    return [g for g in groups if g]


def collate(sequences: list[Sequence], members: list[int], packed: bool, dtype: torch.dtype = torch.float32) -> Batch:
    """One micro-batch of the sequences at `members`; float fields in `dtype`."""
    chosen = [sequences[i] for i in members]
    lengths = [len(s.ids) for s in chosen]
    if packed:
        input_ids = np.concatenate([s.ids for s in chosen])[None]
        position_ids = np.concatenate([np.arange(n) for n in lengths])[None]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    else:
        width = max(lengths)
        input_ids = np.zeros((len(chosen), width), np.int64)
        for row, s in enumerate(chosen):
            input_ids[row, : len(s.ids)] = s.ids
        position_ids = None
        starts = np.arange(len(chosen)) * width
    where = [np.flatnonzero(s.trained) for s in chosen]
    rows = np.concatenate([start + w - 1 for start, w in zip(starts, where)])
    targets = np.concatenate([s.ids[w] for s, w in zip(chosen, where)])
    names = [n for n in FIELDS if any(n in s.fields for s in chosen)]
    fields = {
        n: np.concatenate(
            [s.fields[n][w] if n in s.fields else np.full(len(w), FIELDS[n]) for s, w in zip(chosen, where)]
        )
        for n in names
    }
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(targets),
        fields={n: torch.from_numpy(v).to(dtype) for n, v in fields.items()},
        members=list(members),
        counts=[len(w) for w in where],
        texts=[(s.ids, s.images) for s in chosen] if any(s.images for s in chosen) else [],
    )


def micro_batches(
    sequences: list[Sequence],
    max_tokens: int,
    packed: bool,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    ranks: int = 1,
) -> list[Batch]:
    """All sequences that have a trained token, as micro-batches of at most `max_tokens` tokens each.

    With several `ranks` those of this one: all ranks get equally many, where need be with dummies that weigh nothing and
    have no members. Every rank must call it with the same sequences.
    """
    used = [i for i, s in enumerate(sequences) if s.trained.any()]
    lengths = [len(sequences[i].ids) for i in used]
    groups = plan(lengths, max_tokens, packed) if ranks == 1 else deal(lengths, max_tokens, packed, ranks)[rank]
    return [
        collate(sequences, [used[i] for i in group], packed, dtype)
        if group
        else _dummy(sequences, used[0], packed, dtype)
        for group in groups
    ]


def _dummy(sequences: list[Sequence], like: int, packed: bool, dtype: torch.dtype) -> Batch:
    """The smallest micro-batch with the fields of the others: it costs a pass and adds nothing."""
    names = {n for s in sequences for n in s.fields}
    fields = {n: np.full(2, FIELDS[n]) for n in names}
    smallest = Sequence(sequences[like].ids[:2], np.array([False, True]), fields)
    return replace(collate([smallest], [0], packed, dtype), members=[], counts=[])


def scatter(sequences: list[Sequence], batches: Iterable[Any], values: Iterable[torch.Tensor], name: str) -> None:
    """Writes per-row `values` [N] of each batch (anything with its `members` and `counts`) back into the sequences' field
    `name` (a [T] array each)."""
    for batch, rows in zip(batches, values, strict=True):
        parts = np.split(rows.double().cpu().numpy(), np.cumsum(batch.counts)[:-1])
        for i, part in zip(batch.members, parts):
            full = np.zeros(len(sequences[i].ids))
            full[sequences[i].trained] = part
            sequences[i].fields[name] = full

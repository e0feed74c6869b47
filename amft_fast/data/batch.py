"""From sequences to micro-batches: right-padded rows or packed rows, and only the tokens that a loss reads.

Legend: B rows, L columns of a micro-batch, N tokens with a loss in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from amft_fast.data import packing

# Per-token numbers that the losses read, with the value of a token that has none.
FIELDS = {
    "nll_weight": 0.0,
    "shaped_weight": 0.0,
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
class TokenSequence:
    """One token sequence on the CPU.

    `ids` [T] int64; `trained` [T] bool marks the tokens that some loss reads (never the first: nothing predicts it);
    `fields` holds [T] float arrays: those named in `FIELDS` go into micro-batches, others (`values`, `token_weight`) are read
    before and stay with the sequence. `images` are the pictures that the ids have places for. `experts` [n, layers, k], n ≤ T:
    those that each token is to be sent to; the routers choose where there are none.
    """

    ids: np.ndarray
    trained: np.ndarray
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    images: tuple[Any, ...] = ()
    experts: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.trained[0] = False

    def with_fields(self, **fields: np.ndarray | float) -> TokenSequence:
        """A copy that shares the ids and has these fields as well; a number fills all tokens."""
        arrays = {k: np.broadcast_to(np.asarray(v, np.float64), self.ids.shape) for k, v in fields.items()}
        return replace(self, fields={**self.fields, **arrays})


@dataclass
class Batch:
    """One micro-batch.

    `input_ids` [B, L] int64; `position_ids` [B, L] int64 when packed (they restart at each sequence), else None:
    right-padding needs no mask under causal attention. `layout` says who attends to whom in a packed row (packing.py).
    `rows` [N] are the flat positions whose hidden state predicts a trained token, `targets` [N] those tokens. `fields` are
    [N] floats; one that no sequence carries is absent. `members` lists the sequences in order and `counts` how many of the N
    rows each has. Where one has images, `texts` holds the ids and images of all: the policy makes pixels of them.
    `kept`, of a part of a batch: those of the whole one's N rows that it has; one without any has a row that weighs nothing.
    `experts` [B·L, layers, k] int64: where each token goes, −1 where its router is to choose; None where all are.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    fields: dict[str, torch.Tensor]
    members: list[int]
    counts: list[int]
    texts: list[tuple[np.ndarray, tuple[Any, ...]]] = field(default_factory=list)
    layout: packing.Layout | None = None
    kept: torch.Tensor | None = None
    experts: torch.Tensor | None = None

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
            layout=None if self.layout is None else self.layout.map(move),
            kept=move(self.kept),
            experts=move(self.experts),
        )

    def part(self, rank: int, ranks: int) -> Batch:
        """What one of several ranks has of a packed row: equal runs of its tokens, the last ones padded. The layout stays
        that of the whole row."""
        size = -(-self.input_ids.shape[1] // ranks)
        first = rank * size

        def run(row: torch.Tensor) -> torch.Tensor:
            mine = row[:, first : first + size]
            return torch.nn.functional.pad(mine, (0, size - mine.shape[1]))

        kept = ((self.rows >= first) & (self.rows < first + size)).nonzero().flatten()
        rows, targets, fields = (
            self.rows[kept] - first,
            self.targets[kept],
            {n: v[kept] for n, v in self.fields.items()},
        )
        if not len(
            kept
        ):  # the other ranks wait for this one's backward pass, so a way must lead from its loss to its tokens
            rows = targets = torch.zeros(1, dtype=torch.int64)
            fields = {n: torch.full((1,), FIELDS[n], dtype=v.dtype) for n, v in fields.items()}
        return replace(
            self,
            input_ids=run(self.input_ids),
            position_ids=run(self.position_ids),
            rows=rows,
            targets=targets,
            fields=fields,
            kept=kept,
        )


def padded_groups(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Padded rows: neighbours in length share a micro-batch of at most `max_tokens` tokens, padding included, longest first; a
    longer sequence rides alone."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def deal(lengths: list[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Padded micro-batches for each of several ranks: equally many, of at most `max_tokens` tokens, balanced by tokens.

    The k-th micro-batches of all ranks run at the same time and are neighbours in size. A list may be empty.
    """
    groups = padded_groups(lengths, max_tokens)
    rounds = -(-len(groups) // ranks)
    groups = _tighten(lengths, groups, rounds * ranks)
    groups.sort(key=lambda g: (-sum(lengths[i] for i in g), g))
    groups += [[] for _ in range(rounds * ranks - len(groups))]
    return [groups[rank::ranks] for rank in range(ranks)]


def _tighten(lengths: list[int], groups: list[list[int]], limit: int) -> list[list[int]]:
    """The groups of the smallest bound that still needs at most `limit` micro-batches."""
    low, high = 0, max((len(g) * lengths[g[0]] for g in groups), default=0)
    while high - low > max(high // 50, 1):
        middle = (low + high) // 2
        tighter = padded_groups(lengths, middle)
        if len(tighter) <= limit:
            groups, high = tighter, middle
        else:
            low = middle
    return groups


def _read(sequences: list[TokenSequence]) -> tuple[list[np.ndarray], list[int]]:
    """The tokens that the model must read of each, and how many of them come before the first trained one.

    None from the last trained token on: its hidden state predicts nothing. Sequences with images are read whole and share
    nothing, since the policy lays their rows out itself.
    """
    if any(s.images for s in sequences):
        return [s.ids for s in sequences], [0] * len(sequences)
    ends = [len(s.ids) - int(s.trained[::-1].argmax()) - 1 for s in sequences]
    return [s.ids[:n] for s, n in zip(sequences, ends)], [int(s.trained.argmax()) for s in sequences]


def collate(
    sequences: list[TokenSequence], members: list[int], packed: bool, dtype: torch.dtype = torch.float32
) -> Batch:
    """One micro-batch of the sequences at `members`, each of which has a trained token; float fields in `dtype`."""
    chosen = [sequences[i] for i in members]
    ids, prefixes = _read(chosen)
    where = [np.flatnonzero(s.trained) for s in chosen]
    position_ids = layout = None
    if packed:
        row = packing.pack(ids, prefixes)
        input_ids, position_ids, layout = row.input_ids[None], row.position_ids[None], row.layout
        place_of = row.where
    else:
        width = max(len(x) for x in ids)
        input_ids = np.zeros((len(chosen), width), np.int64)
        for place, x in enumerate(ids):
            input_ids[place, : len(x)] = x

        def place_of(i: int, positions: np.ndarray) -> np.ndarray:
            return i * width + positions

    rows = np.concatenate([place_of(i, w - 1) for i, w in enumerate(where)])
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
        layout=layout,
        experts=_experts([s.experts for s in chosen], [len(x) for x in ids], place_of, input_ids.size),
    )


def _experts(
    told: list[np.ndarray | None], lengths: list[int], place_of: Callable[[int, np.ndarray], np.ndarray], size: int
) -> torch.Tensor | None:
    """[size, layers, k]: what `Batch.experts` is, of sequences of which so many tokens are read."""
    first = next((experts for experts in told if experts is not None), None)
    if first is None:
        return None
    out = np.full((size, *first.shape[1:]), -1, np.int64)
    for i, experts in enumerate(told):
        if experts is not None:
            n = min(len(experts), lengths[i])
            out[place_of(i, np.arange(n))] = experts[:n]
    return torch.from_numpy(out)


def micro_batches(
    sequences: list[TokenSequence],
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
    ids, prefixes = _read([sequences[i] for i in used])
    if packed:
        groups = packing.deal(packing.units(ids, prefixes, max_tokens), max_tokens, ranks)[rank]
    else:
        lengths = [len(x) for x in ids]
        groups = deal(lengths, max_tokens, ranks)[rank] if ranks > 1 else padded_groups(lengths, max_tokens)
    return [
        collate(sequences, [used[i] for i in group], packed, dtype)
        if group
        else _dummy(sequences, used[0], packed, dtype)
        for group in groups
    ]


def _dummy(sequences: list[TokenSequence], like: int, packed: bool, dtype: torch.dtype) -> Batch:
    """The smallest micro-batch with the fields of the others: it costs a pass and adds nothing."""
    carried = {n for s in sequences for n in s.fields}
    fields = {n: np.full(2, value) for n, value in FIELDS.items() if n in carried}
    smallest = TokenSequence(sequences[like].ids[:2], np.array([False, True]), fields)
    return replace(collate([smallest], [0], packed, dtype), members=[], counts=[])


def scatter(sequences: list[TokenSequence], batches: Iterable[Any], values: Iterable[torch.Tensor], name: str) -> None:
    """Writes per-row `values` [N] of each batch (anything with its `members` and `counts`) back into the sequences' field
    `name` (a [T] array each)."""
    for batch, rows in zip(batches, values, strict=True):
        parts = np.split(rows.double().cpu().numpy(), np.cumsum(batch.counts)[:-1])
        for i, part in zip(batch.members, parts):
            full = np.zeros(len(sequences[i].ids))
            full[sequences[i].trained] = part
            sequences[i].fields[name] = full

"""How sequences share a forward pass without padding: which ride together, and who may look at whom.

A packed micro-batch is one row of T tokens. Sequences that begin alike (the answers to one prompt) are laid out as a tree: the
common tokens once, then what each adds. Only attention knows of it: what a sequence adds is a *segment* whose queries see the
common tokens and itself. Everything else of a layer works token by token, so a prompt of P tokens with G answers costs P, not
G · P, and the numbers are the same up to rounding.

Legend: T tokens of the row, S segments, q and k a segment's queries and keys (k ≥ q: the common tokens as well).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

# Sequence length at which attention (∝ length²) costs as much as the rest of a layer (∝ length): 6 · hidden size in a layer of
# 12 · hidden² weights with causal attention. Only the balance of the micro-batches depends on it.
BREAK_EVEN = 9216
SPREAD = 1.3  # segments whose lengths differ by at most this factor share one call of padded attention
SMALL = 32  # tokens: below, a call costs more than its padding


@dataclass
class Layout:
    """Who attends to whom in a packed row.

    `q_starts`, `k_starts` [S+1] int32: bounds of the segments among the queries (the row itself) and among the keys, which are
    the row's tokens at `k_index` [sum of k] (None: the row itself, nothing is shared). `max_q`, `max_k`: longest segment.
    `segments`, on the host: for each its first token, its length, and the same of its common part. `padded`: the same as padded
    rows, made when a backend without segments asks for them.
    """

    q_starts: torch.Tensor
    k_starts: torch.Tensor
    k_index: torch.Tensor | None
    max_q: int
    max_k: int
    segments: list[tuple[int, int, int, int]]
    calls: int = 0  # of the attention function: a model that does not hand the layout on leaves it at 0
    _padded: tuple[list[PaddedCall], torch.Tensor] | None = None
    _mask: torch.Tensor | None = None

    def map(self, move) -> Layout:
        """The layout with `move` applied to its tensors."""
        k_index = None if self.k_index is None else move(self.k_index)
        return replace(self, q_starts=move(self.q_starts), k_starts=move(self.k_starts), k_index=k_index)

    @property
    def padded(self) -> tuple[list[PaddedCall], torch.Tensor]:
        """Padded rows, and [T]: where each token of the row is among them, one call's rows after the other's."""
        if self._padded is None:
            device = self.q_starts.device
            calls, back = _padded_calls(self.segments)
            self._padded = [c.map(lambda t: t.to(device)) for c in calls], torch.from_numpy(back).to(device)
        return self._padded

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, T, T], to be added to the scores: 0 where a token sees another, the lowest number elsewhere. Quadratic: for
        tests, and for attention functions that take nothing better."""
        if self._mask is None:
            size = self.tokens
            sees = np.zeros((size, size), bool)
            for start, own, common_start, common in self.segments:
                sees[start : start + own, start : start + own] = np.tri(own, dtype=bool)
                sees[start : start + own, common_start : common_start + common] = True
            hidden = torch.from_numpy(~sees).to(self.q_starts.device)[None, None]
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._mask = zeros.masked_fill_(hidden, torch.finfo(dtype).min)
        return self._mask

    @property
    def tokens(self) -> int:
        """T."""
        return sum(own for _, own, *_ in self.segments)

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes."""
        return sum(own * common + own * (own + 1) // 2 for _, own, _, common in self.segments)

    @property
    def cost(self) -> float:
        """What the row costs, in tokens without attention."""
        return self.tokens + 2 * self.pairs / BREAK_EVEN


@dataclass
class PaddedCall:
    """Segments of similar length as padded rows: `q_index` [B, Lq] and `k_index` [B, Lk] are tokens of the row (padding repeats
    token 0). `mask` [B, 1, Lq, Lk] bool says who sees whom; None: plain causal attention, queries and keys being the same."""

    q_index: torch.Tensor
    k_index: torch.Tensor
    mask: torch.Tensor | None

    def map(self, move) -> PaddedCall:
        return PaddedCall(move(self.q_index), move(self.k_index), None if self.mask is None else move(self.mask))


@dataclass(frozen=True)
class Packed:
    """A packed row: `input_ids`, `position_ids` [T] int64, its layout, and for each sequence where its tokens are: token t of
    sequence i is at `heads[i][0] + t` for t < `heads[i][1]` (the common part), else at `tails[i] + t − heads[i][1]`."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    layout: Layout
    heads: list[tuple[int, int]]
    tails: list[int]

    def where(self, i: int, positions: np.ndarray) -> np.ndarray:
        """Places in the row of these tokens of sequence i."""
        start, common = self.heads[i]
        return np.where(positions < common, start + positions, self.tails[i] + positions - common)


def pack(ids: list[np.ndarray], prefixes: list[int]) -> Packed:
    """One row of these sequences; those with the same first `prefixes[i]` tokens hold them in common."""
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []  # own start, own length, common start, common length
    heads, tails = [(0, 0)] * len(ids), [0] * len(ids)
    size = 0

    def put(tokens: np.ndarray, first: int, common_start: int, common: int) -> int:
        nonlocal size
        if len(tokens):
            pieces.append(tokens)
            positions.append(np.arange(first, first + len(tokens)))
            segments.append((size, len(tokens), common_start, common))
        size += len(tokens)
        return size - len(tokens)

    for members in families(ids, prefixes):
        common = prefixes[members[0]] if len(members) > 1 else 0
        start = put(ids[members[0]][:common], 0, 0, 0)
        for i in members:
            heads[i] = (start, common)
            tails[i] = put(ids[i][common:], common, start, common)
    layout = _layout(segments)
    return Packed(np.concatenate(pieces), np.concatenate(positions), layout, heads, tails)


def families(ids: list[np.ndarray], prefixes: list[int]) -> list[list[int]]:
    """The sequences grouped by their first `prefixes[i]` tokens, in order of first appearance; by none, each is alone."""
    found: dict[bytes | int, list[int]] = {}
    for i, (tokens, n) in enumerate(zip(ids, prefixes)):
        found.setdefault(np.ascontiguousarray(tokens[:n]).tobytes() if n else i, []).append(i)
    return list(found.values())


def _layout(segments: list[tuple[int, int, int, int]]) -> Layout:
    lengths = np.array([(own, own + common) for _, own, _, common in segments], np.int32)
    bounds = np.concatenate([np.zeros((1, 2), np.int32), lengths.cumsum(0, dtype=np.int32)])
    q_starts, k_starts = (torch.from_numpy(bounds[:, i].copy()) for i in (0, 1))
    shared = any(common for *_, common in segments)
    k_index = torch.from_numpy(np.concatenate([_keys(s) for s in segments])) if shared else None
    return Layout(q_starts, k_starts, k_index, int(lengths[:, 0].max()), int(lengths[:, 1].max()), segments)


def _keys(segment: tuple[int, int, int, int]) -> np.ndarray:
    start, own, common_start, common = segment
    return np.concatenate([np.arange(common_start, common_start + common), np.arange(start, start + own)])


def _padded_calls(segments: list[tuple[int, int, int, int]]) -> tuple[list[PaddedCall], np.ndarray]:
    """Segments of similar lengths together, those with and without common tokens apart."""
    order = sorted(range(len(segments)), key=lambda i: (segments[i][3] > 0, segments[i][1] + segments[i][3], i))
    runs: list[list[int]] = []
    for i in order:
        _, own, _, common = segments[i]
        first = segments[runs[-1][0]] if runs else None
        if first and (first[3] > 0) == (common > 0) and own + common <= max(SPREAD * (first[1] + first[3]), SMALL):
            runs[-1].append(i)
        else:
            runs.append([i])
    calls, back, done = [], np.zeros(sum(s[1] for s in segments), np.int64), 0
    for run in runs:
        chosen = [segments[i] for i in run]
        wide_q = max(own for _, own, _, _ in chosen)
        wide_k = max(own + common for _, own, _, common in chosen)
        q_index, k_index = np.zeros((len(run), wide_q), np.int64), np.zeros((len(run), wide_k), np.int64)
        for row, segment in enumerate(chosen):
            start, own, _, common = segment
            q_index[row, :own] = np.arange(start, start + own)
            k_index[row, : own + common] = _keys(segment)
            back[start : start + own] = done + row * wide_q + np.arange(own)
        mask = None
        if chosen[0][3]:
            last = np.array([common for *_, common in chosen])[:, None] + np.arange(wide_q)  # newest key a query sees
            mask = torch.from_numpy(np.arange(wide_k)[None, None, :] <= last[:, :, None])[:, None]
        calls.append(PaddedCall(torch.from_numpy(q_index), torch.from_numpy(k_index), mask))
        done += q_index.size
    return calls, back


# ------------------------------------------------------------------------------------------------- who rides with whom


@dataclass(frozen=True)
class Unit:
    """Sequences that stay together because they share tokens: their places, tokens of the row, and cost in token units."""

    members: list[int]
    tokens: int
    cost: float


def units(ids: list[np.ndarray], prefixes: list[int], max_tokens: int) -> list[Unit]:
    """Families of sequences, cut where one alone would pass `max_tokens`."""
    out = []
    for family in families(ids, prefixes):
        common = prefixes[family[0]] if len(family) > 1 else 0
        members: list[int] = []
        tokens = common
        for i in family:
            own = len(ids[i]) - common
            if members and tokens + own > max_tokens:
                out.append(_unit(members, common, ids))
                members, tokens = [], common
            members.append(i)
            tokens += own
        out.append(_unit(members, common, ids))
    return out


def _unit(members: list[int], common: int, ids: list[np.ndarray]) -> Unit:
    own = [len(ids[i]) - common for i in members]
    tokens = common + sum(own)
    pairs = common**2 + sum(n * (n + 2 * common) for n in own)
    return Unit(members, tokens, tokens + pairs / BREAK_EVEN)


def packed_groups(all_units: list[Unit], max_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Groups of sequences of at most `max_tokens` tokens each and nearly equal cost; a longer one rides alone.

    As few groups as first-fit decreasing needs, or up to an eighth more where balance asks for it; a multiple of `ranks` where
    there are sequences enough. Deterministic.
    """
    if not all_units:
        return []
    fewest = _first_fit(all_units, max_tokens)
    cost = _costs(all_units)
    rounds = -(-len(fewest) // ranks)
    counts = (ranks * n for n in range(rounds, rounds + 1 + -(-rounds // 8)))
    ways = [fewest, *filter(None, (_spread(all_units, max_tokens, count) for count in counts))]

    def slowest(groups: list[list[int]]) -> float:
        """What ranks that wait for one another would spend."""
        return -(-len(groups) // ranks) * max(map(cost, groups))

    return min(ways, key=slowest)


def deal(all_units: list[Unit], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """The groups of each rank: equally many groups, some empty where there are not enough; those that run at the same time are
    neighbours in cost."""
    groups = packed_groups(all_units, max_tokens, ranks)
    if ranks > 1:
        groups = sorted(groups, key=_costs(all_units), reverse=True)
        groups += [[] for _ in range(-len(groups) % ranks)]
    return [groups[rank::ranks] for rank in range(ranks)]


def _costs(all_units: list[Unit]) -> Callable[[list[int]], float]:
    """What a group costs."""
    cost = {unit.members[0]: unit.cost for unit in all_units}
    return lambda group: sum(cost.get(i, 0.0) for i in group)


def _first_fit(all_units: list[Unit], max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(all_units, key=lambda u: (-u.tokens, u.members[0])):
        slot = next((g for g, free in enumerate(room) if free >= unit.tokens), None)
        if slot is None:
            groups.append([])
            room.append(max(max_tokens, unit.tokens))
            slot = len(groups) - 1
        groups[slot] += unit.members
        room[slot] -= unit.tokens
    return groups


def _spread(all_units: list[Unit], max_tokens: int, count: int) -> list[list[int]] | None:
    """The costliest first, each to the cheapest group that has room for it; None when one has none."""
    groups: list[list[int]] = [[] for _ in range(count)]
    room, costs = np.full(count, max_tokens), np.zeros(count)
    for unit in sorted(all_units, key=lambda u: (-u.cost, u.members[0])):
        fits = (room >= unit.tokens) | ((room == max_tokens) & (unit.tokens > max_tokens))
        if not fits.any():
            return None
        g = int(np.where(fits, costs, np.inf).argmin())
        groups[g] += unit.members
        room[g] -= unit.tokens
        costs[g] += unit.cost
    return [g for g in groups if g]

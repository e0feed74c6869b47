"""Dynamic sampling: groups whose rewards are all equal teach nothing, and the next prompts take their place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from amft_fast.interfaces import Item, Sample

Draw = Callable[[list[Item], int], list[Sample]]


def draw_with_spread(
    draw: Draw, take: Callable[[int], list[Item]], count: int, max_redraws: int
) -> tuple[list[Sample], dict[str, float]]:
    """Samples of `count` prompts, as many as possible with a spread of rewards in their group, and the figures of it.

    `take(n)` gives the next n prompts, `draw(items, round)` their samples, item by item. Flat groups are replaced up to
    `max_redraws` times; those that are flat then stay, so the number of groups is always `count`. Group ids are 0 to count - 1.

    Figures: `dynamic/flat_first` and `dynamic/flat` (shares of flat groups before and after), `dynamic/replaced` (groups),
    `dynamic/redraws`, `dynamic/tokens` (sampled for groups that were dropped).
    """
    groups = by_group(draw(take(count), 0))
    first = flat = [i for i, group in enumerate(groups) if is_flat(group)]
    replaced, dropped_tokens, redraws = 0, 0, 0
    while flat and redraws < max_redraws:
        redraws += 1
        for i, group in zip(flat, by_group(draw(take(len(flat)), redraws))):
            dropped_tokens += sum(sum(s.loss_mask) for s in groups[i])
            groups[i] = group
        replaced += len(flat)
        flat = [i for i in flat if is_flat(groups[i])]
    for i, group in enumerate(groups):
        for sample in group:
            sample.group_id = i
    figures = {
        "dynamic/flat_first": len(first) / count,
        "dynamic/flat": len(flat) / count,
        "dynamic/replaced": float(replaced),
        "dynamic/redraws": float(redraws),
        "dynamic/tokens": float(dropped_tokens),
    }
    return [sample for group in groups for sample in group], figures


def is_flat(group: list[Sample]) -> bool:
    """Whether all samples of a group earned the same."""
    return len({sample.reward for sample in group}) < 2


def flat_prompts(samples: list[Sample]) -> dict[str, bool]:
    """Of each prompt, whether its group is flat."""
    return {group[0].prompt_id: is_flat(group) for group in by_group(samples)}


def by_group(samples: list[Sample]) -> list[list[Sample]]:
    """Each group's samples, in order."""
    return [list(group) for _, group in groupby(samples, key=lambda s: s.group_id)]

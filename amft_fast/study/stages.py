"""Which arms of a study get more seeds: those not clearly behind, and at the end the ones ahead.

All of it follows from the scores of the seeds run so far, so that a study that is gone on with decides as it did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from amft_fast.study.stats import Difference, paired, pooled_half

Scores = dict[str, dict[int, float]]  # of each arm by seed, as a share of 1


@dataclass(frozen=True)
class Seeds:
    """`first` seeds for every arm; for the `finalists` ahead then, and the baseline, up to `last`. With `stop_behind` an arm
    whose paired difference to the best is below minus that many points, with its whole 95 % interval, gets no more after two
    seeds or later; the baseline is never stopped."""

    first: int = 3
    last: int = 3
    finalists: int = 6
    stop_behind: float | None = None
    baseline: str | None = None


@dataclass
class Standing:
    """After a number of seeds: who goes on, who was stopped by how much behind whom, and who was not among those ahead."""

    active: list[str]
    stopped: dict[str, tuple[str, Difference]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)


def mean(by_seed: dict[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed)


def best(scores: Scores) -> str:
    """The arm of the highest mean among those with the most seeds; the first named of equals."""
    most = max(len(by_seed) for by_seed in scores.values())
    return max((arm for arm in scores if len(scores[arm]) == most), key=lambda arm: mean(scores[arm]))


def behind(scores: Scores, points: float, spared: str | None = None) -> dict[str, tuple[str, Difference]]:
    """The arms whose whole interval of the difference to the best lies below -`points`: by each arm's own spread, over two
    seeds by that of all arms together."""
    top, out = best(scores), {}
    pooled = pooled_half(list(scores.values()))
    for arm in scores:
        if arm in (top, spared):
            continue
        found = paired(scores[arm], scores[top])
        if found.seeds == 2:
            found = found._replace(half=pooled)
        if 100 * (found.mean + found.half) < -points:
            out[arm] = (top, found)
    return out


def standing(arms: Sequence[str], scores: Scores, done: int, seeds: Seeds) -> Standing:
    """Who runs seed number `done`, after the seeds before it; an arm that lacks one of them (its run failed) does not."""
    now = Standing(list(arms))
    for count in range(1, done + 1):
        seen = {arm: {s: v for s, v in scores.get(arm, {}).items() if s < count} for arm in now.active}
        now.active = [arm for arm in now.active if len(seen[arm]) == count]
        seen = {arm: seen[arm] for arm in now.active}
        if seen and count > 1 and seeds.stop_behind is not None:
            now.stopped |= behind(seen, seeds.stop_behind, seeds.baseline)
        now.active = [arm for arm in now.active if arm not in now.stopped]
        if count == seeds.first and seeds.last > seeds.first:
            ahead = sorted(now.active, key=lambda arm: -mean(seen[arm]))[: seeds.finalists]
            now.cut = [arm for arm in now.active if arm not in ahead and arm != seeds.baseline]
            now.active = [arm for arm in now.active if arm not in now.cut]
    return now

"""The controller's rules on recorded regimes: a hundred designs a minute, decided by the product's own code.

    python -m bench designs --record configs/demo.toml --budget 2810000 --out dense.json      # once, five budgets of compute
    python -m bench designs dense.json sparse.json [--set controller.imitation_share=0.12] [--set MARGIN=0]

`--record` imitates from the start of a budget to its end, and from `--shares` of the way explores to the end of it (weights
and moments are put back afterwards). At `--places` of each way, more of them early, it looks at held-out prompts and
demonstrations. Played is `BlockController` on what was found: the state of a run is how much was imitated and how much
explored, and between recorded ways rewards and their luck (both smoothed) and losses go linearly. A look is as noisy as a real
one (other prompts and demonstrations for each run, answers by lot), and the end is judged by its success without noise.

What that leaves out: how a run's own course differs from the recorded one, and exploring that is followed by more imitation
has its rewards added up. So a point between two designs is not to be believed before real runs have shown it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from amft_fast import config_file
from amft_fast.controller import BlockController, Controller, blocks
from amft_fast.held_out import HeldOut, luck_of_means
from amft_fast.run.build import build
from amft_fast.trainer import Trainer
from bench.results import environment, markdown_table

MEASURED = ("amft_fast", "bench/designs.py")
SHARES = (0.0, 0.06, 0.12, 0.24, 0.48)
FORGOTTEN = 0.06  # of the budget: where exploring has begun to tell more than how it was begun
CONSTANTS = ("MARGIN", "LATER_ASKED", "LONGEST", "MOST")  # of controller/blocks.py, that --set may name beside settings
# What is tried unless --set says something else: name, and what it changes.
DESIGNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as it is", {}),
    ("first block of 3 %", {"controller.imitation_share": 0.03}),
    ("first block of 12 %", {"controller.imitation_share": 0.12}),
    ("confidence 1", {"controller.confidence": 1.0}),
    ("confidence 3", {"controller.confidence": 3.0}),
    ("no margin", {"MARGIN": 0.0}),
    ("margin 6 %", {"MARGIN": 0.06}),
    ("later blocks must rise (0)", {"LATER_ASKED": 0.0}),
    ("later blocks must show (1)", {"LATER_ASKED": 1.0}),
    ("luck not asked", {"MOST": 99.0}),
    ("1.5 times what is not luck", {"MOST": 1.5}),
    ("2.5 times what is not luck", {"MOST": 2.5}),
    ("blocks of at most 1/8", {"LONGEST": 0.125}),
    ("blocks of at most 1/2", {"LONGEST": 0.5}),
    ("16 prompts a look", {"controller.look_prompts": 16}),
    ("200 prompts a look", {"controller.look_prompts": 200}),
    ("32 demonstrations a look", {"controller.look_demos": 32}),
    ("by rewards alone", {"demos": False}),
    ("by lot", {"controller.signal": "lot"}),
)


# ----------------------------------------------------------------------------------------------------------- recording


class ByHand(Controller):
    """μ as it was set, and no looks of its own."""

    def __init__(self) -> None:
        self.value = 1.0

    def mu(self, clock: float) -> float:
        return self.value

    def wants_look(self, step: int, clock: float) -> bool:
        return False


class Recorder:
    """Drives one trainer along the ways of a regime."""

    def __init__(self, path: str, flags: list[str], log: Callable[[str], None]) -> None:
        flags = ["--train.method", "amft", "--controller.look_prompts", "200", "--controller.look_demos", "256", *flags]
        self.cfg = config_file.load(path, flags)
        self.trainer, self.log = Trainer(self.cfg, build(self.cfg, lambda: False)), log
        self.trainer.controller = self.hand = ByHand()

    def look(self) -> dict[str, Any]:
        t = self.trainer
        samples, held_out, tokens = t.looks.take(t.step)
        t.updates, demos = t.updates_of_a_step(samples), max(len(held_out.nll), 1)
        self.tokens_of_a_look = {
            "prompt": held_out.sampled / len(held_out.rewards),
            "demo": (tokens - held_out.sampled) / demos,
        }
        return {
            "rewards": held_out.rewards.round(4).tolist(),
            "luck": None if math.isnan(held_out.luck) else round(held_out.luck, 4),
            "nll": held_out.nll.round(4).tolist(),
        }

    def go(self, mu: float, tokens: int) -> None:
        """So many tokens of imitating (μ = 1) or exploring."""
        self.hand.value, end = mu, self.trainer.tokens + tokens
        while self.trainer.tokens < end:
            self.trainer.train_step()

    def record(self, budget: int, shares: Sequence[float], places: int) -> dict[str, Any]:
        """All ways of a budget of tokens, in shares of it."""
        t, at = self.trainer, (np.arange(places + 1) / places) ** 2  # most happens early
        starts = {int(np.abs(at - share).argmin()) for share in shares}
        imitated, explored = [{"at": 0.0, **self.look()}], {}
        for place in range(places + 1):
            if place:
                self.go(1.0, round(budget * (at[place] - at[place - 1])))
                imitated.append({"at": at[place], **self.look()})
                self.log(f"imitated {at[place]:.0%}: {100 * np.mean(imitated[-1]['rewards']):.1f} %")
            if place in starts and place < places:
                kept = t.engine.snapshot()
                explored[f"{at[place]:.6g}"] = way = []
                ends = [*at[1:][at[1:] < 0.999 * (1 - at[place])], 1 - at[place]]
                for before, end in zip([0.0, *ends], ends):
                    self.go(0.0, round(budget * (end - before)))
                    way.append({"at": end, **self.look()})
                self.log(f"explored from {at[place]:.0%}: {100 * np.mean(way[-1]['rewards']):.1f} %")
                t.engine.restore(kept)
                t.rollouts.replace()
        costs = {name: tokens / budget for name, tokens in self.tokens_of_a_look.items()}
        return {"imitated": imitated, "explored": explored, "look": costs}


# ------------------------------------------------------------------------------------------------------------- playing


class World:
    """A recorded regime: mean rewards and losses after any share imitated and any explored from there."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.name, self.config, self.flags = recorded["name"], recorded["config"], recorded["flags"]
        self.look = recorded["look"]
        answers = config_file.load(self.config, self.flags).meta.num_generations
        ways = [recorded["imitated"], *recorded["explored"].values()]
        self.at = np.array([p["at"] for p in recorded["imitated"]])
        self.rewards = smoothed([np.mean(p["rewards"]) for p in recorded["imitated"]])
        self.luck = smoothed([_luck(p, answers) for p in recorded["imitated"]])
        self.nll = np.array([p["nll"] for p in recorded["imitated"]])  # [places, demonstrations]
        self.shares = np.array([float(share) for share in recorded["explored"]])
        self.ways = []  # from each share: places, mean rewards, losses [places, demonstrations], luck
        for share, way in zip(self.shares, recorded["explored"].values()):
            places = np.array([0.0, *(p["at"] for p in way)])
            rewards = smoothed([self._on(self.rewards, share), *(np.mean(p["rewards"]) for p in way)])
            losses = np.array([self._on(self.nll, share), *(p["nll"] for p in way)])
            luck = smoothed([self._on(self.luck, share), *(_luck(p, answers) for p in way)])
            self.ways.append((places, rewards, losses, luck))
        # How hard each prompt is, beside how good the policy is: in log-odds, over all looks.
        means = np.mean([p["rewards"] for way in ways for p in way], axis=0).clip(0.01, 0.99)
        odds = np.log(means / (1 - means))
        self.hardness = odds - odds.mean()

    def _on(self, values: np.ndarray, share: float) -> np.ndarray:
        """Of the way that imitates, at a share of it."""
        return between(self.at, values, share)

    def _after(self, which: int, s: float, e: float) -> np.ndarray:
        """After exploring for e from where s was imitated, between the recorded ways (1: rewards, 2: losses, 3: luck). What the
        way that imitates has at s beside the line between theirs is forgotten as exploring goes on."""
        k = min(max(int(np.searchsorted(self.shares, s, side="right")), 1), len(self.shares) - 1)
        low, high = self.shares[k - 1], self.shares[k]
        part = min(max((s - low) / (high - low), 0.0), 1.0)
        beside = self._on((self.rewards, self.nll, self.luck)[which - 1], s)
        less, more = self.ways[k - 1], self.ways[k]
        now, start = (
            (1 - part) * between(less[0], less[which], at) + part * between(more[0], more[which], at) for at in (e, 0.0)
        )
        return now + (beside - start) * np.exp(-e / FORGOTTEN)

    def success(self, s: float, e: float) -> float:
        """Mean reward, 0 to 1."""
        return float(np.clip(self._after(1, s, e), 0, 1))

    def losses(self, s: float, e: float) -> np.ndarray:
        return np.maximum(self._after(2, s, e), 1e-4)

    def prompts(self, s: float, e: float, hardness: np.ndarray) -> np.ndarray:
        """The chance of each prompt's answers: over all recorded prompts their mean is `success`, and their variance leaves to
        luck what was recorded."""
        goal, luck = self.success(s, e), float(np.clip(self._after(3, s, e), 0.02, 0.999))

        def with_spread(spread: float) -> tuple[float, float]:
            odds = spread * self.hardness
            shift = bisected(lambda x: _sigmoid(x + odds).mean() < goal, -60.0, 60.0)
            return shift, _luck_of_chances(_sigmoid(shift + odds))

        spread = bisected(lambda x: with_spread(x)[1] > luck, 0.0, 50.0, 18)
        return _sigmoid(with_spread(spread)[0] + spread * hardness)

    def best(self) -> tuple[float, float]:
        """(success, share) of the best place to leave imitation for exploring, known afterwards; no looks to pay."""
        return max((self.success(s, 1 - s), s) for s in np.linspace(0, 1, 51))


def between(at: np.ndarray, values: np.ndarray, x: float) -> np.ndarray:
    """The values [places, ...] at x, linear between places and as at the last one beyond it."""
    i = min(max(int(np.searchsorted(at, x, side="right")), 1), len(at) - 1)
    part = min(max((x - at[i - 1]) / (at[i] - at[i - 1]), 0.0), 1.0)
    return values[i - 1] + part * (values[i] - values[i - 1])


def smoothed(values: Sequence[float], width: float = 1.5) -> np.ndarray:
    """A course without the noise of its looks: at each place a line through its neighbours, whose weights are a bell's."""
    y, k = np.asarray(values, float), np.arange(len(values))
    out = []
    for i in k:
        w = np.exp(-(((k - i) / width) ** 2) / 2)
        x = k - (w * k).sum() / w.sum()
        slope = (w * x * y).sum() / max((w * x * x).sum(), 1e-12)
        out.append((w * y).sum() / w.sum() + slope * x[i])
    return np.array(out)


def bisected(below: Callable[[float], bool], low: float, high: float, times: int = 30) -> float:
    """Where `below` ceases to hold."""
    for _ in range(times):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def _luck(look: dict[str, Any], answers: int) -> float:
    """Of a recorded look; of those before it was recorded, as rewards of 0 and 1 have it. 1 where nothing was earned."""
    if look.get("luck") is not None:
        return look["luck"]
    rewards = np.array(look["rewards"])
    luck = luck_of_means(rewards, float((rewards * (1 - rewards)).mean()) * answers / (answers - 1), answers)
    return 1.0 if math.isnan(luck) else luck


def _luck_of_chances(p: np.ndarray) -> float:
    within = (p * (1 - p)).mean()
    return float(within / max(within + p.var(), 1e-12))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Played(NamedTuple):
    success: float
    imitated: float  # shares of the budget in the weights at the end
    explored: float
    looks: float


class Design:
    """A BlockController of a regime's config with some of its settings or constants changed."""

    def __init__(self, world: World, changed: dict[str, Any]) -> None:
        flags = [x for k, v in changed.items() if "." in k for x in (f"--{k}", str(v))]
        self.world, self.cfg = world, config_file.load(world.config, ["--train.method", "amft", *world.flags, *flags])
        self.constants = {name: changed.get(name, getattr(blocks, name)) for name in CONSTANTS}
        self.reads_demos = changed.get("demos", True)

    def play(self, seed: int) -> Played:
        with patch.multiple(blocks, **self.constants):
            return self._play(np.random.default_rng(seed), seed)

    def _play(self, rng: np.random.Generator, seed: int) -> Played:
        world, cfg = self.world, self.cfg.model_copy(deep=True)
        cfg.run.seed = seed  # of its lot
        n, demos = len(world.hardness), world.nll.shape[1] if self.reads_demos else 0
        hardness = world.hardness[rng.permutation(n)[: cfg.prompts_of_a_look]]
        read = rng.permutation(demos)[: cfg.demos_of_a_look]
        control, steps = BlockController(cfg), cfg.train.steps
        clock = s = e = looks = 0.0
        kept = (s, e)
        while steps - clock > 1e-6:
            if control.wants_look(int(clock), clock):
                chance = world.prompts(s, e, hardness)
                right = rng.binomial(1, chance[:, None], (len(chance), cfg.meta.num_generations))
                nll = world.losses(s, e)[read] if demos and control.reads_demos else np.zeros(0)
                cost = len(hardness) * world.look["prompt"] + len(nll) * world.look["demo"]
                looks, clock = looks + cost, min(clock + cost * steps, steps)
                verdict, _ = control.looked(HeldOut.of_answers(right, right, 0, nll), clock)
                kept, (s, e) = ((s, e), (s, e)) if verdict == "keep" else (kept, kept if verdict == "back" else (s, e))
            if demos and control.wants_validation(int(clock), clock):
                control.validated([-world.losses(s, e)[[i]] for i in read])
            done = min(1.0, steps - clock)  # a step
            clock += done
            if control.mu(clock) == 1:
                s += done / steps
            else:
                e += done / steps
                asked = cfg.train.prompts_per_step * cfg.rollout.num_generations
                control.explored(rng.random() < 1 - (1 - world.success(s, e)) ** asked)
        return Played(world.success(s, e), s, e, looks)


def table(worlds: Sequence[World], designs: Sequence[tuple[str, dict[str, Any]]], seeds: int) -> str:
    """Success in percent ± its standard deviation over runs, the mean share imitated; the largest mean shortfall to the best
    place to switch, which nobody knows beforehand and which pays no looks."""
    best = [world.best() for world in worlds]
    rows = [["the best switch, known afterwards", *(f"{100 * u:.1f} (at {s:.0%})" for u, s in best), "0"]]
    for name, changed in designs:
        cells, worst = [], 0.0
        for world, (most, _) in zip(worlds, best):
            design = Design(world, changed)
            played = [design.play(seed) for seed in range(seeds)]
            ends = 100 * np.array([p.success for p in played])
            cells.append(f"{ends.mean():.1f} ± {ends.std():.1f} ({np.mean([p.imitated for p in played]):.0%})")
            worst = min(worst, ends.mean() - 100 * most)
        rows.append([name, *cells, f"{worst:.1f}".replace("-", "−")])
    return markdown_table(["design", *(w.name for w in worlds), "worst"], rows)


def _set(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or (name not in CONSTANTS and "." not in name):
        raise argparse.ArgumentTypeError(
            f"takes controller.setting=value or one of {', '.join(CONSTANTS)}=value, got {text!r}"
        )
    return name, float(value) if name in CONSTANTS else value


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench designs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recorded", nargs="*", type=Path, help="regimes to play on")
    parser.add_argument("--record", metavar="CONFIG", help="a regime to record")
    parser.add_argument("--budget", type=int, help="tokens of a run of it")
    parser.add_argument("--shares", type=lambda x: [float(y) for y in x.split(",")], default=list(SHARES))
    parser.add_argument("--places", type=int, default=16, help="looks along a budget (default 16)")
    parser.add_argument("--name", help="of the regime (default: the config's)")
    parser.add_argument("--out", type=Path, help="where it is written")
    parser.add_argument("--seeds", type=int, default=50, help="runs of each design in each regime (default 50)")
    parser.add_argument(
        "--set",
        type=_set,
        action="append",
        default=[],
        help="one design, this changed, instead of all; of --record: of the run",
    )
    args = parser.parse_args(argv)
    flags = [x for name, value in args.set for x in (f"--{name}", str(value))]
    if args.record:
        if not args.budget or not args.out:
            parser.error("--record needs --budget and --out")
        log = partial(print, file=sys.stderr, flush=True)
        recorder = Recorder(args.record, flags, log)
        found = recorder.record(args.budget, args.shares, args.places)
        facts = {
            "benchmark": "designs",
            "environment": environment("cpu", MEASURED),
            "name": args.name or Path(args.record).stem,
        }
        facts |= {"config": args.record, "flags": flags, "budget": args.budget}
        args.out.write_text(json.dumps(facts | found) + "\n", encoding="utf-8")
        return 0
    if not args.recorded:
        parser.error("nothing to play on: name recorded regimes")
    worlds = [World(json.loads(path.read_text(encoding="utf-8"))) for path in args.recorded]
    designs = DESIGNS[:1] + (((", ".join(f"{k} {v}" for k, v in args.set)), dict(args.set)),) if args.set else DESIGNS
    print(table(worlds, designs, args.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

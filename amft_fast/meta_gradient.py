"""The meta-gradient: which of the two gradients helps the reward on held-out prompts, without a Hessian.

One real optimizer step is θ'(μ) = θ − η·Opt(∇L(θ; μ)), so to first order

    dU(θ')/dμ ≈ −η ⟨∇U, P ∘ (g_SFT − g_RL)⟩ = +η ⟨u, P ∘ (g_SFT − g_RL)⟩ ,     u = ∇(−U)

Everything here works with u, the gradient of the *loss* −U, as backward passes give it: a positive ⟨u, g_SFT⟩ means that a
step down the SFT loss also steps down −U. U is the expected reward on validation prompts; its gradient is the policy
gradient on cached rollouts of them,

    u = −(1/N) Σ_tokens  w_t A_i ∇log π(y_t) ,    w_t = min(π(y_t) / π_then(y_t), cap) detached,

with group-normalised advantages and truncated token-level importance weights against the log-probs that the rollouts were
sampled with. `utility = "nll"` takes held-out demonstrations instead; "hybrid" takes a demonstration for those prompts whose
group has no success, where the policy gradient vanishes and only imitation can help.

u comes as two independent halves (even and odd validation prompts): the signal's standard error is read off their difference.
The cache rolls: every new u redraws the oldest share of the rollouts, and all of them when the effective sample size of the
importance weights has fallen under `min_ess`. With `memory` > 0 only the groups just drawn enter a new gradient, and u is the
exponential average of these: the same pooling over time at the cost of the fresh groups alone, but with gradients at the
weights of then instead of importance weights to those of now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from amft_fast import objective
from amft_fast.advantages import group_advantages
from amft_fast.config import MetaConfig, ObjectiveConfig
from amft_fast.data.batch import Batch, TokenSequence
from amft_fast.data.pictures import PackedImages, unpack_images
from amft_fast.engine.parts import Part, Tensors
from amft_fast.interfaces import Demo, Item, Sample, Turn, UpdateEngine
from amft_fast.model.policy import SUMS
from amft_fast.rollout.encoder import Encoder

Draw = Callable[[list[Item], int], list[Sample]]


@dataclass
class RolloutGroup:
    """The rollouts of one validation prompt, and the step they were drawn at."""

    item: int
    step: int
    samples: list[Sample]


class RolloutCache:
    """Rollouts of the held-out prompts, refreshed a share at a time, oldest first."""

    def __init__(self, items: list[Item], refresh_share: float) -> None:
        self.items, self.refresh_share = items, refresh_share
        self.groups: list[RolloutGroup] = []

    def refresh(self, step: int, draw: Draw, everything: bool = False) -> int:
        """Redraws the oldest share (all of it at first, or when asked); returns how many groups were drawn.

        When `draw` raises, the cache is as it was.
        """
        if not self.groups or everything:
            stale = list(range(len(self.items)))
            groups = [RolloutGroup(i, -1, []) for i in stale]
        else:
            groups = list(self.groups)
            count = -(-len(self.items) * self.refresh_share // 1)
            oldest = sorted(range(len(groups)), key=lambda i: (groups[i].step, i))
            stale = sorted(oldest[: int(count)])
        samples = draw([self.items[groups[i].item] for i in stale], step)
        per = len(samples) // max(len(stale), 1)
        for n, i in enumerate(stale):
            groups[i] = RolloutGroup(groups[i].item, step, samples[n * per : (n + 1) * per])
        self.groups = groups
        return len(stale)

    def state_dict(self) -> list[dict[str, Any]]:
        """All cached rollouts as JSON values: importance weights need the very tokens and log-probs."""
        keep = ("reward", "success", "prompt_id")
        state = []
        for g in self.groups:
            pack = PackedImages()
            samples = [
                s.lists()
                | {k: getattr(s, k) for k in keep}
                | {"turns": [asdict(t) for t in s.turns], "images": pack.put(s.images)}
                for s in g.samples
            ]
            state.append({"item": g.item, "step": g.step, "samples": samples, "images": pack.packed})
        return state

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.groups = []
        for g in state:
            images = unpack_images(g.get("images", ()))
            samples = [
                Sample(
                    **(
                        s
                        | {
                            "turns": [Turn(**t) for t in s["turns"]],
                            "images": tuple(images[i] for i in s.get("images", ())),
                        }
                    ),
                    weight_version=g["step"],
                    finish_reason="stop",
                    group_id=g["item"],
                )
                for s in g["samples"]
            ]
            self.groups.append(RolloutGroup(g["item"], g["step"], samples))


@dataclass(frozen=True)
class Utility:
    """The two halves of u = ∇(−U) (lists of flat shards, as the engine gives them) and what they were made of."""

    halves: tuple[list[torch.Tensor], list[torch.Tensor]]
    figures: dict[str, float]


class UtilityGradient:
    """Makes u from the rolling cache; owns the cache and the u of the present window, `current`."""

    def __init__(
        self,
        cfg: MetaConfig,
        items: list[Item],
        demos: dict[str, Demo],
        encoder: Encoder,
        engine: UpdateEngine,
        batches: Callable[[list[TokenSequence]], Iterable[Batch]],
        temperature: float,
    ) -> None:
        self.cfg, self.encoder, self.engine = cfg, encoder, engine
        self.batches, self.temperature = batches, temperature
        self.cache = RolloutCache(items, cfg.refresh_share)
        self.demos = demos
        self.tokens = 0  # sampled and trained on for the last u
        self.current: Utility | None = None
        self.average: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None  # of u, with memory
        self.weight = 0.0  # groups that the average stands for
        self.at: int | None = None  # the step that `current` was made at
        # On-policy form (old = None): the detached current log-prob stands for old, so the importance weight against the
        # log-probs sampled with is the truncated TIS weight, and nothing is clipped.
        self.objective = ObjectiveConfig(entropy_coef=0.0, tis_cap=cfg.is_cap)

    def compute(self, step: int, draw: Draw) -> Utility:
        """u at the present weights. The engine's gradients must be clear; they are clear again afterwards.

        When `draw` or `batches` raises, the cache is as it was: made again, u is of the same rollouts. Asked for again at the
        same step, whose update was broken off, it is the same u.
        """
        if self.at == step and self.current is not None:
            return self.current
        before = self.cache.groups
        try:
            self.current, self.at = self._compute(step, draw), step
            return self.current
        except BaseException:
            self.cache.groups = before
            raise

    def _compute(self, step: int, draw: Draw) -> Utility:
        self.tokens = drawn = 0
        if self.cfg.utility == "nll":
            return self._finish(self._gradient(range(len(self.cache.items)), drawn))
        drawn = self._refresh(step, draw)
        if self.cfg.memory > 0:
            fresh = [i for i, g in enumerate(self.cache.groups) if g.step == step]
            return self._finish(self._remember(self._gradient(fresh, drawn), len(fresh)))
        everything = range(len(self.cache.groups))
        utility = self._gradient(everything, drawn)
        if drawn < len(self.cache.groups) and utility.figures["ess"] < self.cfg.min_ess:
            drawn += self._refresh(step, draw, everything=True)
            utility = self._gradient(everything, drawn)
        return self._finish(utility)

    def _finish(self, utility: Utility) -> Utility:
        return Utility(utility.halves, utility.figures | {"tokens": self.tokens})

    def _remember(self, utility: Utility, groups: int) -> Utility:
        """Folds the gradient of the fresh groups into the average; a group counts `memory` times less each window."""
        self.weight = self.cfg.memory * self.weight + groups
        if self.average is None:
            self.average = utility.halves
        else:
            for mean, new in zip(self.average, utility.halves):
                torch._foreach_lerp_(mean, new, groups / self.weight)
        return Utility(self.average, utility.figures)

    def _refresh(self, step: int, draw: Draw, everything: bool = False) -> int:
        drawn = self.cache.refresh(step, draw, everything)
        self.tokens += sum(sum(s.loss_mask) for g in self.cache.groups if g.step == step for s in g.samples)
        return drawn

    def _gradient(self, indices: Iterable[int], drawn: int) -> Utility:
        """u on the prompts at these places of the cache."""
        halves, sums, counts = [], 0.0, {"useful_groups": 0, "demo_groups": 0}
        for half in (0, 1):
            sequences = self._sequences([i for i in indices if i % 2 == half], counts)
            self.tokens += sum(len(s.ids) for s in sequences)
            for batch in self.batches(sequences):
                sums = sums + self.engine.backward(batch, self.objective).sums
            halves.append(self.engine.take_gradient())
        return Utility((halves[0], halves[1]), self._figures(sums, counts, drawn))

    def _sequences(self, indices: list[int], counts: dict[str, int]) -> list[TokenSequence]:
        """The sequences of one half with their weights. Groups without spread add nothing and are left out."""
        if self.cfg.utility == "nll":
            chosen = [self.cache.items[i] for i in indices]
            demos = [self.demos[item.id] for item in chosen if item.id in self.demos]
            return self._weigh(self._demo_sequences(demos), 1.0, objective.weigh_sft)
        groups = [self.cache.groups[i] for i in indices]
        useful = [g for g in groups if max(s.reward for s in g.samples) > min(s.reward for s in g.samples)]
        counts["useful_groups"] += len(useful)
        tokens = sum(sum(s.loss_mask) for g in groups for s in g.samples)
        out = self._reward_sequences(useful, max(tokens, 1))
        if self.cfg.utility == "hybrid":
            failed = [self.cache.items[g.item].id for g in groups if not any(s.success for s in g.samples)]
            demos = [self.demos[i] for i in failed if i in self.demos]
            counts["demo_groups"] += len(demos)
            share = self.cfg.demo_weight * len(demos) / max(len(groups), 1)
            out += self._weigh(self._demo_sequences(demos), share, objective.weigh_sft)
        return out

    def _reward_sequences(self, groups: list[RolloutGroup], tokens: int) -> list[TokenSequence]:
        samples = [s for g in groups for s in g.samples]
        if not samples:
            return []
        sequences = [objective.rollout_sequence(s, self.temperature) for s in samples]
        rewards = np.array([s.reward for s in samples])
        ids = np.repeat(np.arange(len(groups)), [len(g.samples) for g in groups])
        advantages = group_advantages(rewards, ids, "grpo")
        return [s.with_fields(advantages=a, pg_weight=1 / tokens) for s, a in zip(sequences, advantages)]

    def _demo_sequences(self, demos: list[Demo]) -> list[TokenSequence]:
        return [objective.demo_sequence(*self.encoder.demo(d)) for d in demos]

    @staticmethod
    def _weigh(sequences: list[TokenSequence], share: float, weigh: Callable) -> list[TokenSequence]:
        return weigh(sequences, share, sum(int(s.trained.sum()) for s in sequences))

    def _figures(self, sums: Any, counts: dict[str, int], drawn: int) -> dict[str, float]:
        """The cache's health. One transfer from the device per u, that is once in a window of steps."""
        sums = self.engine.all_reduce(sums) if torch.is_tensor(sums) else sums
        s = dict(zip(SUMS, sums.tolist())) if torch.is_tensor(sums) else dict.fromkeys(SUMS, 0.0)
        n = s["rl_tokens"]
        ess = s["is_weight"] ** 2 / (s["is_weight_sq"] * n) if n else 1.0
        samples = [x for g in self.cache.groups for x in g.samples]
        return {
            "ess": ess,
            "drawn": drawn,
            "success": sum(x.success for x in samples) / max(len(samples), 1),
            **counts,
        }

    # ------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        figures = self.current.figures if self.current is not None else {}
        made = {"utility_at": self.at, "utility_figures": figures}
        return {"utility_weight": self.weight, "cache": self.cache.state_dict(), **made}

    def tensors(self) -> dict[str, torch.Tensor | Part]:
        """The two halves of the present u, this rank's parts: a window may be half over, and its u belongs to weights that
        are gone."""
        if self.current is None:
            return {}
        named = ((i, self.engine.by_name(half)) for i, half in enumerate(self.current.halves))
        return {f"utility.{i}.{piece.name}": piece.saved_data(u) for i, pieces in named for piece, u in pieces}

    def load(self, state: dict[str, Any], tensors: Tensors) -> None:
        """Takes up what `state_dict` and `tensors` gave."""
        self.weight = state["utility_weight"]
        self.cache.load_state_dict(state["cache"])
        if any(k.startswith("utility.") for k in tensors):
            halves = tuple(self.engine.from_names(tensors, f"utility.{i}.") for i in (0, 1))
            # Checkpoints of earlier versions say neither when u was made nor of what.
            self.at, figures = state.get("utility_at"), state.get("utility_figures", {})
            self.current, self.average = Utility(halves, figures), halves

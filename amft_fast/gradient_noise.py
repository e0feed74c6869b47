"""How noisy a step's two gradients are, and how far they lie apart: what the method gac weighs (controller.NoiseOptimal).

Each is taken in two independent halves of the step, s₁ and s₂ of L_SFT, r₁ and r₂ of L_RL. Their memory is four
gradient shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from amft_fast.data.batch import TokenSequence
from amft_fast.interfaces import UpdateEngine

Half = tuple[list[TokenSequence], list[TokenSequence]]  # weighed sequences of L_SFT and of L_RL


def measure(
    halves: Sequence[Half], sweep: Callable[[list[TokenSequence]], Any], engine: UpdateEngine
) -> tuple[float, float, float]:
    """|s₁ − s₂|², |r₁ − r₂|² and ⟨s₁ − r₁, s₂ − r₂⟩, of all ranks. The engine's gradients must be clear; they are clear again
    afterwards. `sweep` runs the backward passes of these sequences."""
    (s1, r1), (s2, r2) = (tuple(_gradient(part, sweep, engine) for part in half) for half in halves)
    sums = torch.stack([_dot(s1, s2, s1, s2), _dot(r1, r2, r1, r2), _dot(s1, r1, s2, r2)])
    sft, rl, apart = engine.all_reduce(sums.to(engine.device)).tolist()
    return sft, rl, apart


def _gradient(
    sequences: list[TokenSequence], sweep: Callable[[list[TokenSequence]], Any], engine: UpdateEngine
) -> list[torch.Tensor]:
    sweep(sequences)
    return engine.take_gradient()


def _dot(a: list[torch.Tensor], b: list[torch.Tensor], c: list[torch.Tensor], d: list[torch.Tensor]) -> torch.Tensor:
    """⟨a − b, c − d⟩ over this rank's shards, in fp64."""
    return sum(((p - q).double() * (x - y).double()).sum() for p, q, x, y in zip(a, b, c, d))

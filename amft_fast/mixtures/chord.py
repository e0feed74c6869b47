"""CHORD-φ (arXiv 2508.11408): demonstrations beside the rollouts, each token weighed by φ = p(1 − p), a constant.

    L = μ · mean(−φ log π) + (1 − μ) · L_RL,     μ = 0.1

What the policy is sure of, and what it would never say, is left alone. (CHORD-μ is the plain mixture with a μ that falls.)
"""

from __future__ import annotations

from amft_fast.data.batch import TokenSequence
from amft_fast.mixtures.base import Group, Mix, Mixture


class ChordPhi(Mixture):
    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        return super().mix([d.with_fields(token_weight=0.0, shape_weight=1.0) for d in sft], groups, mu)

"""HPT and SuperRL: prompt by prompt, imitate where the policy fails, explore elsewhere.

    k of n right:  k ≤ γ → the prompt's rollouts are dropped and its demonstration is imitated; else RL on its rollouts
    L = (P_sft / P) · c · L_SFT + (P_rl / P) · L_RL,     P prompts of the update

so each prompt counts once, however many of them are imitated. HPT (arXiv 2509.04419) has γ and c, and advantages
without standard deviation; SuperRL (arXiv 2506.01096) γ = 0, c = 1, and the advantages of `advantage.kind`.
"""

from __future__ import annotations

from amft_fast.data.batch import TokenSequence
from amft_fast.mixtures.base import Group, Mix, Mixture


class SuperRl(Mixture):
    streams = False

    @property
    def gate(self) -> tuple[int, float]:
        """γ and c."""
        return 0, 1.0

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        (most, weight), demos, rl = self.gate, [], []
        for group in groups:
            demo = self.tools.demo(group.prompt_id) if group.solved <= most else None
            if demo is not None:
                demos.append(demo)
            else:
                rl += group.rollouts
        share = len(demos) / max(len(groups), 1)
        return Mix(demos, rl, share, weight * share, 1 - share)


class Hpt(SuperRl):
    kind = "dr_grpo"

    @property
    def gate(self) -> tuple[int, float]:
        return self.c.hpt_gate, self.c.hpt_demo_weight

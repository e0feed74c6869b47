"""ReLIFT (arXiv 2506.07527): RL on all prompts; those that no answer solved wait in a buffer, and a full buffer is imitated.

At `relift_buffer` prompts one update of its own on their demonstrations, oldest first: mean NLL − 0.001 · H. (The authors take
the newest first, so that old ones wait for ever, and give this update an Adam of its own; here it is the run's optimizer.)
"""

from __future__ import annotations

from typing import Any

from amft_fast.data.batch import TokenSequence
from amft_fast.mixtures.base import Group, Mix, Mixture


class Relift(Mixture):
    streams = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waiting: list[str] = []  # ids of prompts, oldest first, each once

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        for group in groups:
            known = group.prompt_id in self.waiting or self.tools.demo(group.prompt_id) is None
            if group.solved == 0 and not known:
                self.waiting.append(group.prompt_id)
        return super().mix([], groups, 0.0)

    def extra(self) -> list[Mix]:
        size, updates = self.c.relift_buffer, []
        while len(self.waiting) >= size:
            taken, self.waiting = self.waiting[:size], self.waiting[size:]
            demos = [self.tools.demo(i).with_fields(entropy_bonus=self.c.relift_entropy) for i in taken]
            updates.append(Mix(demos, [], 1.0, 1.0, 0.0))
        return updates

    def state_dict(self) -> list[str]:
        return self.waiting

    def load_state_dict(self, state: list[str] | None) -> None:
        self.waiting = list(state or ())

"""UFT and Prefix-RFT: the policy goes on from where a part of the demonstration ends.

UFT (arXiv 2505.16984): all answers to a prompt begin with the first L of 5 pieces of its demonstration,

    L ~ Bin(5, p_t),   p_t from 0.95 to 0.05 along a cosine over the first 60 % of the run, then no hint
    L = 0.001 · NLL of the hint + L_RL of the continuations

Prefix-RFT (arXiv 2507.01679): one answer of the group begins with a prefix, whose share falls along a cosine from 95 to
5 %; it is trained on like any other, and with it those 20 % of the prefix's tokens that the policy is least sure of. Advantages
are r − mean.
"""

from __future__ import annotations

import numpy as np

from amft_fast import objective
from amft_fast.data.batch import TokenSequence
from amft_fast.data.stream import sample_seed
from amft_fast.interfaces import Item
from amft_fast.methods import cosine
from amft_fast.mixtures.base import Group, Mix, Mixture


class Hinting(Mixture):
    streams = False

    def _first(self, item: Item, share: float) -> list[int]:
        """The first tokens of the demonstration's answer, never its end."""
        demo = self.tools.demo(item.id)
        if demo is None:
            return []
        start = int(demo.trained.argmax())
        run = demo.trained[start:]
        answer = demo.ids[start:][: len(run) if run.all() else int((~run).argmax())]  # of several turns, the first
        return [int(i) for i in answer[: min(int(len(answer) * share + 1e-9), len(answer) - 1)]]


class Uft(Hinting):
    def hint(self, item: Item, number: int, step: int) -> list[int]:
        c = self.c
        if self.progress >= c.uft_share:
            return []
        p = cosine(self.progress / c.uft_share, *c.uft_probability)
        lots = np.random.default_rng(sample_seed(self.cfg.run.seed, "uft", step, item.id))
        return self._first(item, lots.binomial(c.uft_pieces, p) / c.uft_pieces)

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        hinted = [g.samples[0] for g in groups if g.samples[0].hint]
        hints = [objective.demo_sequence(s.prompt_ids, s.response_ids[: s.hint]) for s in hinted]
        return super().mix(hints, groups, 0.0)._replace(sft_weight=self.c.uft_hint_weight, rl_weight=1.0)


class PrefixRft(Hinting):
    kind = "dr_grpo"

    def hint(self, item: Item, number: int, step: int) -> list[int]:
        last = number % self.generations == self.generations - 1
        return self._first(item, cosine(self.progress, *self.c.prefix_share)) if last else []

    def mix(self, sft: list[TokenSequence], groups: list[Group], mu: float) -> Mix:
        pairs = [pair for g in groups for pair in zip(g.samples, g.rollouts)]
        prefixes = []
        for sample, s in pairs:
            place, start = np.arange(len(s.ids)), len(sample.prompt_ids)
            inside = (place >= start) & (place < start + sample.hint)
            prefixes.append(TokenSequence(s.ids, inside, {"temperature": s.fields["temperature"]}, s.images))
        rl = [
            _with_prefix(s, *x, self.c.prefix_entropy_share)
            for (_, s), x in zip(pairs, zip(prefixes, self.tools.tokens(prefixes)))
        ]
        return Mix([], rl, 0.0, 0.0, 1.0)


def _with_prefix(
    s: TokenSequence, prefix: TokenSequence, scores: tuple[np.ndarray, np.ndarray], share: float
) -> TokenSequence:
    """The rollout, its prefix's tokens of highest entropy trained on too; what they had been drawn with is the present
    policy."""
    logprobs, entropy = scores
    if not len(entropy):
        return s
    least = np.sort(entropy)[-max(1, round(share * len(entropy)))]
    chosen = np.flatnonzero(prefix.trained)[entropy >= least]
    trained, fields = s.trained.copy(), {}
    trained[chosen] = True
    for name in ("behavior_logprobs", "old_logprobs", "ref_logprobs"):
        if name in s.fields:
            fields[name] = s.fields[name].copy()
            fields[name][chosen] = logprobs[entropy >= least]
    return TokenSequence(s.ids, trained, {**s.fields, **fields}, s.images)

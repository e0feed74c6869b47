"""Forward passes that train nothing: old and reference log-probs, values, entropies, H*; and what a loss reads of a rollout.

old       log π of the policy as it was before the step's first update: the denominator of ρ in all later ones
reference log π of the policy after the warm-up, for the KL term
values    of the value head, for gae
H*        mean entropy of the warmed-up policy on its own rollouts at temperature 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from amft_fast import losses, objective
from amft_fast.config import Config
from amft_fast.data.batch import Batch, TokenSequence, micro_batches, scatter
from amft_fast.engine.flat import KeptFactors
from amft_fast.engine.parts import Part, Tensors
from amft_fast.interfaces import Sample, UpdateEngine
from amft_fast.model import attention
from amft_fast.model.policy import Policy, Scores, fill


class Scorer:
    """Scores sequences with the policy or its reference, in the micro-batches that updates use too."""

    def __init__(self, cfg: Config, engine: UpdateEngine, policy: Policy, teacher: nn.Module | None = None) -> None:
        self.cfg, self.engine, self.policy, self.teacher = cfg, engine, policy, teacher
        self.reference: nn.Module | KeptFactors | None = (
            None  # the policy after the warm-up, frozen, where something needs it
        )
        self.before_batch: Callable[[], object] = lambda: None  # a run may be stopped there, by an exception

    @property
    def packed(self) -> bool:
        """As the config says, else where the attention takes packed rows without a dense mask."""
        packing = self.cfg.train.packing
        return attention.packs(self.policy.model.config) if packing is None else packing

    def batches(self, sequences: list[TokenSequence]) -> Iterator[Batch]:
        """This rank's micro-batches of sequences that all ranks hold: equally many on each. Ranks that share a row have the
        same ones, as many times as large."""
        world, shared = self.engine.world, self.engine.sequence.size
        for batch in micro_batches(
            sequences,
            shared * self.cfg.train.micro_batch_tokens,
            self.packed,
            rank=world.rank // shared,
            ranks=world.size // shared,
        ):
            self.before_batch()
            yield batch

    def forward_only(
        self,
        sequences: list[TokenSequence],
        model: nn.Module | KeptFactors | None = None,
        temperature: float | None = None,
    ) -> list[Scores]:
        """Log-probs, entropies and values of all trained tokens, without gradients; on every rank those of all ranks."""
        world, sequence, scores = self.engine.world, self.engine.sequence, []
        for b in self.batches(sequences):
            o = self.engine.logprobs(b, model, temperature)
            scores.append(Scores(b.members, b.counts, o.logprobs, o.entropy, o.values))
        if world.size == 1:
            return scores
        return world.gather([s.cpu() for s in scores if s.members and sequence.main])  # one of those that share them

    def judge(self, samples: list[Sample], kind: str | None = None, step: int = 0) -> list[TokenSequence]:
        """Rollouts as sequences with all that the loss reads: advantages, and old and reference log-probs where needed.

        `kind`: of advantage, in place of the setting; `step`: the version of the present weights.
        """
        cfg = self.cfg
        oldest = None if cfg.objective.max_staleness is None else step - cfg.objective.max_staleness
        advantage = cfg.advantage.model_copy(update={"kind": kind}) if kind else cfg.advantage
        rl = [objective.rollout_sequence(s, cfg.rollout.temperature, oldest) for s in samples]
        if not rl:
            return rl
        gae = cfg.advantage.kind == "gae"
        # One update per rollout is on-policy by construction: the ratio is 1 and old log-probs would be a wasted pass,
        # but where another engine than the trainer's has sampled and the loss looks at what lies between the two.
        foreign = cfg.rollout.engine != "transformers" and cfg.objective.reads_logprobs
        if cfg.off_policy or foreign or gae:
            scores = self.forward_only(rl)
            if cfg.off_policy or foreign:
                scatter(rl, scores, [s.logprobs for s in scores], "old_logprobs")
            if gae:
                scatter(rl, scores, [s.values for s in scores], "values")
        if cfg.objective.kl_coef > 0:
            scores = self.forward_only(rl, self.reference)
            scatter(rl, scores, [s.logprobs for s in scores], "ref_logprobs")
        kl = (cfg.objective.kl_coef, cfg.objective.kl_kind) if cfg.objective.kl_in == "reward" else (0.0, "k1")
        objective.set_advantages(rl, samples, advantage, cfg.rollout.max_new_tokens, kl)
        if self.teacher is not None:
            scores = self.forward_only(rl, self.teacher)
            scatter(rl, scores, [s.logprobs for s in scores], "teacher_logprobs")
            objective.add_teacher(rl, cfg.advantage.teacher_coef)
        for sample, sequence in zip(samples, rl):
            sample.advantage = float(sequence.fields["advantages"][sequence.trained].mean())
        if cfg.advantage.truncated == "masked":
            for sample, sequence in zip(samples, rl):
                sequence.trained &= sample.finish_reason != "length"
        return rl

    def fold(self, rl: list[TokenSequence], moved: bool, seed: tuple[object, ...]) -> list[TokenSequence]:
        """The rollouts of one update as the loss head takes them: what hangs on whole sequences or the batch is in their
        advantages (losses.py). `moved`: whether an update came since the old log-probs were taken."""
        o = self.cfg.objective
        rl = [s for s in rl if s.trained.any()]  # answers that were cut may be masked whole
        demos, rl = [s for s in rl if objective.is_demo(s)], [s for s in rl if not objective.is_demo(s)]
        if o.reads_entropy or (moved and o.reads_logprobs):
            scores = self.forward_only(rl)
            scatter(rl, scores, [s.logprobs for s in scores], "present_logprobs")
            scatter(rl, scores, [s.entropy for s in scores], "present_entropy")
        return losses.fold(rl, o, seed) + demos

    def tokens(self, sequences: list[TokenSequence]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probs and entropies of the trained tokens of each sequence, at the present weights."""
        copies = [s.with_fields(present_logprobs=0.0, present_entropy=0.0) for s in sequences]
        scores = self.forward_only(copies)
        scatter(copies, scores, [s.logprobs for s in scores], "present_logprobs")
        scatter(copies, scores, [s.entropy for s in scores], "present_entropy")
        return [(c.fields["present_logprobs"][c.trained], c.fields["present_entropy"][c.trained]) for c in copies]

    def entropy(self, sequences: list[TokenSequence], temperature: float | None = None) -> float:
        """Mean over tokens, in nats; at the temperature that the sequences were drawn at, or at another one."""
        outs = [s.entropy for s in self.forward_only(sequences, temperature=temperature)]
        return torch.cat(outs).double().mean().item()

    def figures(self, sft: list[TokenSequence], rl: list[TokenSequence]) -> dict[str, float]:
        """What only a pass of its own can tell of a step.

        `entropy` at temperature 1, as H* has it, where rollouts are drawn at another temperature. `implicit_reward/*`: mean
        over sequences of log π/π_ref along the whole answer, the reward that imitation implies (docs/method.md).
        """
        figures = {}
        if rl and self.cfg.rollout.temperature != 1:
            figures["entropy"] = self.entropy(rl, 1.0)
        if not self.cfg.log.implicit_reward or self.reference is None:
            return figures
        for name, sequences in (("demos", sft), ("rollouts", rl)):
            now, then = self.forward_only(sequences), self.forward_only(sequences, self.reference)
            total = sum((a.logprobs - b.logprobs).double().sum() for a, b in zip(now, then))
            if sequences:
                figures[f"implicit_reward/{name}"] = float(total) / len(sequences)
        return figures

    def keep_reference(self) -> None:
        """After the warm-up: the policy as it is now, for the KL term and the implicit reward."""
        if self.cfg.objective.kl_coef > 0 or self.cfg.log.implicit_reward:
            self.reference = self.engine.reference()

    def tensors(self) -> dict[str, torch.Tensor | Part]:
        """The reference, for a checkpoint: whole from rank 0, factors from every rank its part."""
        if isinstance(self.reference, KeptFactors):
            return {f"reference.{p.name}": p.saved_data(x) for p, x in self.engine.by_name(self.reference.flats)}
        if self.reference is None or not self.engine.world.main:
            return {}
        return {f"reference.{n}": p for n, p in self.reference.named_parameters()}

    def load_tensors(self, tensors: Tensors) -> None:
        names = [k for k in tensors if k.startswith("reference.")]
        if names:
            self.reference = self.engine.reference()
            if isinstance(self.reference, KeptFactors):
                self.reference = KeptFactors(self.engine.from_names(tensors, "reference."))
            else:
                fill(self.reference, ((k.removeprefix("reference."), tensors[k]) for k in names))

"""Who makes one and the same update in `bench step`: ours, plain transformers with an eager loss, TRL's GRPOTrainer.

Each candidate gets a model of its own with the same weights, and the same recorded rollouts. `backward()` leaves the gradient
of L = −(1/N) Σ min(ρA, clip(ρ)A), which the check compares; `update()` is that and the optimizer's step (AdamW, clipped).

Legend: B rows, P prompt columns, C answer columns.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from amft_fast import objective
from amft_fast.config import ObjectiveConfig, TrainConfig
from amft_fast.data.batch import TokenSequence, micro_batches
from amft_fast.engine.local import LocalEngine
from amft_fast.interfaces import Sample
from amft_fast.model import attention, layers
from amft_fast.model.policy import Policy
from bench.peers import LeftOut

CLIP, LR = 0.2, 1e-6


@dataclass
class Work:
    """A model's weights and the rollouts of one update, with their advantages; `max_tokens` bounds a micro-batch."""

    model: nn.Module
    samples: list[Sample]
    advantages: np.ndarray
    max_tokens: int

    @property
    def device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    @property
    def tokens(self) -> int:
        """Prompts and answers, each prompt counted with every answer to it, as a trainer without sharing reads them."""
        return sum(len(s.prompt_ids) + len(s.response_ids) for s in self.samples)

    @property
    def trained(self) -> int:
        return sum(len(s.response_ids) for s in self.samples)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_output_embeddings().weight.dtype

    def few(self, count: int) -> Work:
        """What gradients are compared on: in fp32 all of it, else the first rollouts."""
        if self.dtype == torch.float32:
            return self
        return replace(self, samples=self.samples[:count], advantages=self.advantages[:count])

    def true_gradients(self) -> list[torch.Tensor]:
        """Of an eager loop over the same weights in fp32."""
        wide = self if self.dtype == torch.float32 else replace(self, model=self.copy().float())
        loop = Eager(wide, 1 if wide is not self else len(self.samples))
        loop.backward()
        return [g.float() for g in loop.gradients()]

    @property
    def flat(self) -> float:
        """The share of the rollouts whose advantage is 0."""
        return float((self.advantages == 0).mean())

    def with_flat(self, share: float) -> Work:
        """With advantages of 0 in so many of the groups, and of none in the others."""
        groups = np.array([s.group_id for s in self.samples])
        names = np.unique(groups)
        chosen = names[np.linspace(0, len(names), round(share * len(names)), endpoint=False).astype(int)]
        rest = np.where(self.advantages == 0, 1.0, self.advantages)
        return replace(self, advantages=np.where(np.isin(groups, chosen), 0.0, rest))

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def padded(self, rows: int) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of so many rows as TRL's trainer makes them: prompts padded on the left, answers on the right."""
        wide_p, wide_c = (max(len(getattr(s, n)) for s in self.samples) for n in ("prompt_ids", "response_ids"))
        b = len(self.samples)
        out = {
            "prompt_ids": np.zeros((b, wide_p), np.int64),
            "prompt_mask": np.zeros((b, wide_p), np.int64),
            "completion_ids": np.zeros((b, wide_c), np.int64),
            "completion_mask": np.zeros((b, wide_c), np.int64),
        }
        for i, s in enumerate(self.samples):
            p, c = len(s.prompt_ids), len(s.response_ids)
            out["prompt_ids"][i, wide_p - p :], out["prompt_mask"][i, wide_p - p :] = s.prompt_ids, 1
            out["completion_ids"][i, :c], out["completion_mask"][i, :c] = s.response_ids, 1
        out["advantages"] = self.advantages.astype(np.float32)
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in out.items()}
        return [{k: v[i : i + rows] for k, v in tensors.items()} for i in range(0, b, rows)]


class Ours:
    """This project's update; `packed`: rows without padding, prompts shared, else padded rows; `compiled`: its layers;
    `skip_flat`: as in training, rollouts that reach no gradient are not read."""

    def __init__(self, work: Work, packed: bool = True, compiled: bool = False, skip_flat: bool = True) -> None:
        self.work, self.packed = work, packed
        model = work.copy()
        if compiled:
            layers.compile_layers(model)
        if packed:
            attention.register()
            model.set_attn_implementation(attention.NAMES["auto"])
        cfg = ObjectiveConfig(clip_low=CLIP, clip_high=CLIP, entropy_coef=0.0)
        self.engine = LocalEngine(Policy(model, cfg), TrainConfig(lr=LR))
        self.rl = objective.weigh_rl(self._sequences(), 1.0, work.trained, cfg)
        if skip_flat:
            self.rl, _ = objective.leave_out_flat(self.rl, cfg)

    def _sequences(self) -> list[TokenSequence]:
        made = [objective.rollout_sequence(s, 1.0) for s in self.work.samples]
        return [s.with_fields(advantages=a) for s, a in zip(made, self.work.advantages)]

    def backward(self) -> None:
        for batch in micro_batches(self.rl, self.work.max_tokens, self.packed):
            self.engine.backward(batch)

    def gradients(self) -> list[torch.Tensor]:
        views = {n: g for group in self.engine.groups for n, g in zip(group.names, group.grad_views)}
        return [views[n] for n, _ in self.engine.policy.model.named_parameters()]

    def update(self) -> None:
        self.backward()
        self.engine.step()


class Eager:
    """What a hand-written loop on transformers does: padded rows, all logits of the answers, torch's own AdamW."""

    def __init__(self, work: Work, rows: int) -> None:
        self.batches, self.count = work.padded(rows), work.trained
        self.model = work.copy().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def backward(self) -> None:
        for b in self.batches:
            ids = torch.cat([b["prompt_ids"], b["completion_ids"]], 1)
            mask = torch.cat([b["prompt_mask"], b["completion_mask"]], 1)
            wide = b["completion_ids"].shape[1]
            out = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=wide + 1, use_cache=False)
            logp = out.logits[:, :-1].float().log_softmax(-1).gather(-1, b["completion_ids"][..., None]).squeeze(-1)
            ratio, a = (logp - logp.detach()).exp(), b["advantages"][:, None]
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
            ((loss * b["completion_mask"]).sum() / self.count).backward()

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters()]

    def update(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Trl:
    """TRL's GRPOTrainer: its own loss, backward, clipping and optimizer, fed with the recorded rollouts."""

    def __init__(self, work: Work, rows: int, tokenizer: object) -> None:
        try:
            from datasets import Dataset
            from trl import GRPOConfig, GRPOTrainer
        except ImportError as e:
            raise LeftOut(f"TRL is not installed ({e.name or e})") from None
        cuda = work.device.type == "cuda"
        rows = min(rows, len(work.samples))
        self.batches = work.padded(rows)
        steps = len(self.batches)
        if len(work.samples) % rows:
            raise LeftOut(f"TRL takes batches of one size, and {len(work.samples)} rollouts do not divide by {rows}")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = GRPOConfig(
                output_dir=folder,
                use_cpu=not cuda,
                bf16=work.dtype == torch.bfloat16,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=steps,
                steps_per_generation=steps,
                num_generations=2,
                max_completion_length=work.padded(rows)[0]["completion_ids"].shape[1],
                learning_rate=LR,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                beta=0.0,
                epsilon=CLIP,
                loss_type="dapo",
                temperature=1.0,
                gradient_checkpointing=False,
                report_to=[],
            )
            self.trainer = GRPOTrainer(
                work.copy(), lambda completions, **_: [0.0] * len(completions), args,
                train_dataset=Dataset.from_dict({"prompt": ["a"] * 2}), processing_class=tokenizer,
            )  # fmt: skip
        t = self.trainer
        t.create_optimizer()
        self.model, t.optimizer = t.accelerator.prepare(t.model, t.optimizer)
        t.model_wrapped = self.model.train()
        t.current_gradient_accumulation_steps = steps
        t._prepare_inputs = lambda inputs: inputs  # the rollouts are there: nothing is to be generated
        for b in self.batches:
            b["num_items_in_batch"] = torch.tensor(work.trained, device=work.device)

    def backward(self) -> None:
        accelerator = self.trainer.accelerator
        for i, batch in enumerate(self.batches):
            accelerator.gradient_state._set_sync_gradients(i == len(self.batches) - 1)
            self.trainer.training_step(self.model, dict(batch), None)

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.trainer.accelerator.unwrap_model(self.model).parameters()]

    def update(self) -> None:
        self.backward()
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        self.trainer._metrics["train"].clear()


def verl() -> None:
    """Its actor needs Ray workers, a device mesh and FSDP: none of it updates on given rollouts in one process."""
    try:
        import verl  # noqa: F401
    except ImportError:
        raise LeftOut("verl is not installed") from None
    raise LeftOut("verl's actor update cannot be called outside its Ray workers")

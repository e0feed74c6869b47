"""What all update engines have in common: flat fp32 gradients and masters, AdamW, clipping, guards, the probe, state.

Parameters that share a learning rate form a group: one flat fp32 master and one flat fp32 gradient, of the whole parameters
(local.py) or of this rank's shard of them (deepspeed.py). The norm, the clip, the optimizer and the probe's snapshot are one
kernel each per group, whatever the number of tensors, and the same code at every world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from amft_fast import ops
from amft_fast.config import TrainConfig
from amft_fast.data.batch import Batch
from amft_fast.engine.parts import Part, Tensors
from amft_fast.engine.world import ALONE, World
from amft_fast.model import lora
from amft_fast.model.policy import Policy, PolicyOutput

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """`flat[offset : offset + size]` of a group holds `parameter.view(-1)[start : start + size]`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    size: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.size]

    def saved(self, flat: torch.Tensor) -> torch.Tensor | Part:
        """What of `flat` goes into a checkpoint: a tensor when it is all of the parameter."""
        return self.saved_data(self.of(flat))

    def saved_data(self, data: torch.Tensor) -> torch.Tensor | Part:
        """The same for a tensor [size]."""
        data = data.detach()
        return data.view(self.shape) if self.size == prod(self.shape) else Part(data, self.start, self.shape)


class ParamGroup(Protocol):
    """Parameters that share a learning rate."""

    pieces: list[Piece]
    master: torch.Tensor
    grad: torch.Tensor


@dataclass(frozen=True)
class Named:
    """The trainable parameters that share hyper-parameters, by the names transformers gives them."""

    params: list[tuple[str, nn.Parameter]]
    weight_decay: float
    is_value: bool


def split_parameters(policy: Policy, cfg: TrainConfig) -> list[Named]:
    """Matrices with weight decay, the rest without, and the value head, which has a learning rate of its own."""
    # The policy's own prefix goes: checkpoints and messages name parameters as transformers does.
    trainable = [(n.removeprefix("model."), p) for n, p in policy.named_parameters() if p.requires_grad]
    value = [x for x in trainable if x[0].startswith("value_head.")]
    body = [x for x in trainable if not x[0].startswith("value_head.")]

    def decays(p: nn.Parameter) -> bool:
        # What ZeRO-3 has cut is empty here, and remembers its shape.
        return cfg.weight_decay > 0 and len(getattr(p, "ds_shape", p.shape)) >= 2

    decay = [x for x in body if decays(x[1])]
    plain = [x for x in body if not decays(x[1])]
    found = [Named(decay, cfg.weight_decay, False), Named(plain, 0.0, False), Named(value, 0.0, True)]
    return [n for n in found if n.params]


@dataclass(frozen=True)
class KeptFactors:
    """An adapted policy as it was: this rank's part of its factors, one flat tensor per group; all else is the policy's own."""

    flats: list[torch.Tensor]


class FlatEngine:
    """The mathematics of an update on flat groups; see `UpdateEngine` in interfaces.py."""

    world: World = ALONE
    sequence: World = ALONE  # the ranks that share a micro-batch, each with a part of its tokens
    cut = False  # whether the model's parameters are there in parts only, outside its forward pass

    def __init__(self, policy: Policy, cfg: TrainConfig, device: torch.device) -> None:
        self.policy, self.cfg, self.device = policy, cfg, device
        self.groups: list[Any] = []  # of the policy
        self.value_groups: list[Any] = []
        self.sft_gradient: list[torch.Tensor] | None = None  # G₁ of a probed step
        self.bad_in_row = torch.zeros((), device=device)
        self.bad_total = torch.zeros((), device=device)
        # Updates asked for, and those of them that were not finite: the loop tells these when it reads its figures, so that no
        # host sync is needed here.
        self.attempts = self.skipped = 0

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def all_groups(self) -> list[Any]:
        return self.groups + self.value_groups

    def _make_optimizer(self, decays: list[float], value_lr: float) -> torch.optim.Optimizer:
        groups = [{"params": [g.master], "weight_decay": d, "lr": self.cfg.lr} for g, d in zip(self.groups, decays)]
        groups += [{"params": [g.master], "weight_decay": 0.0, "lr": value_lr} for g in self.value_groups]
        if self.cfg.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.cfg.lr, fused=True)
        return torch.optim.AdamW(groups, lr=self.cfg.lr, betas=self.cfg.adam_betas, eps=self.cfg.adam_eps, fused=True)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups[: len(self.groups)]:
            group["lr"] = lr

    def zero_grad(self) -> None:
        for g in self.all_groups:
            g.grad.zero_()

    def take_gradient(self) -> list[torch.Tensor]:
        """The policy's gradient so far (a copy, one flat fp32 tensor per group), then cleared."""
        taken = [g.grad.clone() for g in self.groups]
        self.zero_grad()
        return taken

    def end_sweep(self, name: str) -> None:
        """After the SFT micro-batches of a probed step their gradient is copied aside; the RL sweep adds on top of it."""
        if name == "sft":
            self.sft_gradient = self.sft_gradient or [torch.empty_like(g.grad) for g in self.groups]
            torch._foreach_copy_(self.sft_gradient, [g.grad for g in self.groups])

    def probe(self, halves: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of `multi_tensor.PROBE_SUMS` over (u₁, u₂, G₁, G) and the clip coefficient of the step to come."""
        clip = self._clip(self._norm()).double()
        gradients = [g.grad for g in self.groups]
        sums = ops.multi_tensor_dot(halves, self.sft_gradient, gradients, self._adam_state(clip))
        return self.all_reduce(sums.to(self.device)), clip

    def _adam_state(self, clip: torch.Tensor) -> ops.AdamState | None:
        """AdamW's moments before the step about to be taken (zeros before the first)."""
        if self.cfg.optimizer != "adamw":
            return None
        states = [self.optimizer.state.get(g.master) for g in self.groups]
        moments = [
            [s[k] if s else torch.zeros_like(g.master) for s, g in zip(states, self.groups)] for k in ADAM_MOMENTS
        ]
        beta1, beta2 = self.cfg.adam_betas
        return ops.AdamState(*moments, beta1, beta2, self.cfg.adam_eps, self.attempts - self.skipped + 1, clip)

    def logprobs(
        self, batch: Batch, model: nn.Module | KeptFactors | None = None, temperature: float | None = None
    ) -> PolicyOutput:
        """`Policy.logprobs`, without gradients; every rank must call it equally often. `model`: a plain one, or factors of
        this one's; default: the policy as it is. Ranks that share the batch each get the rows of all of it."""
        if isinstance(model, KeptFactors):
            with self._as_kept(model):
                return self.logprobs(batch, None, temperature)
        mine = self._mine(batch)
        if model is not None:
            out = self.policy.logprobs(mine, model, temperature)
        else:
            out = self._own_logprobs(mine, temperature)
        if mine.kept is None:
            return out
        joined = {
            n: self._joined(getattr(out, n), mine.kept, len(batch.rows)) for n in ("logprobs", "entropy", "values")
        }
        return out._replace(**joined)

    def _mine(self, batch: Batch) -> Batch:
        """This rank's part of the batch, on the device."""
        if self.sequence.size > 1:
            batch = batch.part(self.sequence.rank, self.sequence.size)
        return batch.to(self.device)

    def _joined(self, values: torch.Tensor | None, kept: torch.Tensor, rows: int) -> torch.Tensor | None:
        """[rows]: the rows of all ranks that share a batch, of each one's own."""
        if values is None:
            return None
        return self.sequence.sum(values.new_zeros(rows).index_copy(0, kept, values[: len(kept)]))

    def _own_logprobs(self, batch: Batch, temperature: float | None) -> PolicyOutput:
        return self.policy.logprobs(batch, None, temperature)

    def _norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.grad) for g in self.all_groups]))

    def _clip(self, norm: torch.Tensor) -> torch.Tensor:
        return (self.cfg.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Clips by the global norm, updates, clears the gradients; returns the norm before clipping (a device scalar).

        A gradient that is not finite changes nothing: the optimizer is told so by a device flag, without a host sync.
        """
        norm = self._norm()
        bad = (~torch.isfinite(norm)).float()
        scale = self._clip(norm)
        for g in self.all_groups:
            g.grad.mul_(scale.to(g.grad.device))
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.to(self.all_groups[0].grad.device)
        self.optimizer.step()
        self.publish()
        self.attempts += 1
        self.bad_in_row = (self.bad_in_row + 1) * bad
        self.bad_total = self.bad_total + bad
        self.zero_grad()
        return norm

    def publish(self) -> None:
        """After a step: the parameters of the forward pass follow their masters."""
        raise NotImplementedError

    def named_full_params(self, max_bytes: int = 1 << 30) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of the whole model in layer order, adapters merged into the weights (a copy of one at a time); else
        nothing is copied here, so `max_bytes` does not bind."""
        for x in lora.plain(self.policy.model):
            yield x.name, x.value()

    def named_factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(peft's name, tensor) of an adapted policy's factors, whole; every rank must take them all."""
        yield from lora.named_factors(self.policy.model)

    def reference(self) -> nn.Module | KeptFactors:
        """The policy as it is now, for `logprobs(model=...)`: a frozen copy, or of an adapted one its factors alone."""
        if lora.adapted(self.policy.model):
            return KeptFactors([g.master.clone() for g in self.groups])
        return self.plain_copy()

    def plain_copy(self) -> nn.Module:
        """The model as it is now, whole and frozen."""
        raise NotImplementedError

    @contextmanager
    def _as_kept(self, kept: KeptFactors) -> Iterator[None]:
        """The policy with the factors that were kept, meanwhile."""
        current = [g.master.clone() for g in self.groups]
        self._set_masters(kept.flats)
        try:
            yield
        finally:
            self._set_masters(current)

    @torch.no_grad()
    def _set_masters(self, flats: list[torch.Tensor]) -> None:
        for g, flat in zip(self.groups, flats):
            g.master.copy_(flat)
        self.publish()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        return self.world.sum(tensor)

    # ------------------------------------------------------------------------------------------------- state

    def by_name(self, flats: list[torch.Tensor]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """This rank's pieces of a gradient that `take_gradient` gave."""
        for group, flat in zip(self.groups, flats):
            for piece in group.pieces:
                yield piece, piece.of(flat)

    def from_names(self, state: Tensors, prefix: str) -> list[torch.Tensor]:
        """The flat tensors that `by_name` told the pieces of, from a checkpoint. Raises ValueError naming one that it lacks."""
        flats = [torch.zeros_like(g.grad) for g in self.groups]
        for piece, part in self.by_name(flats):
            if prefix + piece.name not in state:
                raise ValueError(f"checkpoint: there is no {prefix}{piece.name}")
            part.copy_(state.part(prefix + piece.name, piece.start, piece.size))
        return flats

    def state_bytes(self) -> int:
        """Bytes of this rank's masters and moments, which is nearly all of its part of a checkpoint."""
        copies = 1 + len(ADAM_MOMENTS) * (self.cfg.optimizer == "adamw")
        return copies * sum(g.master.numel() * g.master.element_size() for g in self.all_groups)

    def state_dict(self) -> dict[str, Any]:
        """What to save: masters and moments by parameter name (this rank's parts of them), the guard's counters."""
        return self.saved_snapshot(self._state())

    def saved_snapshot(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """What of a snapshot this rank saves: the parts of others are theirs, and what all have is the first one's."""
        common = () if self.world.main else ("guard.", "optimizer.")
        return {k: v for k, v in snapshot.items() if not k.startswith(common)}

    def snapshot(self) -> dict[str, Any]:
        """This rank's part of all that updates change, copied to host memory; `load_state_dict` takes the ranks' parts together
        and `restore` this one alone."""
        return {
            k: Part(v.data.to("cpu", copy=True), v.start, v.shape) if isinstance(v, Part) else v.to("cpu", copy=True)
            for k, v in self._state().items()
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Back to where `snapshot` was taken, to the bit."""
        self.zero_grad()
        self.load_state_dict(snapshot)

    def _state(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for g in self.all_groups:
            flats = {"param": g.master} | {
                k: v for k, v in self.optimizer.state.get(g.master, {}).items() if k in ADAM_MOMENTS
            }
            for key, flat in flats.items():
                tensors |= {f"{key}.{piece.name}": piece.saved(flat) for piece in g.pieces}
        steps = self.optimizer.state.get(self.all_groups[0].master, {}).get("step")
        if steps is not None:
            tensors["optimizer.step"] = torch.as_tensor(float(steps))
        tensors["guard.bad_in_row"], tensors["guard.bad_total"] = self.bad_in_row, self.bad_total
        tensors["guard.attempts"] = torch.tensor(self.attempts)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, of any engine at any world size.

        Raises ValueError naming a parameter that is missing or of another shape.
        """
        state = Tensors.of(state)
        for g in self.all_groups:
            for piece in g.pieces:
                got = state.shapes.get(f"param.{piece.name}")
                if got != piece.shape:
                    got = "nothing" if got is None else list(got)
                    raise ValueError(
                        f"checkpoint: parameter {piece.name} should have shape {list(piece.shape)}, got {got}"
                    )
                piece.of(g.master).copy_(state.part(f"param.{piece.name}", piece.start, piece.size))
            if "optimizer.step" in state:
                self.optimizer.state[g.master] = self._loaded_moments(g, state)
            else:
                self.optimizer.state.pop(g.master, None)
        self.publish()
        self.attempts, self.skipped = int(state["guard.attempts"]), int(state["guard.bad_total"])
        self.bad_in_row = state["guard.bad_in_row"].to(self.device, copy=True)
        self.bad_total = state["guard.bad_total"].to(self.device, copy=True)

    def _loaded_moments(self, group: Any, state: Tensors) -> dict[str, torch.Tensor]:
        moments: dict[str, torch.Tensor] = {k: torch.zeros_like(group.master) for k in ADAM_MOMENTS}
        for key, flat in moments.items():
            for piece in group.pieces:
                piece.of(flat).copy_(state.part(f"{key}.{piece.name}", piece.start, piece.size))
        # Each group counts its own steps, in a tensor of its own.
        return {"step": state["optimizer.step"].float().clone().to(group.master.device)} | moments

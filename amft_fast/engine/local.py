"""The update engine of one process: flat fp32 gradients and masters, fused AdamW, clipping and guards without a host sync.

All trainable parameters share one flat fp32 gradient (and, in bf16 training, one flat fp32 master), each parameter a view of
it: the norm, the clip, the optimizer and the probe's snapshot are one kernel each, whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from amft_fast import ops
from amft_fast.batch import Batch
from amft_fast.config import ObjectiveConfig, TrainConfig
from amft_fast.model import Policy, PolicyOutput

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGN = 64  # elements: each view starts at a 256-byte boundary, so that 128-bit loads hold everywhere


class FlatGroup:
    """Parameters that share a learning rate, as one flat fp32 gradient and one flat fp32 master."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]
        self.offsets: list[int] = []
        size = 0
        for p in self.params:
            self.offsets.append(size)
            size += -(-p.numel() // ALIGN) * ALIGN
        device = self.params[0].device
        dtype = torch.float64 if self.params[0].dtype == torch.float64 else torch.float32  # fp64 for gradient checks
        self.master = torch.zeros(size, device=device, dtype=dtype)
        self.grad = torch.zeros_like(self.master)
        self.master.grad = self.grad
        self.master_views = self._views(self.master)
        self.grad_views = self._views(self.grad)
        self.low_precision = any(p.dtype != dtype for p in self.params)
        for p, master, grad in zip(self.params, self.master_views, self.grad_views):
            master.copy_(p.detach())
            if self.low_precision:
                p.register_post_accumulate_grad_hook(_accumulator(grad))
            else:
                p.data, p.grad = master, grad

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat[o : o + p.numel()].view(p.shape) for o, p in zip(self.offsets, self.params)]

    def publish(self) -> None:
        """After a step: the low-precision parameters follow their masters (fp32 ones are the master)."""
        if self.low_precision:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.master_views)


def _accumulator(grad: torch.Tensor):
    """Adds a low-precision gradient into the fp32 one as soon as it is complete, and frees it."""

    def hook(p: torch.Tensor) -> None:
        if p.grad is None:  # an untied head: the loss head has added its dW into `grad` itself
            return
        grad.add_(p.grad)
        p.grad = None

    return hook


class LocalEngine:
    """Updates a `Policy` in one process; see `UpdateEngine` in interfaces.py."""

    rank, world_size = 0, 1

    def __init__(self, policy: Policy, cfg: TrainConfig, value_lr: float = 0.0) -> None:
        self.policy, self.cfg = policy, cfg
        self.device = policy.head.weight.device
        # The policy's own prefix goes: checkpoints and messages name parameters as transformers does.
        trainable = [(n.removeprefix("model."), p) for n, p in policy.named_parameters() if p.requires_grad]
        is_value = [n.startswith("value_head.") for n, _ in trainable]
        body = [x for x, v in zip(trainable, is_value) if not v]
        decay = [x for x in body if x[1].dim() >= 2 and cfg.weight_decay > 0]
        plain = [x for x in body if not (x[1].dim() >= 2 and cfg.weight_decay > 0)]
        self.groups = [FlatGroup(g) for g in (decay, plain) if g]
        self.decays = [cfg.weight_decay if g is decay else 0.0 for g in (decay, plain) if g]
        value = [x for x, v in zip(trainable, is_value) if v]
        self.value_group = FlatGroup(value) if value else None
        self.value_lr = value_lr
        self.optimizer = self._make_optimizer()
        self.bad_in_row = torch.zeros((), device=self.device)
        self.bad_total = torch.zeros((), device=self.device)
        self.sft_gradient: list[torch.Tensor] | None = None  # G₁ of a probed step
        # Updates asked for, and those of them that were not finite: the loop tells these when it reads its figures, so that no
        # host sync is needed here.
        self.attempts = self.skipped = 0
        self._give_head_its_buffer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [g.master], "weight_decay": d, "lr": self.cfg.lr} for g, d in zip(self.groups, self.decays)
        ]
        if self.value_group is not None:
            groups.append({"params": [self.value_group.master], "weight_decay": 0.0, "lr": self.value_lr})
        if self.cfg.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.cfg.lr, fused=True)
        return torch.optim.AdamW(groups, lr=self.cfg.lr, betas=self.cfg.adam_betas, eps=self.cfg.adam_eps, fused=True)

    def _give_head_its_buffer(self) -> None:
        """The loss head adds dW straight into the fp32 gradient instead of returning one more [V, H] tensor."""
        for group in self.groups:
            for p, grad in zip(group.params, group.grad_views):
                if p is self.policy.head.weight:
                    self.policy.weight_grad = grad

    @property
    def all_groups(self) -> list[FlatGroup]:
        return self.groups + ([self.value_group] if self.value_group is not None else [])

    def backward(self, batch: Batch, objective: ObjectiveConfig | None = None) -> PolicyOutput:
        """Forward and backward of one micro-batch; gradients add up until `step` or `take_gradient`."""
        out = self.policy(batch.to(self.device), objective)
        out.loss.backward()
        out.loss = out.loss.detach()
        return out

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
        """The sums of `multi_tensor.SUMS` over (u₁, u₂, G₁, G₂) and the clip coefficient of the step about to be taken."""
        clip = self._clip(self._norm()).double()
        gradients = [g.grad for g in self.groups]
        return ops.multi_tensor_dot(halves, self.sft_gradient, gradients, self._adam_state(clip)), clip

    def _adam_state(self, clip: torch.Tensor) -> ops.AdamState | None:
        """AdamW's moments before the step about to be taken (zeros before the first)."""
        if self.cfg.optimizer != "adamw":
            return None
        states = [self.optimizer.state.get(g.master, {}) for g in self.groups]
        moments = [[s.get(k, torch.zeros_like(g.master)) for s, g in zip(states, self.groups)] for k in ADAM_MOMENTS]
        beta1, beta2 = self.cfg.adam_betas
        return ops.AdamState(*moments, beta1, beta2, self.cfg.adam_eps, self.attempts - self.skipped + 1, clip)

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
            g.grad.mul_(scale)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        for g in self.all_groups:
            g.publish()
        self.attempts += 1
        self.bad_in_row = (self.bad_in_row + 1) * bad
        self.bad_total = self.bad_total + bad
        self.zero_grad()
        return norm

    def named_full_params(self, max_bytes: int = 1 << 30) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of the whole model in layer order; nothing is copied here, so `max_bytes` does not bind."""
        seen: set[int] = set()
        for name, p in self.policy.model.named_parameters(remove_duplicate=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield name, p.detach()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """One process: the sum over ranks is the tensor itself."""
        return tensor

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors to save: masters by parameter name, the optimizer's moments, the guard's counters."""
        tensors: dict[str, torch.Tensor] = {}
        for i, g in enumerate(self.all_groups):
            for name, view in zip(g.names, g.master_views):
                tensors[f"param.{name}"] = view
            for key, value in self.optimizer.state.get(g.master, {}).items():
                if torch.is_tensor(value):
                    tensors[f"optimizer.{i}.{key}"] = value
        tensors["guard.bad_in_row"], tensors["guard.bad_total"] = self.bad_in_row, self.bad_total
        tensors["guard.attempts"] = torch.tensor(self.attempts)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave. Raises ValueError naming a parameter that is missing or of another shape."""
        for i, g in enumerate(self.all_groups):
            for name, view in zip(g.names, g.master_views):
                saved = state.get(f"param.{name}")
                if saved is None or saved.shape != view.shape:
                    got = "nothing" if saved is None else list(saved.shape)
                    raise ValueError(f"checkpoint: parameter {name} should have shape {list(view.shape)}, got {got}")
                view.copy_(saved)
            prefix = f"optimizer.{i}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if moments:
                self.optimizer.state[g.master] = {
                    k: v.clone().to(self.device if v.dim() or self.cfg.optimizer == "adamw" else "cpu")
                    for k, v in moments.items()
                }
            g.publish()
        self.attempts, self.skipped = int(state["guard.attempts"]), int(state["guard.bad_total"])
        self.bad_in_row = state["guard.bad_in_row"].to(self.device)
        self.bad_total = state["guard.bad_total"].to(self.device)

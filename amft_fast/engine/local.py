"""The update engine of one process: flat fp32 gradients and masters of the whole model, no host sync.

All trainable parameters share one flat fp32 gradient (and, in bf16 training, one flat fp32 master), each a view of it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from amft_fast.config import ObjectiveConfig, TrainConfig
from amft_fast.data.batch import Batch
from amft_fast.engine.flat import FlatEngine, Piece, split_parameters
from amft_fast.model import lora
from amft_fast.model.policy import Policy, PolicyOutput

ALIGN = 64  # elements: each view starts at a 256-byte boundary, so that 128-bit loads hold everywhere


class FlatGroup:
    """Parameters that share a learning rate, as one flat fp32 gradient and one flat fp32 master."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]
        self.pieces: list[Piece] = []
        size = 0
        for name, p in named:
            self.pieces.append(Piece(name, tuple(p.shape), size, 0, p.numel()))
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
        return [piece.of(flat).view(piece.shape) for piece in self.pieces]

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


class LocalEngine(FlatEngine):
    """Updates a `Policy` in one process; see `UpdateEngine` in interfaces.py."""

    def __init__(self, policy: Policy, cfg: TrainConfig, value_lr: float = 0.0) -> None:
        super().__init__(policy, cfg, policy.head.weight.device)
        named = split_parameters(policy, cfg)
        self.groups = [FlatGroup(n.params) for n in named if not n.is_value]
        self.value_groups = [FlatGroup(n.params) for n in named if n.is_value]
        self.optimizer = self._make_optimizer([n.weight_decay for n in named if not n.is_value], value_lr)
        self._give_head_its_buffer()

    def _give_head_its_buffer(self) -> None:
        """The loss head adds dW straight into the fp32 gradient instead of returning one more [V, H] tensor."""
        for group in self.groups:
            for p, grad in zip(group.params, group.grad_views):
                if p is self.policy.head.weight:
                    self.policy.weight_grad = grad

    def backward(self, batch: Batch, objective: ObjectiveConfig | None = None) -> PolicyOutput:
        """Forward and backward of one micro-batch; gradients add up until `step` or `take_gradient`."""
        out = self.policy(batch.to(self.device), objective)
        out.loss.backward()
        return out._replace(loss=out.loss.detach())

    def publish(self) -> None:
        for g in self.all_groups:
            g.publish()

    def export(self, folder: Path) -> None:
        """Writes the model as a plain transformers folder, adapters merged."""
        lora.export(self.policy.model, folder)

    def plain_copy(self) -> nn.Module:
        return copy.deepcopy(self.policy.model).requires_grad_(False).eval()

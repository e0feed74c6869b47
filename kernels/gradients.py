"""The gradients' memory: where the products over ∂L/∂x go, and how they reach autograd.

`linear_policy_loss` knows its gradients when it knows its loss: `GradientBuffers` collects them by chunks of rows in the
forward, and `attach` hangs them on the loss, whose backward then only multiplies by the gradient that arrives.
`linear_logprob` makes them in its backward: `SlabGradients` collects them by slabs of the vocabulary.

Legend: N rows, c active rows, n rows of a chunk, V vocabulary (padding included), S columns of a slab, H hidden size.
"""

from __future__ import annotations

import torch
from amft_kernels.chunks import Index, RowPlan
from amft_kernels.matmul import compute_dtype, hidden_grad_into, weight_grad_into
from torch.autograd.function import once_differentiable


class GradientBuffers:
    """dH [N, H] in hidden's dtype; dW [V, H] and db [V] in fp32 (fp64). None where no gradient is asked for."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        weight_grad: torch.Tensor | None,
        vocab: int,
    ) -> None:
        recording, dtype = torch.is_grad_enabled(), compute_dtype(weight_VH.dtype)
        self.vocab = vocab
        self.hidden_NH = self.weight_VH = self.bias_V = None
        # Rows that no chunk covers, and columns that are padding, keep a gradient of exactly 0.
        if recording and hidden_NH.requires_grad:
            self.hidden_NH = torch.empty_like(hidden_NH, memory_format=torch.contiguous_format)
        if recording and weight_grad is not None:
            self.weight_VH = weight_grad
        elif recording and weight_VH.requires_grad:
            self.weight_VH = torch.empty(weight_VH.shape, dtype=dtype, device=weight_VH.device)
            self.weight_VH[vocab:] = 0
        if recording and bias_V is not None and bias_V.requires_grad:
            self.bias_V = torch.zeros(bias_V.shape, dtype=dtype, device=bias_V.device)
        self.external = weight_grad is not None
        self.started = self.external  # whether dW holds something to add to
        self.wanted = not (self.hidden_NH is None and self.weight_VH is None and self.bias_V is None)

    def add_chunk(self, index: Index, grad_nV: torch.Tensor, hidden_nH: torch.Tensor, weight_VH: torch.Tensor) -> None:
        """Take the two matrix products over ∂L/∂x of a chunk; `index` says which rows of hidden it is."""
        if self.hidden_NH is not None:
            if isinstance(index, slice):
                hidden_grad_into(self.hidden_NH[index], grad_nV, weight_VH)
            else:
                chunk_nH = torch.empty_like(hidden_nH)
                hidden_grad_into(chunk_nH, grad_nV, weight_VH)
                self.hidden_NH[index] = chunk_nH
        if self.weight_VH is not None:
            weight_grad_into(self.weight_VH[: self.vocab], grad_nV, hidden_nH, accumulate=self.started)
            self.started = True
        if self.bias_V is not None:
            self.bias_V[: self.vocab] += grad_nV.sum(0, dtype=self.bias_V.dtype)

    def zero_rows(self, active: torch.Tensor | None, chunks: bool) -> None:
        """Before the first chunk: zero what no chunk will write."""
        if self.hidden_NH is not None and active is not None:
            self.hidden_NH.zero_()
        if self.weight_VH is not None and not self.external and not chunks:
            self.weight_VH.zero_()


def attach(
    loss: torch.Tensor,
    grads: GradientBuffers,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
) -> torch.Tensor:
    """The loss, whose backward hands out `grads`."""
    if not grads.wanted:
        return loss
    return _Attached.apply(loss, grads, hidden_NH, weight_VH, bias_V)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, grads, hidden_NH, weight_VH, bias_V):
        ctx.external = grads.external
        ctx.dtypes = tuple(None if like is None else like.dtype for like in (hidden_NH, weight_VH, bias_V))
        # A main-gradient buffer has its sum already.
        ctx.save_for_backward(grads.hidden_NH, None if grads.external else grads.weight_VH, grads.bias_V)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.external and not grad_loss.is_cuda and grad_loss.item() != 1.0:
            raise ValueError(
                f"weight_grad already holds the gradient of the loss itself: back-propagate it with gradient 1, got "
                f"{grad_loss.item():g} (scale nll_weight, pg_weight and entropy_weight instead)"
            )
        # Beside a main-gradient buffer the gradient that arrives is 1: the others are handed on as they are.
        by = None if ctx.external else grad_loss
        handed = [_scaled(grad, by, dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return None, None, *handed


def _scaled(grad: torch.Tensor | None, by: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    if grad is None:
        return None
    if by is None or (by.device.type == "cpu" and by.item() == 1.0):  # elsewhere reading it would stop the host
        return grad.to(dtype)
    return torch.mul(grad, by, out=torch.empty_like(grad, dtype=dtype))


class SlabGradients:
    """dH accumulates in fp32 (fp64); each slab of dW is written once, in the weight's dtype."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        needs: tuple[bool, ...],
        plan: RowPlan,
        vocab: int,
    ) -> None:
        self.plan, self.like_NH, self.wide = plan, hidden_NH, compute_dtype(hidden_NH.dtype)
        self.hidden_cH = self.weight_VH = self.bias_V = self.slab_SH = None
        if needs[0]:
            self.hidden_cH = hidden_NH.new_zeros(plan.count, hidden_NH.shape[1], dtype=self.wide)
        if needs[1]:
            self.weight_VH = torch.empty_like(weight_VH) if plan.count else torch.zeros_like(weight_VH)
            self.weight_VH[vocab:] = 0
        if needs[2]:
            self.bias_V = torch.zeros_like(bias_V, dtype=self.wide)
            self.bias_dtype = bias_V.dtype
        # Sums over several row chunks must not be rounded in between.
        self.direct = weight_VH.dtype == self.wide or (weight_VH.is_cuda and plan.chunk_rows >= plan.count)

    def add(
        self, slab: slice, part: slice, grad_nS: torch.Tensor, hidden_nH: torch.Tensor, weight_SH: torch.Tensor
    ) -> None:
        """Take the products over ∂L/∂x of a slab's columns and the active rows `part`."""
        if self.hidden_cH is not None:
            hidden_grad_into(self.hidden_cH[part], grad_nS, weight_SH, accumulate=True)
        if self.weight_VH is not None:
            if part.start == 0:
                self.slab_SH = self.weight_VH[slab] if self.direct else torch.empty_like(weight_SH, dtype=self.wide)
            weight_grad_into(self.slab_SH, grad_nS, hidden_nH, accumulate=part.start > 0)
            if part.stop == self.plan.count and not self.direct:
                self.weight_VH[slab] = self.slab_SH
        if self.bias_V is not None:
            self.bias_V[slab] += grad_nS.sum(0, dtype=self.wide)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dH, dW and db as autograd wants them."""
        hidden_NH = self.hidden_cH
        if hidden_NH is not None:
            hidden_NH = hidden_NH.to(self.like_NH.dtype)
            if self.plan.active is not None:
                hidden_NH = torch.zeros_like(self.like_NH).index_copy_(0, self.plan.active, hidden_NH)
        return hidden_NH, self.weight_VH, None if self.bias_V is None else self.bias_V.to(self.bias_dtype)

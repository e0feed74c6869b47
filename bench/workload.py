"""What every candidate computes, and the truth in fp64 that its numbers are checked against.

Three losses over N tokens, of which the sum has weight 1/N per token:

    ce       −logp
    pg       the clipped policy gradient, −min(ρA, clip(ρ) A) with ρ = exp(logp − old)
    policy   the same minus `ENTROPY_COEF` times the entropy, which has its gradient

The truth costs one fp64 pass over the logits, whatever N: the loss and a_i = ∂L/∂logp_i, b_i = ∂L/∂H_i follow from the
rows' log-probs and entropies, then ∂L/∂z_ij = a_i (δ − p_ij) − b_i p_ij (log p_ij + H_i) is formed for a few rows (all
columns) and a few columns (all rows). These give some rows of dH and some rows of dW of the very shape that is timed.

Legend: N tokens, H hidden size, V vocabulary, r rows of a chunk, R sampled rows, C sampled columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("policy", "pg", "ce")
CLIP, ENTROPY_COEF = 0.2, 0.5  # so large that a head without the entropy gradient fails its check
LOGIT_SCALE = 2.0  # standard deviation of the logits: a policy that is sure of some tokens and not of others
STALENESS = 0.15  # of the log-ratios: the clip at 0.2 works on about a tenth of the tokens
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SAMPLED = 128  # rows of dH and of dW that are checked
CHUNK_BYTES = 512 << 20  # of fp64 logits

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class RowStats:
    """fp64, each [N]."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Case:
    """Inputs of one shape. `hidden` [N, H] and `weight` [V, H] ask for gradients; the rest is fp32 [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor  # the same for all tokens of a sequence
    old_logprobs: Tensor
    sequence: int  # tokens of a sequence
    stats: RowStats

    @property
    def shape(self) -> Shape:
        return (*self.hidden.shape, self.weight.shape[0])

    @property
    def device(self) -> str:
        return self.hidden.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @functools.cached_property
    def token_weight(self) -> Tensor:
        return torch.full_like(self.advantages, 1 / len(self.targets))

    @functools.cached_property
    def entropy_weight(self) -> Tensor:
        return ENTROPY_COEF * self.token_weight

    def loss(self, kind: str, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        """The scalar, from per-token values of any head."""
        if kind == "ce":
            return -logprobs.mean()
        ratio = (logprobs - self.old_logprobs).exp()
        gain = torch.minimum(ratio * self.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * self.advantages)
        return -gain.mean() - (ENTROPY_COEF * entropy.mean() if kind == "policy" else 0.0)

    def head(self, rows: int) -> Case:
        """The first tokens as a case of their own."""
        part = slice(0, rows)
        hidden = self.hidden.detach()[part].clone().requires_grad_()
        per_row = (self.targets[part], self.advantages[part], self.old_logprobs[part])
        stats = RowStats(self.stats.lse[part], self.stats.logprobs[part], self.stats.entropy[part])
        return Case(hidden, self.weight, *per_row, self.sequence, stats)


def make_case(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Case:
    """Random inputs; the old log-probs lie near the true ones, as in training."""
    n, h, v = shape
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    hidden = normal(n, h).to(dtype)
    weight = torch.empty(v, h, dtype=dtype, device=device)
    for slab in weight.split(1 << 14):
        slab.copy_(normal(*slab.shape) * (LOGIT_SCALE / h**0.5))
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    sequence = math.gcd(n, 1024)
    advantages = normal(n // sequence).repeat_interleave(sequence)
    stats = row_stats(hidden, weight, targets)
    old = (stats.logprobs + STALENESS * normal(n)).float()
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, advantages, old, sequence, stats)


@torch.no_grad()
def row_stats(hidden: Tensor, weight: Tensor, targets: Tensor) -> RowStats:
    """One pass over the logits in fp64, chunk by chunk."""
    weight_VH, parts = weight.double(), []
    rows = max(1, CHUNK_BYTES // (8 * len(weight)))
    for h_rH, t_r in zip(hidden.split(rows), targets.split(rows)):
        z_rV = h_rH.double() @ weight_VH.t()
        lse_r = z_rV.logsumexp(1)
        logp_r = z_rV.gather(1, t_r[:, None])[:, 0] - lse_r
        z_rV.sub_(lse_r[:, None])
        parts.append((lse_r, logp_r, -(z_rV.exp() * z_rV).sum(1)))
    return RowStats(*map(torch.cat, zip(*parts)))


class Truth:
    """Loss, some rows of dH and some rows of dW in fp64, for each kind of loss."""

    def __init__(self, case: Case) -> None:
        self.case = case
        n, _, v = case.shape
        device = case.hidden.device
        # Half of the columns are targets: elsewhere no row has its spike.
        hit = case.targets.unique()
        spread = torch.linspace(0, v - 1, min(v, SAMPLED) // 2, device=device).long()
        self.columns = torch.cat([hit[:: max(1, 2 * len(hit) // SAMPLED)], spread]).unique()
        self.rows = torch.linspace(0, n - 1, min(n, SAMPLED), device=device).long().unique()

    @functools.cache  # noqa: B019 - a truth lives as long as its shape is measured
    def of(self, kind: str) -> dict[str, Tensor]:
        case, stats = self.case, self.case.stats
        logp_N, entropy_N = (x.clone().requires_grad_() for x in (stats.logprobs, stats.entropy))
        loss = case.loss(kind, logp_N, entropy_N)
        a_N, b_N = torch.autograd.grad(loss, (logp_N, entropy_N), materialize_grads=True)
        with torch.no_grad():
            hidden_NH, weight_CH = case.hidden.double(), case.weight[self.columns].double()
            everything = torch.arange(case.shape[2], device=self.columns.device)
            weight_VH = case.weight.double()
            g_RV = self._logit_grad(self.rows, everything, hidden_NH[self.rows] @ weight_VH.t(), a_N, b_N)
            g_NC = self._logit_grad(slice(None), self.columns, hidden_NH @ weight_CH.t(), a_N, b_N)
            return {"loss": loss.detach(), "hidden": g_RV @ weight_VH, "weight": g_NC.t() @ hidden_NH}

    def _logit_grad(self, rows, columns: Tensor, z: Tensor, a_N: Tensor, b_N: Tensor) -> Tensor:
        stats, a, b = self.case.stats, a_N[rows, None], b_N[rows, None]
        log_p = z.sub_(stats.lse[rows, None])
        p = log_p.exp()
        spike = (self.case.targets[rows, None] == columns).double()
        return a * (spike - p) - b * p * (log_p + stats.entropy[rows, None])

    def errors(self, kind: str, loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> dict[str, float]:
        """Of the loss relative to max(1, |loss|), of the gradients relative to their norm."""
        true = self.of(kind)
        got = {"hidden": grad_hidden[self.rows], "weight": grad_weight[self.columns]}
        errors = {name: float((x.double() - true[name]).norm() / true[name].norm()) for name, x in got.items()}
        off = abs(float(loss) - float(true["loss"])) / max(1.0, abs(float(true["loss"])))
        return {"loss": off} | errors


def loss_and_grads(
    run: Callable[[], Tensor], case: Case, weight_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is timed: forward and backward, the gradients as tensors of their own, but for a dW that `run` adds to
    `weight_grad`."""
    loss = run()
    if weight_grad is not None:
        return loss.detach(), *torch.autograd.grad(loss, case.hidden), weight_grad
    return loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))

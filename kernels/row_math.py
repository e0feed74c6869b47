"""The mathematics of a block of logit rows in torch, in place: what both heads share.

    z = c · tanh(x / c) / T           y = log p = z − max − log Σ exp(z − max)           H = −Σ p y
    ∂L/∂z_j = a (δ_jt − p_j) − b p_j (y_j + H) = a δ_jt − (a + b H) p_j − b p_j y_j
    ∂L/∂x_j = ∂L/∂z_j · (1 − (T z_j / c)²) / T

with a = ∂L/∂logp and b = ∂L/∂H. Each term is a pass over a block that stays in cache.

Legend: r rows of a block, V columns (of the vocabulary or of a slab of it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from amft_kernels.matmul import compute_dtype
from amft_kernels.targets import Targets


class Head(NamedTuple):
    """What turns hidden states into logits, cut to the real vocabulary."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    temperature: float | torch.Tensor  # a number or [N]
    softcap: float | None

    def temperature_of(self, rows: slice | torch.Tensor) -> float | torch.Tensor:
        """The temperature of these rows: a number, or a column to divide by."""
        return self.temperature[rows, None] if isinstance(self.temperature, torch.Tensor) else self.temperature


def make_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    vocab: int,
    temperature: float | torch.Tensor,
    softcap: float | None,
) -> Head:
    """The head without its padded columns, and with temperature 1 on ignored rows, where it may hold anything."""
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(targets.valid_N, temperature.to(compute_dtype(hidden_NH.dtype)), 1.0)
    return Head(weight_VH.detach()[:vocab], None if bias_V is None else bias_V.detach()[:vocab], temperature, softcap)


def scale_(x_rV: torch.Tensor, head: Head, temperature_r1: float | torch.Tensor) -> torch.Tensor:
    """x becomes z."""
    if head.softcap is not None:
        x_rV.div_(head.softcap).tanh_().mul_(head.softcap)
    if isinstance(temperature_r1, torch.Tensor) or temperature_r1 != 1.0:
        x_rV.div_(temperature_r1)
    return x_rV


def times_p_(y_rV: torch.Tensor, p_rV: torch.Tensor, head: Head) -> torch.Tensor:
    """y becomes p · log p, with 0 · log 0 = 0. Only a bias can hold −inf without also spoiling hidden or the weight."""
    if head.bias_V is not None:
        y_rV.clamp_(min=torch.finfo(y_rV.dtype).min)
    return y_rV.mul_(p_rV)


class GradCoefficients(NamedTuple):
    """∂L/∂z_j = spike · δ_{j, column} + of_p · p_j + of_plogp · p_j log p_j, each [r, 1]; 0 in rows of `dead` [r, 1]."""

    column: torch.Tensor
    spike: torch.Tensor
    of_p: torch.Tensor
    of_plogp: torch.Tensor | None
    dead: torch.Tensor | None = None


def logit_grad_(
    z_rV: torch.Tensor,
    p_rV: torch.Tensor,
    plogp_rV: torch.Tensor | None,
    by: GradCoefficients,
    head: Head,
    temperature_r1: float | torch.Tensor,
) -> None:
    """z becomes ∂L/∂x; p and p · log p are spent."""
    g_rV = z_rV if head.softcap is None else p_rV  # the softcap's factor still needs z
    if by.of_plogp is None:
        torch.mul(p_rV, by.of_p / temperature_r1, out=g_rV)
    else:
        torch.add(p_rV.mul_(by.of_p / temperature_r1), plogp_rV.mul_(by.of_plogp / temperature_r1), out=g_rV)
    g_rV.scatter_add_(1, by.column, by.spike / temperature_r1)
    if head.softcap is not None:
        z_rV.mul_(temperature_r1 / head.softcap).square_().neg_().add_(1).mul_(g_rV)
    if by.dead is not None:
        z_rV.masked_fill_(by.dead, 0.0)


def dead_rows(weights: Iterable[torch.Tensor | None], active: torch.Tensor | None) -> torch.Tensor | None:
    """Rows in which no weight differs from 0: their logits may hold anything, and 0 · inf is NaN, so they are left out by
    choice and not by a factor. None: no row of `active` is such (known on the CPU alone; elsewhere looking would stop the
    host). A row whose weight is NaN is not dead."""
    dead_N = torch.stack([weight_N == 0 for weight_N in weights if weight_N is not None]).all(0)
    if dead_N.device.type == "cpu" and not bool((dead_N if active is None else dead_N[active]).any()):
        return None
    return dead_N


def without_rows(hidden_nH: torch.Tensor, dead_n: torch.Tensor | None) -> torch.Tensor:
    """Hidden states for the product gᵀ h: those of dead rows, which may be NaN, become 0 like their gradients."""
    return hidden_nH if dead_n is None else hidden_nH.masked_fill(dead_n[:, None], 0.0)

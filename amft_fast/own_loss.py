"""A loss of a user's own, `objective.loss = "my_loss.py:fn"`: loaded and checked before any time is spent.

`fn(logp, old, behavior, advantage)` takes tensors [N] of tokens (natural logs: of the policy now, of the policy before
the step's first update, of what sampled) and returns the loss of each [N], or the pair (loss, its derivative by logp),
both [N]. With the loss alone the derivative is autograd's, and is checked against finite differences; a coefficient
that is meant to be a constant (detached) makes the two differ, and then the pair says what is meant.
"""

from __future__ import annotations

import torch

from amft_fast.errors import UserError
from amft_fast.ops import OwnLoss, value_and_slope
from amft_fast.tasks import own

SETTING = "objective.loss"


def load(name: str) -> OwnLoss:
    """The function that FILE.py:NAME or MODULE:NAME names. Raises UserError when it is not one, or fails its check."""
    function = own.load(name, SETTING)
    if not callable(function):
        raise UserError(
            f"{SETTING}: {name} is a {type(function).__name__}, not a function of (logp, old, behavior, advantage)"
        )
    check(function, name)
    return function


def check(function: OwnLoss, name: str) -> None:
    """Raises UserError unless the function is one of each token by itself, finite, with the derivative that it has."""
    g = torch.Generator().manual_seed(0)
    logp = -0.05 - 4 * torch.rand(64, generator=g, dtype=torch.float64)
    old, behavior = (logp + 0.3 * torch.randn(64, generator=g, dtype=torch.float64) for _ in range(2))
    others = (old.clamp(max=-1e-3), behavior.clamp(max=-1e-3), torch.randn(64, generator=g, dtype=torch.float64))
    value, slope = _asked(function, name, logp, *others)
    first = _asked(function, name, logp[:1], *(x[:1] for x in others))[0]
    if not torch.allclose(first, value[:1], rtol=1e-9, atol=1e-12):
        raise UserError(
            f"{SETTING}: {name} gives a token another loss beside other tokens, {value[0]:.6g}, than alone, "
            f"{first[0]:.6g}: it must "
            "be a function of each token by itself, with no mean or sum over them"
        )
    with torch.no_grad():
        given = function(logp, *others)
    if isinstance(given, tuple):
        return
    step = 1e-6
    up, down = (_asked(function, name, logp + h, *others)[0] for h in (step, -step))
    apart = ((up - down) / (2 * step) - slope).abs() > 1e-4 * (1 + slope.abs())
    if int(apart.sum()) > 2:  # a kink may lie within a step of a token or two
        i = int(apart.nonzero()[0])
        raise UserError(
            f"{SETTING}: autograd's derivative of {name} by logp is {slope[i]:.6g} where finite differences say "
            f"{(up[i] - down[i]) / (2 * step):.6g} (logp {logp[i]:.4g}, old {others[0][i]:.4g}, advantage "
            f"{others[2][i]:.4g}): where a "
            "part is meant as a constant, return the pair (loss, derivative by logp)"
        )


def _asked(
    function: OwnLoss, name: str, logp: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and derivative, of the right shape and finite."""
    try:
        value, slope = value_and_slope(function, logp, *others)
    except Exception as e:  # whatever a user's function raises
        text = str(e).strip().splitlines()
        raise UserError(
            f"{SETTING}: {name} failed on {len(logp)} tokens: {type(e).__name__}: {text[0] if text else ''}"
        ) from e
    for what, got in (("loss", value), ("derivative", slope)):
        if got.shape != logp.shape:
            raise UserError(
                f"{SETTING}: {name} must return one {what} a token, got shape {list(got.shape)} for {len(logp)} tokens"
            )
        if not got.isfinite().all():
            i = int((~got.isfinite()).nonzero()[0])
            raise UserError(
                f"{SETTING}: the {what} of {name} is {got[i]:g} at logp {logp[i]:.4g}, old {others[0][i]:.4g}"
            )
    return value, slope

"""Random streams, and tokens drawn from logits by inverse transform. Legend: B rows, V vocabulary.

What a row draws is a function of its logits and of one uniform number, which is a hash of (seed, position): it does not depend
on the row's neighbours, the size of the batch or the rank.
"""

from __future__ import annotations

import numpy as np
import torch

from amft_fast.interfaces import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 256  # tokens whose probabilities are summed before any is looked at alone
_BELOW_ONE = 1 - 2.0**-52  # what a share of a sum may be at most, so that its product with the sum stays under the sum


def uniform(seeds: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), fp64: number `steps` (from 0) of the streams `seeds` (uint64), which are broadcast.

    SplitMix64 (Steele et al. 2014) in counter mode.
    """
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * (np.asarray(steps).astype(np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(
    logits_BV: torch.Tensor, u_B: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row, its log-prob under the distribution drawn from, and that distribution's entropy in nats (NaN where
    tokens are cut off). Nothing is read back to the host.

    temperature 0 takes the largest logit (log-prob at temperature 1). top_p cuts the distribution first.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature not in (0, 1):
        logits_BV = logits_BV / sampling.temperature
    if sampling.temperature and sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV.log_softmax(-1), sampling.top_p)
    p_BV = logits_BV.softmax(-1)
    tokens = _draw(p_BV, u_B) if sampling.temperature else logits_BV.argmax(-1)
    logp_B = p_BV.gather(-1, tokens[:, None]).squeeze(-1).log()
    # H = log Σ exp z − Σ p z, and log Σ exp z is z − log p of any token.
    log_sum_B = logits_BV.gather(-1, tokens[:, None]).squeeze(-1) - logp_B
    return tokens, logp_B, log_sum_B - torch.linalg.vecdot(p_BV, logits_BV)


def _draw(p_BV: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """The first token at which the summed probabilities exceed u times their sum.

    One pass over all of them makes sums of blocks; then one block of each row is looked into. Sums run in fp64. A token of
    probability 0 is never drawn: sums do not rise there.
    """
    if p_BV.shape[1] <= 4 * BLOCK:
        return _inverse(p_BV.double().cumsum(-1), u_B)[0]
    whole = p_BV.shape[1] // BLOCK
    sums = p_BV[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
    if whole * BLOCK < p_BV.shape[1]:
        sums = torch.cat([sums, p_BV[:, whole * BLOCK :].sum(-1, keepdim=True)], 1)
    block, rest = _inverse(sums.double().cumsum(-1), u_B)
    index = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    outside = index >= p_BV.shape[1]
    inside = p_BV.gather(1, index.clamp_(max=p_BV.shape[1] - 1)).double().masked_fill_(outside, 0.0)
    place, _ = _inverse(inside.cumsum(-1), rest)
    return (block * BLOCK + place).clamp_(max=p_BV.shape[1] - 1)


def _inverse(sums: torch.Tensor, u_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first place whose running sum exceeds u times the whole, the share of that place's own part that u reaches)."""
    target = u_B[:, None].clamp(max=_BELOW_ONE) * sums[:, -1:]
    place = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    upto = sums.gather(1, place)
    before = torch.where(place > 0, sums.gather(1, (place - 1).clamp_(min=0)), 0.0)
    return place.squeeze(1), ((target - before) / (upto - before)).squeeze(1).clamp_(0, _BELOW_ONE)


def _nucleus(logp_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Renormalised log-probs of the likeliest tokens that hold the mass `top_p` (evaluation only)."""
    sorted_BV, order_BV = logp_BV.sort(-1, descending=True)
    p_BV = sorted_BV.exp()
    # A token stays while the mass before it is under top_p, so the first always stays.
    keep_BV = p_BV.cumsum(-1) - p_BV < top_p
    sorted_BV = sorted_BV.masked_fill(~keep_BV, -torch.inf)
    return torch.empty_like(logp_BV).scatter_(-1, order_BV, sorted_BV).log_softmax(-1)

"""What is taken off a sample's reward before it becomes an advantage.

overlong       −p · (length − (max − buffer)) / buffer, from max − buffer tokens on, at most p         (DAPO, arXiv 2503.14476)
length         −β · length / max · max(solve rate of the group, 1/n)                                    (ALP, arXiv 2506.05256)
KL             −β · Σ_t KL_t of the policy that sampled against the reference, by one of three estimates
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from amft_fast.config import AdvantageConfig
from amft_fast.data.batch import TokenSequence
from amft_fast.interfaces import Sample


def penalties(samples: list[Sample], cfg: AdvantageConfig, max_new_tokens: int) -> np.ndarray:
    """What each sample [S] loses by its length; 0 or less. The length of a sample of several turns is that of its longest."""
    lengths = np.array([_longest_turn(s) for s in samples], np.float64)
    off = np.zeros(len(samples))
    if cfg.overlong_buffer:
        over = (lengths - (max_new_tokens - cfg.overlong_buffer)) / cfg.overlong_buffer
        off -= cfg.overlong_penalty * np.clip(over, 0, 1)
    if cfg.length_penalty and samples:
        _, index, sizes = np.unique([s.group_id for s in samples], return_inverse=True, return_counts=True)
        solved = np.bincount(index, [float(s.success) for s in samples]) / sizes
        off -= cfg.length_penalty * np.minimum(lengths / max_new_tokens, 1) * np.maximum(solved, 1 / sizes)[index]
    return off


def _longest_turn(sample: Sample) -> int:
    ends = [0, *(t.end for t in sample.turns)] if sample.turns else [0, len(sample.response_ids)]
    return max(sum(sample.loss_mask[a:b]) for a, b in pairwise(ends))


def divergence(sequence: TokenSequence, kind: str) -> np.ndarray:
    """KL_t of each trained token [T], from the log-probs that it was drawn with and the reference's."""
    drawn = "old_logprobs" if "old_logprobs" in sequence.fields else "behavior_logprobs"
    d = (sequence.fields["ref_logprobs"] - sequence.fields[drawn])[sequence.trained]
    if kind == "k1":
        return -d
    return d**2 / 2 if kind == "k2" else np.expm1(np.clip(d, -20, 20)) - np.clip(d, -20, 20)

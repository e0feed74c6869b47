"""From rewards to advantages.

    grpo         A = (r − mean_g) / (std_g + ε)      group mean and standard deviation (Shao et al., arXiv 2402.03300)
    dr_grpo      A = r − mean_g                       (Liu et al., arXiv 2503.20783; denominators stay global here)
    rloo         A = r − mean of the others in the group = (r − mean_g) · G/(G−1)     (Ahmadian et al., arXiv 2402.14740)
    reinforce++  A = (r − mean_batch) / (std_batch + ε)                               (Hu et al., arXiv 2501.03262)
    opo          A = r − Σ length · r / Σ length, over the group                       (Hao et al., arXiv 2505.23585)
    gpg          A = α (r − mean_g), α = groups / groups with a spread                 (Chu et al., arXiv 2504.02546)
    reinforce++_baseline   A = (r − mean_g) / (std_batch of that + ε)                  (Hu et al., as above)
    maxrl        A = (r − mean_g) / mean_g, 0 where nothing was earned                 (Tajwar et al., arXiv 2602.02710)
    gae          A_t = Σ_l (γλ)^l δ_{t+l},  δ_t = r_t + γ V_{t+1} − V_t               (Schulman et al., arXiv 1506.02438)

All but gae give one number per sample, that all its tokens share, and the first four one per turn (`turn_advantages`) where it
is asked for; gae gives one per token. Several rewards can be normalised one by one (`several`). What is done to rewards before
is in `reward_terms.py`.
"""

from __future__ import annotations

import numpy as np

from amft_fast.config import GROUP_KINDS

EPS = 1e-6


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, kind: str, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Advantages [S] of samples with `rewards` [S]; samples with the same number in `groups` [S] share a prompt.

    The standard deviation is the population's (divided by the size). A group without spread gets zeros. `lengths` [S]:
    tokens of each sample, which opo weighs by.
    Raises ValueError for a group of one where the rest of the group is the baseline, and for an unknown `kind`.
    """
    rewards = np.asarray(rewards, np.float64)
    if kind == "reinforce++":
        return _normalised(rewards)
    if kind not in GROUP_KINDS:
        raise ValueError(f"kind must be {', '.join(GROUP_KINDS)} or reinforce++, got {kind!r}")
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) and sizes.min() < 2:
        raise ValueError(f"{kind} needs at least 2 samples in every group, got a group of 1")
    mean = np.bincount(index, rewards) / sizes
    if kind == "opo":
        lengths = np.maximum(np.asarray(lengths, np.float64), 1)
        return rewards - (np.bincount(index, lengths * rewards) / np.bincount(index, lengths))[index]
    centred = rewards - mean[index]
    std = np.sqrt(np.bincount(index, centred**2) / sizes)
    # Rounding leaves a spread near 1e-17 in groups of equal rewards; dividing it must not make noise of it.
    spread = std > 1e-9
    if kind == "rloo":
        return centred * (sizes / (sizes - 1))[index]
    if kind == "gpg":
        return centred * (len(sizes) / max(spread.sum(), 1)) * spread[index]
    if kind == "reinforce++_baseline":
        return _normalised(centred * spread[index])
    if kind == "maxrl":
        earned = spread & (mean > EPS)
        return np.where(earned[index], centred / np.where(earned, mean, 1.0)[index], 0.0)
    if kind == "dr_grpo":
        return centred
    return np.where(spread[index], centred / (std[index] + EPS), 0.0)


def several(
    rewards: dict[str, np.ndarray], weights: dict[str, float], groups: np.ndarray, kind: str, lengths: np.ndarray
) -> np.ndarray:
    """Advantages [S] of several rewards, each [S], normalised one by one by `kind`, added up with `weights`, and brought to the
    batch's spread (GDPO, arXiv 2601.05242): of two rewards neither is lost in the other's spread."""
    total = sum(w * group_advantages(rewards[name], groups, kind, lengths) for name, w in weights.items())
    return _normalised(np.asarray(total))


def _normalised(values: np.ndarray) -> np.ndarray:
    """Brought to mean 0 and standard deviation 1 over the batch."""
    return (values - values.mean()) / (values.std() + EPS) if len(values) else values


def turn_advantages(
    rewards: list[np.ndarray], states: list[list[str]], groups: np.ndarray, kind: str, gamma: float = 1.0
) -> list[np.ndarray]:
    """Advantages of every turn [turns of the sample], one array a sample, from its `rewards` turn by turn.

    A turn's return is the discounted sum of the rewards from it on. It is compared with those of the turns of its group
    (same number in `groups`) made in the same state; a turn without its like gets 0. With one turn a sample, in one state,
    this is `group_advantages`.
    """
    returns = []
    for r in rewards:
        later = np.zeros(len(r) + 1)
        for t in range(len(r) - 1, -1, -1):
            later[t] = r[t] + gamma * later[t + 1]
        returns.append(later[:-1])
    keys: dict[tuple[int, str], int] = {}
    ids = np.array([keys.setdefault((g, s), len(keys)) for g, named in zip(groups, states) for s in named], np.int64)
    flat, out = np.concatenate(returns), np.zeros(len(ids))
    compared = (np.bincount(ids)[ids] > 1) | (kind == "reinforce++")
    out[compared] = group_advantages(flat[compared], ids[compared], kind)
    return np.split(out, np.cumsum([len(r) for r in returns])[:-1])


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [T] of one sample from per-token `rewards` [T] and `values` [T]; the value after the end is 0.

    returns = advantages + values are the value head's targets.
    """
    advantages = np.zeros(len(rewards))
    running, next_value = 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * next_value - values[t]
        running = delta + gamma * lam * running
        advantages[t], next_value = running, values[t]
    return advantages, advantages + values


def normalise(advantages: list[np.ndarray]) -> list[np.ndarray]:
    """Per-token advantages of a whole batch, brought to mean 0 and standard deviation 1 over all tokens."""
    flat = np.concatenate(advantages) if advantages else np.zeros(0)
    if not len(flat):
        return advantages
    mean, std = flat.mean(), flat.std()
    return [(a - mean) / (std + EPS) for a in advantages]

"""The losses written out on plain logits in torch, from their formulas, with nothing of ours: what ours is held against."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Answer(NamedTuple):
    """The policy's tokens of one rollout, each [T]; logp and entropy have a graph."""

    logp: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor
    behavior: torch.Tensor
    advantage: torch.Tensor
    ref: torch.Tensor | None = None


def plain_tokens(model, ids, temperature=1.0):
    """Log-prob and entropy of each token after the first, from whole logits."""
    ids = torch.as_tensor(ids)[None]
    logp = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logp.gather(-1, ids[0, 1:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def answer_of(model, seq, temperature=1.0):
    """The answer of a TokenSequence with the fields of a rollout."""
    m = torch.from_numpy(seq.trained[1:])
    logp, entropy = plain_tokens(model, seq.ids, temperature)
    f = {k: torch.from_numpy(v[1:].copy())[m] for k, v in seq.fields.items()}
    old = f.get("old_logprobs", logp.detach()[m])
    return Answer(logp[m], entropy[m], old, f["behavior_logprobs"], f["advantages"], f.get("ref_logprobs"))


def grpo(a: Answer, low=0.2, high=0.2):
    ratio = (a.logp - a.old).exp()
    return -torch.min(ratio * a.advantage, ratio.clamp(1 - low, 1 + high) * a.advantage)


def cispo(a: Answer, cap):
    return -(a.logp - a.old).exp().clamp(max=cap).detach() * a.advantage * a.logp


def sapo(a: Answer, positive, negative):
    tau = torch.where(a.advantage > 0, positive, negative)
    return -a.advantage * torch.sigmoid(tau * ((a.logp - a.old).exp() - 1)) * 4 / tau


def dppo(a: Answer, bound, cap=20.0):
    moved = (a.logp.exp() - a.old.exp()).detach()
    keep = ((a.advantage > 0) & (moved <= bound)) | ((a.advantage <= 0) & (moved >= -bound))
    return -(a.logp - a.old).exp().clamp(max=cap).detach() * keep * a.advantage * a.logp


def dro(a: Answer, beta):
    return -a.advantage * a.logp + beta / 2 * (a.logp - a.old).square()


def gspo(a: Answer, low=0.2, high=0.2):
    """The sequence's loss on each of its tokens."""
    s = (a.logp - a.old).mean().exp()
    return -torch.min(s * a.advantage, s.clamp(1 - low, 1 + high) * a.advantage)


def gmpo(a: Answer, clip):
    sign = a.advantage.sign()
    log_ratio = a.logp - a.old
    held = sign * torch.min(sign * log_ratio, sign * log_ratio.clamp(-clip, clip))
    return -a.advantage * held.mean().exp()


def vespo(a: Answer, positive, negative):
    log_w = (a.logp - a.old).sum().detach()
    k, lam = (torch.where(a.advantage >= 0, p, n).double() for p, n in zip(positive, negative))
    return -(lam + k * log_w - lam * log_w.exp()).exp() * a.advantage * a.logp


def covariances(answers):
    logp, adv = torch.cat([a.logp.detach() for a in answers]), torch.cat([a.advantage for a in answers])
    return (logp - logp.mean()) * (adv - adv.mean())


def mean(losses, denominator, longest=1):
    """L_RL from the losses of the tokens, one [T] a sequence."""
    if denominator == "token":
        return torch.cat(losses).mean()
    if denominator == "sequence":
        return torch.stack([x.mean() for x in losses]).mean()
    return torch.cat(losses).sum() / (len(losses) * longest)

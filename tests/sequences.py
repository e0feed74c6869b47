"""Sequences of several families, and the comparison of gradients by name."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from amft_fast.data.batch import TokenSequence, micro_batches
from amft_fast.model.policy import Policy


def family_of(rng: np.random.Generator, prompt: int, answers: list[int]) -> list[TokenSequence]:
    """Sequences with a prompt of so many tokens and answers of these lengths; a few tokens inside are not trained."""
    common = rng.integers(5, 13, prompt)
    out = []
    for n in answers:
        ids = np.concatenate([common, rng.integers(5, 13, n)])
        trained = np.arange(len(ids)) >= prompt
        if n > 5:
            trained[prompt + 2] = False
        out.append(TokenSequence(ids, trained).with_fields(nll_weight=1.0))
    return out


def mixed(seed: int = 0) -> list[TokenSequence]:
    """Five families of ragged lengths."""
    rng = np.random.default_rng(seed)
    families = [(4, [1, 7, 3, 9, 2]), (11, [5, 1]), (3, [12]), (6, [2, 30]), (1, [4])]
    return [s for prompt, answers in families for s in family_of(rng, prompt, answers)]


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each gradient is the wanted one, up to a share `tolerance` of its length."""
    for name, g in wanted.items():
        distance = (got[name] - g).norm() / g.norm().clamp_min(1e-9)
        assert distance < tolerance, f"{name}: {distance:.1e} apart"


def gradients(
    policy: Policy, sequences: list[TokenSequence], max_tokens: int = 10**6, packed: bool = True
) -> dict[str, torch.Tensor]:
    """The gradient of the sequences' loss by the policy, in micro-batches."""
    policy.zero_grad()
    for batch in micro_batches(sequences, max_tokens, packed):
        policy(batch).loss.backward()
    return {n.removeprefix("model."): p.grad.double() for n, p in policy.named_parameters()}


def imitate(model: torch.nn.Module, sequence: TokenSequence) -> None:
    """Backward of the same loss of one sequence, by transformers alone."""
    ids = torch.from_numpy(sequence.ids)
    nll = F.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
    (nll * torch.from_numpy(sequence.fields["nll_weight"] * sequence.trained)[1:]).sum().backward()

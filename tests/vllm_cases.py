"""What the tests of the real vLLM ask of it, and other weights to send it."""

import pytest
import torch

from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout.transformers import TransformersEngine

GREEDY, SAMPLED = Sampling(0.0, stop_token_ids=(1,)), Sampling(0.7, stop_token_ids=(1,))


def named(model):
    return ((n, p.detach()) for n, p in model.named_parameters())


def shake(model, seed):
    """Other weights, of the same size."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3 * p.std() if p.dim() >= 2 else torch.randn_like(p) * 0.1)


def requests(n, length=12):
    prompts = [(2, 5, 3), (2, 6, 7, 8, 3), (2, 9, 3)]
    return [Request(prompts[i * 3 // n], 1000 + 7 * i, length) for i in range(n)]


def assert_answers_as(engine, model, asked, vision=None):
    """Greedy, with the log-probs that the trainer's own engine has. Returns the answers."""
    got = engine.generate(asked, GREEDY)
    want = TransformersEngine(model, vision=vision).generate(asked, GREEDY)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    for a, b in zip(got, want):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4) and a.finish_reason == b.finish_reason
    return got

"""What the tests of the real vLLM ask of it, and other weights to send it."""

import torch

from amft_fast.interfaces import Request, Sampling

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

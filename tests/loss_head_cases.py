"""Inputs for the tests of the loss head, shared by its CPU, interpreter and GPU files."""

from __future__ import annotations

import torch

FORMS = {
    "nll": ("nll",),
    "pg": ("pg", "old"),
    "on_policy": ("pg",),
    "mixed": ("nll", "pg", "entropy", "old"),
    "everything": ("nll", "pg", "entropy", "old", "behavior", "ref"),
}


def make_inputs(n, h, v, dtype=torch.float64, *, ignored=0.25, seed=0, device="cpu", scale=1.0):
    """(hidden, weight, targets); about a quarter of the rows ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) / h**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def make_terms(n, form="everything", dtype=torch.float64, *, seed=1, device="cpu"):
    """Per-token inputs and scalars of `linear_policy_loss` for one of `FORMS`."""
    g = torch.Generator().manual_seed(seed)
    parts = FORMS[form]

    def uniform(low, high, on=1.0):
        value = low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)
        return (value * (torch.rand(n, generator=g) < on)).to(device, dtype)

    terms = {}
    if "nll" in parts:
        terms["nll_weight"] = uniform(0, 1, on=0.5)
    if "entropy" in parts:
        terms["entropy_weight"] = uniform(-0.2, 1)
    if "pg" in parts:
        terms |= {"pg_weight": uniform(0, 1, on=0.6), "advantages": uniform(-2, 2)}
    if "old" in parts:
        terms["old_logprobs"] = uniform(-6, 0)
    if "behavior" in parts:
        terms |= {"behavior_logprobs": uniform(-6, 0), "tis_cap": 2.0, "dual_clip": 3.0}
    if "ref" in parts:
        terms |= {"ref_logprobs": uniform(-6, 0), "kl_coef": 0.1}
    return terms


def leaf(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def run_policy(op, hidden, weight, targets, *, bias=None, upstream=1.0, **terms):
    """Every field of the result and every gradient, by name."""
    hidden, weight, bias = leaf(hidden), leaf(weight), leaf(bias)
    out = op(hidden, weight, targets, bias=bias, **terms)
    (upstream * out.loss).backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    return {name: value.detach() for name, value in (out._asdict() | grads).items()}


def run_logprob(op, hidden, weight, targets, *, bias=None, upstream=None, **options):
    """Log-probs, entropy and the gradients of Σ u₀·logp + u₁·H, by name."""
    hidden, weight, bias = leaf(hidden), leaf(weight), leaf(bias)
    logprobs, entropy = op(hidden, weight, targets, bias=bias, **options)
    if upstream is None:
        g = torch.Generator().manual_seed(7)
        upstream = torch.rand(2, len(targets), generator=g, dtype=torch.float64).to(logprobs)
    (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | grads

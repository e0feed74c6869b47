"""Inputs and checks of the loss head, shared by its tests on the CPU, in Triton's interpreter and on a GPU.

Accuracy is judged against the definition in fp64 on the same (rounded) inputs: our error may not exceed that of the
definition in the input's own dtype by more than TOLERANCE.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from amft_kernels import matmul
from amft_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from amft_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from amft_kernels.loss_forms import LossForm

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

FORMS = {
    "nll": ("nll",),
    "pg": ("pg", "old"),
    "on_policy": ("pg",),
    "on_policy_tis": ("pg", "behavior"),
    "mixed": ("nll", "pg", "entropy", "old"),
    "everything": ("nll", "pg", "entropy", "old", "behavior", "ref"),
    "cispo": ("nll", "pg", "old", "behavior", "ref", "shaped"),
    "sapo": ("pg", "entropy", "old"),
    "dppo": ("pg", "old", "behavior", "ref"),
    "dro": ("pg", "old", "ref", "shaped"),
    "cispo_on_policy": ("pg", "behavior"),
    "dppo_on_policy": ("pg", "shaped"),
}

# The policy gradient's form of those of FORMS that are not the clipped one, with constants that act on the inputs below.
LOSS_FORMS = {
    "cispo": LossForm("cispo", ratio_cap=1.5, is_high=3.0, kl="k1"),
    "sapo": LossForm("sapo", tau_positive=0.8, tau_negative=1.4),
    "dppo": LossForm("dppo", ratio_cap=2.0, tv_bound=0.1, ratio_penalty=0.02, is_low=0.5, is_high=2.0, kl="k2"),
    "dro": LossForm("dro", ratio_penalty=0.3, shape="phi"),
    "cispo_on_policy": LossForm("cispo", is_low=0.2),
    "dppo_on_policy": LossForm("dppo", tv_bound=0.1, shape_gamma=0.3),
}

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": True},
    "softcap": {"logit_softcap": 2.0},
    "padded": {"vocab_size": 45},
    "bias": {"bias": True},
    "all": {"temperature": True, "logit_softcap": 2.0, "vocab_size": 45, "bias": True},
}


class Place(NamedTuple):
    """Where and how a check runs."""

    device: str
    dtype: torch.dtype
    backend: str

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def wide(self) -> torch.dtype:
        """Of per-token tensors."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def serve(products: str, monkeypatch) -> None:
    """CPU products by "mkl", as on a CPU without AVX-512, or "onednn", as on one with it, which every CPU can do; or those of
    bf16 by "bf16", as on a CPU with AMX, which one can do that oneDNN has bf16 for."""
    if products == "onednn" and not matmul.has_onednn():
        pytest.skip("this torch was built without oneDNN")
    if products == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this CPU")
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: products == "onednn")
    monkeypatch.setattr(matmul, "bf16_is_faster", lambda: products == "bf16")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(place, n, h, v, *, ignored=0.25, scale=1.0):
    """(hidden, weight, targets); a share of the rows ignored, logits of about `scale`."""
    g = generator(0)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) / max(h, 1) ** 0.5
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    return hidden.to(place.device, place.dtype), weight.to(place.device, place.dtype), targets.to(place.device)


def make_terms(place, n, form="everything"):
    """Per-token inputs and scalars of `linear_policy_loss` for one of `FORMS`."""
    g, parts = generator(1), FORMS[form]

    def uniform(low, high, on=1.0):
        value = low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)
        return (value * (torch.rand(n, generator=g) < on)).to(place.device, place.wide)

    terms = {}
    if "nll" in parts:
        terms["nll_weight"] = uniform(0, 1, on=0.5)
    if "entropy" in parts:
        terms["entropy_weight"] = uniform(-0.2, 1)
    if "pg" in parts:
        terms |= {"pg_weight": uniform(0, 1, on=0.6), "advantages": uniform(-2, 2)}
    if "old" in parts:
        terms |= {"old_logprobs": uniform(-6, 0), "clip_low": 0.3, "clip_high": 0.5}
    if "behavior" in parts:
        terms |= {"behavior_logprobs": uniform(-6, 0), "tis_cap": 2.0, "dual_clip": 3.0}
    if "shaped" in parts:
        terms["shaped_weight"] = uniform(-0.2, 1, on=0.5)
    if form in LOSS_FORMS:
        terms["form"] = LOSS_FORMS[form]
    if "ref" in parts:
        terms |= {"ref_logprobs": uniform(-6, 0), "kl_coef": 0.1}
    return terms


def make_head(place, n, v, name):
    """The head's options of one of `HEADS`; True there stands for a tensor."""
    options, g = dict(HEADS[name]), generator(3)
    if options.get("temperature") is True:
        value = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
        options["temperature"] = value.to(place.device, place.wide)
    if options.get("bias") is True:
        options["bias"] = torch.randn(v, generator=g, dtype=torch.float64).to(place.device, place.dtype)
    return options


def to_dtype(arguments, dtype):
    """Arguments with their floating tensors in `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


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
        upstream = torch.rand(2, len(targets), generator=generator(7), dtype=torch.float64).to(logprobs)
    (upstream[0] * logprobs + upstream[1] * entropy).sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | grads


def assert_accurate(place, got, run, reference, arguments):
    """Every loss, log-prob, entropy and gradient in `got` against the definition in fp64 and in the place's dtype."""
    truth = run(reference, **to_dtype(arguments, torch.float64))
    eager = run(reference, **arguments)
    for name in ("loss", "logprobs", "entropy", "hidden", "weight", "bias"):
        if name not in truth:
            continue
        assert got[name].isfinite().all(), name
        scale = max(1.0, truth[name].abs().max().item() if truth[name].numel() else 0.0)
        ours, theirs = ((side[name].double() - truth[name]).abs() for side in (got, eager))
        worst, allowed = (error.max().item() if error.numel() else 0.0 for error in (ours, theirs))
        limit = (0.0 if allowed != allowed else allowed) + TOLERANCE[place.dtype] * scale
        assert worst <= limit, f"{name}: error {worst:.3g}, allowed {limit:.3g} (eager's {allowed:.3g})"


def check_policy(place, hidden, weight, targets, *, chunk_bytes=None, **options):
    """Run `linear_policy_loss` and judge it; returns its results by name."""
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **options}
    own = {"chunk_bytes": chunk_bytes, "backend": place.backend}
    got = run_policy(linear_policy_loss, **arguments, **own)
    assert_accurate(place, got, run_policy, linear_policy_loss_reference, arguments)
    assert (got["logprobs"] <= 0).all() and (got["entropy"] >= 0).all()
    return got


def check_logprob(place, hidden, weight, targets, *, chunk_bytes=None, **options):
    """Run `linear_logprob` and judge it; returns its results by name."""
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **options}
    got = run_logprob(linear_logprob, **arguments, chunk_bytes=chunk_bytes, backend=place.backend)
    assert_accurate(place, got, run_logprob, linear_logprob_reference, arguments)
    assert (got["logprobs"] <= 0).all() and (got["entropy"] >= 0).all()
    return got


def check_policy_case(place, form, head, n, h, v):
    """A form of the loss under a kind of head, in chunks of five rows."""
    hidden, weight, targets = make_inputs(place, n, h, v)
    options = make_terms(place, n, form) | make_head(place, n, v, head)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    check_policy(place, hidden, weight, targets, chunk_bytes=8 * v * 5, **options)


def check_logprob_case(place, head, n, h, v, chunk_rows):
    """Log-probs and entropies under a kind of head."""
    hidden, weight, targets = make_inputs(place, n, h, v)
    options = make_head(place, n, v, head)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    check_logprob(place, hidden, weight, targets, chunk_bytes=8 * v * chunk_rows, **options)

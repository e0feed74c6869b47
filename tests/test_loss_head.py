"""The loss head's torch backend against its definition in fp64."""

import pytest
import torch
from amft_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from amft_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from loss_head_cases import FORMS, make_inputs, make_terms, run_logprob, run_policy

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 2.0},
    "padded": {"vocab_size": 45},
    "bias": {"bias": True},
    "all": {"temperature": True, "logit_softcap": 2.0, "vocab_size": 45, "bias": True},
}


def head_options(name, n, v, dtype):
    """The head's options of a case; True stands for a tensor."""
    options, g = dict(HEADS[name]), torch.Generator().manual_seed(3)
    if options.get("temperature") is True:
        options["temperature"] = 0.5 + torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
    if options.get("bias") is True:
        options["bias"] = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    return options


def assert_close(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", FORMS)
def test_policy_loss_is_its_definition(form, head):
    n, h, v = 23, 7, 53
    hidden, weight, targets = make_inputs(n, h, v)
    options = make_terms(n, form) | head_options(head, n, v, torch.float64)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    got = run_policy(linear_policy_loss, hidden, weight, targets, upstream=3.0, chunk_bytes=8 * v * 5, **options)
    want = run_policy(linear_policy_loss_reference, hidden, weight, targets, upstream=3.0, **options)
    assert_close(got, want)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_logprob_is_its_definition(head, chunk_rows):
    n, h, v = 23, 7, 53
    hidden, weight, targets = make_inputs(n, h, v)
    options = head_options(head, n, v, torch.float64)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    got = run_logprob(linear_logprob, hidden, weight, targets, chunk_bytes=8 * v * chunk_rows, **options)
    assert_close(got, run_logprob(linear_logprob_reference, hidden, weight, targets, **options))

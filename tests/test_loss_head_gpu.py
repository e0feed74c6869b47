"""The loss head on a GPU: everything that `test_loss_head.py` and the interpreter test, in bf16, and what only a GPU has."""

import pytest
import torch
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import linear_policy_loss
from amft_kernels.targets import bad_target_flag
from loss_head_cases import (
    FORMS,
    HEADS,
    Place,
    check_logprob,
    check_logprob_case,
    check_policy,
    check_policy_case,
    leaf,
    make_inputs,
    make_terms,
    run_logprob,
    run_policy,
)
from loss_head_edges import EDGES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

PLACES = [
    Place("cuda", torch.bfloat16, "triton"),
    Place("cuda", torch.float16, "triton"),
    Place("cuda", torch.float32, "triton"),
    Place("cuda", torch.bfloat16, "torch"),
]
BF16 = PLACES[0]


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", FORMS)
def test_policy_loss_is_its_definition(form, head, place):
    check_policy_case(place, form, head, 23, 7, 1053)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(23, 7, 1053), (130, 128, 700), (700, 512, 5000)], ids=str)
def test_logprob_is_its_definition(shape, head, place):
    """The last two shapes take the fused forward."""
    check_logprob_case(place, head, *shape, 40)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("check", EDGES, ids=lambda check: check.__name__)
def test_edge(check, place):
    check(place)


@pytest.mark.parametrize("shape", [(4096, 1024, 32_000), (2048, 2048, 50_257), (1536, 896, 151_936)], ids=str)
def test_real_sizes(shape):
    """Several chunks of thousands of rows: where the in-place gradient would show a race, and the sums their errors."""
    n, h, v = shape
    hidden, weight, targets = make_inputs(BF16, n, h, v, scale=3.0)
    terms = make_terms(BF16, n)
    check_policy(BF16, hidden, weight, targets, chunk_bytes=4 * v * 1024, **terms)
    check_logprob(BF16, hidden, weight, targets, chunk_bytes=4 * v * 1024)


def test_backends_agree():
    hidden, weight, targets = make_inputs(BF16, 500, 256, 5003)
    terms = make_terms(BF16, 500)
    triton = run_policy(linear_policy_loss, hidden, weight, targets, backend="triton", **terms)
    eager = run_policy(linear_policy_loss, hidden, weight, targets, backend="torch", **terms)
    for name, value in eager.items():
        torch.testing.assert_close(triton[name], value, rtol=1e-2, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_target_out_of_range_is_nan_and_flagged():
    hidden, weight, targets = make_inputs(BF16, 8, 64, 300)
    flag = bad_target_flag(targets.device).zero_()
    check_policy(BF16, hidden, weight, targets, **make_terms(BF16, 8))
    assert not flag
    for bad in (300, -1, 2**40):
        targets[3] = bad
        got = run_policy(linear_policy_loss, hidden, weight, targets, nll_weight=torch.ones(8, device="cuda"))
        assert got["loss"].isnan() and got["logprobs"][3].isnan() and got["hidden"][3].isnan().all()
        assert got["logprobs"].isnan().sum() == 1
        assert run_logprob(linear_logprob, hidden, weight, targets)["logprobs"][3].isnan()
        assert flag
        flag.zero_()


def test_the_host_never_waits():
    hidden, weight, targets = make_inputs(BF16, 64, 64, 300)
    terms, hidden, weight = make_terms(BF16, 64), leaf(hidden), leaf(weight)

    def step():
        loss = linear_policy_loss(hidden, weight, targets, **terms, chunk_bytes=4 * 320 * 16).loss
        logprobs, entropy = linear_logprob(hidden, weight, targets, chunk_bytes=4 * 320 * 16)
        (loss + logprobs.sum() + entropy.sum()).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("chunk_mib", [64, 256, 1024])
def test_memory_is_bounded(chunk_mib):
    """Peak beyond inputs, gradients and one fp32 [V, H]: the workspace, whatever N is, and cuBLAS's own 32 MiB."""
    h, v, chunk_bytes = 896, 151_936, chunk_mib << 20
    for n in (2048, 16_384):
        hidden, weight, targets = make_inputs(BF16, n, h, v)
        terms, hidden, weight = make_terms(BF16, n), leaf(hidden), leaf(weight)
        run = lambda: linear_policy_loss(hidden, weight, targets, **terms, chunk_bytes=chunk_bytes).loss  # noqa: B023, E731
        del_me = run()
        del del_me
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run().backward()
        extra = torch.cuda.max_memory_allocated() - before
        gradients = 2 * n * h + 4 * v * h
        assert extra - gradients <= max(1.1 * chunk_bytes, 2.1 * v * h) + (40 << 20), (n, extra, gradients)


def test_more_than_two_billion_logits_in_one_chunk():
    n, h, v = 16_640, 64, 131_072
    assert n * v > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("needs 10 GB of workspace")
    hidden, weight, targets = make_inputs(BF16, n, h, v)
    terms = make_terms(BF16, n)
    whole = run_policy(linear_policy_loss, hidden, weight, targets, chunk_bytes=4 * n * v, **terms)
    parts = run_policy(linear_policy_loss, hidden, weight, targets, chunk_bytes=4 * 2048 * v, **terms)
    for name, value in parts.items():
        # Products of another size round another way, and a ∂L/∂x that goes to the other side of a bf16 step moves a row by
        # 2⁻⁸ of its largest summand, however far the summands cancel.
        by_row = value.abs().amax(-1, keepdim=True) if value.dim() == 2 else value.abs()
        off = ((whole[name] - value).abs() / (by_row + 1e-3)).max()
        assert off < 2e-2, (name, off)

"""The loss head's torch backend against its definition in fp64."""

import contextlib

import pytest
import torch
from amft_kernels import matmul
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from live_memory import LiveMemory
from loss_head_cases import (
    FORMS,
    HEADS,
    Place,
    check_logprob,
    check_logprob_case,
    check_policy,
    check_policy_case,
    make_head,
    make_inputs,
    make_terms,
    serve,
)
from loss_head_edges import EDGES
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.cpu_isa

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLACES = [Place("cpu", dtype, "torch") for dtype in DTYPES]
DOUBLE = PLACES[0]


@contextlib.contextmanager
def poisoned_memory():
    """Uninitialised memory holds NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", FORMS)
def test_policy_loss_is_its_definition(form, head, place):
    check_policy_case(place, form, head, 23, 7, 53)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_logprob_is_its_definition(head, chunk_rows, place):
    check_logprob_case(place, head, 23, 7, 53, chunk_rows)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("check", EDGES, ids=lambda check: check.__name__)
def test_edge(check, place):
    check(place)


def test_every_field_is_its_definition():
    hidden, weight, targets = make_inputs(DOUBLE, 40, 7, 53)
    terms = make_terms(DOUBLE, 40)
    got = linear_policy_loss(hidden, weight, targets, **terms)
    want = linear_policy_loss_reference(hidden, weight, targets, **terms)
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-10, atol=1e-10, msg=name)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 40)),
    form=st.sampled_from(sorted(FORMS)),
    head=st.sampled_from([name for name, options in HEADS.items() if "vocab_size" not in options]),
    rows=st.integers(1, 13),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_any_shape_and_form(shape, form, head, rows, scale):
    n, h, v = shape
    inputs = make_inputs(DOUBLE, n, h, v, scale=scale)
    options = make_head(DOUBLE, n, v, head)
    check_policy(DOUBLE, *inputs, chunk_bytes=8 * v * rows, **make_terms(DOUBLE, n, form), **options)
    check_logprob(DOUBLE, *inputs, chunk_bytes=8 * v * rows, **options)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head):
    """Against finite differences, which know nothing of the reference. Every row has a ratio away from the clip's edges."""
    n, h, v = 5, 3, 11
    hidden, weight, targets = make_inputs(DOUBLE, n, h, v)
    options = make_head(DOUBLE, n, v, head)
    if "vocab_size" in options:
        options["vocab_size"] = 9
        targets = targets.clamp(max=8)
    terms = make_terms(DOUBLE, n)
    bias = options.pop("bias", torch.zeros(v, dtype=torch.float64))
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        return linear_policy_loss(hidden, weight, targets, bias=bias, chunk_bytes=8 * v * 2, **terms, **options).loss

    def logprobs(hidden, weight, bias):
        return linear_logprob(hidden, weight, targets, bias=bias, chunk_bytes=8 * v * 2, **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(logprobs, inputs)


def test_dual_clip_and_clip_stop_the_gradient():
    """Ratios e^±1, advantages ±1 and a dual clip of 2: which rows have a gradient is known beforehand."""
    weight = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)  # log-probs are −log 4
    hidden = torch.ones(4, 1, dtype=torch.float64)
    current = -torch.tensor(4.0, dtype=torch.float64).log()
    step = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)  # log-ratio
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    on = torch.ones(4, dtype=torch.float64)
    out = linear_policy_loss(
        hidden, weight, torch.arange(4), pg_weight=on, advantages=advantages, old_logprobs=current - step, dual_clip=2.0
    )
    # up-weighted good: clipped at 1.2; down-weighted good: free; up-weighted bad: dual clip; down-weighted bad: clipped.
    wanted = -1.2 - torch.exp(torch.tensor(-1.0, dtype=torch.float64)) + 2.0 + 0.8
    torch.testing.assert_close(out.pg_sum, wanted, rtol=1e-12, atol=0)
    assert out.clipped_tokens == 3 and out.pg_tokens == 4
    out.loss.backward()
    free = torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    torch.testing.assert_close(weight.grad[:, 0], free * (0.25 - torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)))


def test_on_policy_is_ratio_one_with_gradient():
    """old_logprobs = None is old_logprobs = the current ones, held constant."""
    hidden, weight, targets = make_inputs(DOUBLE, 9, 5, 19)
    terms = make_terms(DOUBLE, 9, "on_policy_tis")
    current, _ = linear_logprob(hidden, weight, targets)
    got = check_policy(DOUBLE, hidden, weight, targets, **terms)
    want = check_policy(DOUBLE, hidden, weight, targets, **terms, old_logprobs=current)
    for name in ("loss", "hidden", "weight", "ratio_sum"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


def test_backward_twice_through_a_kept_graph():
    hidden, weight, targets = make_inputs(DOUBLE, 9, 5, 19)
    weight.requires_grad_()
    loss = linear_policy_loss(hidden, weight, targets, **make_terms(DOUBLE, 9)).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_onednn_products_are_right(monkeypatch):
    """On AVX-512 machines large products leave MKL; here the small ones do too, on any machine."""
    serve("onednn", monkeypatch)
    monkeypatch.setattr(matmul, "_ONEDNN_WORK", 0)
    monkeypatch.setattr(matmul, "_SLAB_BYTES", 4096)
    for place in PLACES[1:]:
        inputs = make_inputs(place, 23, 30, 530)
        check_policy(place, *inputs, chunk_bytes=8 * 530 * 9, **make_terms(place, 23))
        check_logprob(place, *inputs, chunk_bytes=8 * 530 * 9)


def test_products_of_bf16_make_logits_in_fp32(monkeypatch):
    """Two of them, the second of what the first one's rounding took off: as good as fp32 but for 2⁻¹⁷, whatever the slabs."""
    serve("bf16", monkeypatch)
    monkeypatch.setattr(matmul, "_SLAB_BYTES", 1 << 14)
    place = Place("cpu", torch.bfloat16, "torch")
    hidden, weight, _ = make_inputs(place, 33, 40, 530, scale=20)
    logits = torch.empty(33, 530)
    matmul.logits_into(logits, hidden, weight, None)
    truth = hidden.double() @ weight.double().t()
    assert (logits - truth).abs().max() < 2**-17 * truth.abs().max() + 1e-5
    assert (hidden @ weight.t() - truth).abs().max() > 2**-12 * truth.abs().max(), "one product is not"
    inputs = make_inputs(place, 23, 30, 530)
    check_policy(place, *inputs, chunk_bytes=8 * 530 * 9, **make_terms(place, 23))
    check_logprob(place, *inputs, chunk_bytes=8 * 530 * 9)


@pytest.mark.parametrize("limit,faster", [("", True), ("ALL", True), ("AVX2", False), ("AVX512_CORE_BF16", False)])
@pytest.mark.parametrize("amx", [True, False])
def test_where_bf16_products_serve(amx, limit, faster, monkeypatch):
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert matmul.bf16_is_faster.__wrapped__() == (amx and faster and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("products", ["mkl", "onednn", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES[:2] + DTYPES[3:])
@pytest.mark.parametrize("n,v,h", [(256, 8192, 256), (48, 2048, 64), (700, 5000, 128), (7, 3000, 16)])
def test_scratch_of_the_products_is_counted(n, v, h, dtype, products, monkeypatch):
    """What the plan of memory takes for the products is what they allocate, to the byte, in either way."""
    serve(products, monkeypatch)
    hidden, weight, wide = torch.zeros(n, h, dtype=dtype), torch.zeros(v, h, dtype=dtype), matmul.compute_dtype(dtype)
    logits, hidden_grad, weight_grad = (
        torch.zeros(n, v, dtype=wide),
        torch.zeros_like(hidden),
        weight.to(wide, copy=True),
    )
    with LiveMemory([hidden, weight, logits, hidden_grad, weight_grad]) as live:
        matmul.logits_into(logits, hidden, weight, None)
        matmul.hidden_grad_into(hidden_grad, logits, weight)
        matmul.weight_grad_into(weight_grad, logits, hidden, accumulate=True)
    assert live.peak == matmul.cpu_scratch_bytes(n, v, h, dtype)


@pytest.mark.parametrize(
    "capability,limits,faster",
    [
        ("AVX512", {}, True),
        ("AVX2", {}, False),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ("AVX512", {"DNNL_MAX_CPU_ISA": "avx2_vnni"}, False),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, True),
    ],
)
def test_where_onednn_serves(capability, limits, faster, monkeypatch):
    """Only where both torch and oneDNN may use AVX-512."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert matmul._onednn_is_faster.__wrapped__() == (faster and matmul.has_onednn())


def test_rows_without_weight_cost_nothing_where_there_are_none():
    """On a CPU: no pass over the logits more, and no copy of the hidden states, when every row that is worked on has weight."""

    class Fills(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__.startswith("masked_fill"):
                self.shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    place = PLACES[1]
    hidden, weight, targets = make_inputs(place, 12, 6, 37)  # a quarter is ignored, which the CPU leaves out anyway
    on = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.5

    def fills(nll_weight):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with Fills() as found:
            linear_policy_loss(*leaves, targets, nll_weight=nll_weight).loss.backward()
            logprobs, _ = linear_logprob(*leaves, targets)
            (logprobs * nll_weight).sum().backward()
        return found.shapes

    rows = int((targets >= 0).sum())
    assert fills(on) == []
    assert sorted(fills(torch.where(torch.arange(12) == (targets >= 0).nonzero()[0], 0.0, on))) == [
        (rows, 6),
        (rows, 37),
    ]

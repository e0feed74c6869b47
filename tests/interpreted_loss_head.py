"""The Triton kernels in Triton's interpreter: run by `test_loss_head_triton.py`, in a process of its own.

`TRITON_INTERPRET` must be set before Triton is imported, and would slow every other kernel of the process down.
fp32 and fp16 only: interpreted `tl.dot` on bf16 operands returns garbage.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from amft_kernels import chunks, fused_logprob_triton, linear_logprob, linear_policy_loss, rows_launch
from amft_kernels.policy_terms import PolicyOptions, Rows
from amft_kernels.row_math import Head
from loss_head_cases import FORMS, HEADS, Place, check_logprob, check_policy, make_head, make_inputs, make_terms
from loss_head_edges import EDGES, vocabularies_of_real_models

PLACES = [Place("cpu", dtype, "triton") for dtype in (torch.float32, torch.float16)]

# Padding columns hold whatever was in memory, NaN included, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check_definition(place, form, head):
    n, h, v = 9, 7, 1053 if form == "everything" else 53
    hidden, weight, targets = make_inputs(place, n, h, v)
    options = make_head(place, n, v, head)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    check_policy(place, hidden, weight, targets, chunk_bytes=8 * v * 5, **make_terms(place, n, form), **options)
    return hidden, weight, targets, options


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form(form, place):
    check_definition(place, form, "plain")


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_head(head, place):
    hidden, weight, targets, options = check_definition(place, "everything", head)
    check_logprob(place, hidden, weight, targets, chunk_bytes=8 * 1053 * 5, **options)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("check", EDGES, ids=lambda check: check.__name__)
def test_edge(check, place):
    if check is vocabularies_of_real_models and place.dtype == torch.float16:
        pytest.skip("slow here, and fp32 shows the same: only the product before the kernel differs")
    check(place)


@pytest.mark.parametrize(
    "check", [c for c in EDGES if "dead" in c.__name__ or "nan" in c.__name__], ids=lambda c: c.__name__
)
def test_bf16_rows_that_do_not_count(check, monkeypatch):
    """The row kernels in bf16; the fused one has a product of its own, which the interpreter gets wrong in this type."""
    monkeypatch.setattr(linear_logprob, "FUSED_FORWARD_MAX_HIDDEN", 0)
    check(Place("cpu", torch.bfloat16, "triton"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kept_gradients(dtype, monkeypatch):
    """∂L/∂x of a group of chunks in memory of its own, the products taken over the group: one group, several, and a last one
    that is shorter."""
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 2)
    place, n, v = Place("cpu", dtype, "triton"), 17, 300
    hidden, weight, targets = make_inputs(place, n, 20, v)
    hidden[targets == -100] = float("nan")
    plans = []
    monkeypatch.setattr(linear_policy_loss, "plan_rows", lambda *a: plans.append(chunks.plan_rows(*a)) or plans[-1])
    for rows in (12, 8, 7):
        check_policy(place, hidden, weight, targets, chunk_bytes=4 * v * rows, **make_terms(place, n))
    assert [(plan.keeps, plan.group_rows, plan.chunk_rows) for plan in plans] == [
        (True, 17, 3),
        (True, 9, 3),
        (True, 9, 2),
    ]


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("shape", [(1, 64, 53), (130, 64, 300)], ids=str)
def test_fused_forward(head, shape, monkeypatch):
    """The kernel without logits; with splits of the vocabulary, with one, and not at all."""
    n, h, v = shape
    place = PLACES[1]
    calls, fused_stats = [], fused_logprob_triton.fused_stats
    monkeypatch.setattr(fused_logprob_triton, "fused_stats", lambda *a: calls.append(a) or fused_stats(*a))
    hidden, weight, targets = make_inputs(place, n, h, v)
    options = make_head(place, n, v, head)
    targets = targets.clamp(max=options.get("vocab_size", v) - 1)
    check_logprob(place, hidden, weight, targets, **options)
    assert len(calls) == 1
    monkeypatch.setattr(fused_logprob_triton, "_PROGRAMS", 1)
    check_logprob(place, hidden, weight, targets, **options)
    monkeypatch.setattr(linear_logprob, "FUSED_FORWARD_MAX_HIDDEN", 0)
    check_logprob(place, hidden, weight, targets, **options)
    assert len(calls) == 2


def test_offsets_beyond_32_bits():
    """Rows 2³⁰ columns apart, in memory that is reserved but never touched: 32-bit offsets would fall outside."""
    v, stride = 100, 1 << 30
    try:
        memory = torch.UntypedStorage(4 * (2 * stride + 128))
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve 8.6 GB of address space: {error}")
    logits = torch.empty(0).set_(memory, 0, (3, 128), (stride, 1))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, v, generator=generator)
    logits[:, :v] = values
    head = Head(torch.empty(v, 1), None, 1.0, None)
    rows = Rows(targets=torch.tensor([5, 6, 7]), nll_weight=torch.ones(3))
    logprobs, entropy = torch.empty(2, 3)
    grad = logits[:, :v]
    rows_launch.policy_rows(logits, grad, 0, rows, head, PolicyOptions(), logprobs, entropy)
    want = values.log_softmax(1)
    torch.testing.assert_close(logprobs, want[torch.arange(3), rows.targets])
    torch.testing.assert_close(grad, want.exp() - torch.nn.functional.one_hot(rows.targets, v))

"""How rows are cut: the arithmetic of workspace, chunks and groups, against the budget and against each other."""

import pytest
import torch
from amft_kernels import chunks
from hypothesis import given, settings
from hypothesis import strategies as st

CARD = {"A100 40": 42_300_000_000, "H100": 84_900_000_000, "H200": 150_700_000_000}


def plan(n, v, budget, grad_dtype=torch.bfloat16):
    return chunks.plan_rows(torch.ones(n, dtype=torch.bool), v, torch.float32, budget, "triton", grad_dtype)


@pytest.mark.parametrize(("card", "size"), [("A100 40", 1 << 30), ("H100", 2 << 30), ("H200", 2 << 30)])
def test_the_default_workspace_goes_by_the_card(card, size):
    assert chunks.default_chunk_bytes(torch.device("cuda"), CARD[card]) == size
    assert chunks.default_chunk_bytes(torch.device("cpu")) == 64 << 20


@pytest.mark.parametrize(
    ("shape", "budget", "groups", "keeps"),
    [
        ((8192, 131072), 1 << 30, 4, False),  # three would leave chunks of 682 rows
        ((8192, 131072), 5 << 28, 3, True),  # four in place
        ((8192, 131072), 2 << 30, 2, False),  # two either way: in place, whose chunks are larger
        ((16384, 151936), 2 << 30, 4, True),  # five in place
        ((32768, 151936), 2 << 30, 7, True),  # ten
        ((2048, 131072), 1 << 30, 1, False),
        ((4096, 32768), 2 << 30, 1, False),
    ],
)
def test_passes_over_dw_at_real_sizes(shape, budget, groups, keeps):
    got = plan(*shape, budget)
    assert len(list(got.groups())) == groups and got.keeps == keeps
    assert not keeps or (got.chunk_rows >= 1024 and got.chunk_rows % 128 == 0)


def test_fp32_gradients_stay_in_place():
    """Kept apart they would take as much as the logits."""
    assert not plan(8192, 131072, 1 << 30, torch.float32).keeps
    assert not plan(8192, 131072, 1 << 30, None).keeps


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(0, 100_000),
    v=st.integers(1, 300_000),
    rows=st.integers(1, 20_000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_any_plan_keeps_to_its_budget_and_covers_every_row_once(n, v, rows, dtype):
    budget = 4 * v * rows
    got = plan(n, v, budget, dtype)
    kept = 2 * v * got.group_rows if got.keeps else 0
    assert 4 * v * got.chunk_rows + kept <= budget + 4 * v  # one row's rounding
    parts = [part for group in got.groups() for part in got.parts(group)]
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])][: len(parts)]
    assert (parts[-1].stop if parts else 0) == n
    in_place = plan(n, v, budget, None)
    assert len(list(got.groups())) <= len(list(in_place.groups()))

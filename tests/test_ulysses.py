"""Rows shared by several ranks: what each has of one, what is refused, what it costs; and four processes against one, which
ulysses_worker.py runs."""

import json
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import scale_worker
import torch
import ulysses_worker
from fakes import copy_run, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_close, lines, without_times
from tiny_vlm import make_vlm

from amft_fast import config_file, objective
from amft_fast.data.batch import FIELDS, collate
from amft_fast.engine.world import World
from amft_fast.errors import UserError
from amft_fast.model import ulysses
from amft_fast.run import build

deepspeed = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


# ------------------------------------------------------------------------------------------------------- parts of a row


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 6))
def test_the_parts_of_a_row_are_the_row(lengths, prompt, ranks):
    """Each token once and each row with a loss once, by any number of ranks, with and without a shared prompt."""
    g = np.random.default_rng(len(lengths))
    demos = [objective.demo_sequence([2, *range(3, 3 + prompt)], g.integers(5, 13, n).tolist()) for n in lengths]
    whole = collate(objective.weigh_sft(demos, 0.5, sum(lengths)), list(range(len(demos))), True)
    parts = [whole.part(rank, ranks) for rank in range(ranks)]
    tokens, size = whole.input_ids.shape[1], parts[0].input_ids.shape[1]
    for name in ("input_ids", "position_ids"):
        joined = torch.cat([getattr(p, name) for p in parts], 1)
        assert torch.equal(joined[:, :tokens], getattr(whole, name)) and not joined[:, tokens:].any()
    assert sorted(torch.cat([p.kept for p in parts]).tolist()) == list(range(len(whole.rows)))
    for rank, p in enumerate(parts):
        assert p.input_ids.shape == (1, size) and p.layout is whole.layout and p.counts == whole.counts
        if len(p.kept):
            assert torch.equal(p.rows + rank * size, whole.rows[p.kept])
            assert torch.equal(p.targets, whole.targets[p.kept])
            assert all(torch.equal(v, whole.fields[n][p.kept]) for n, v in p.fields.items())
        else:  # a row of no weight, by which the backward pass begins
            assert p.rows.tolist() == [0] and {n: v.item() for n, v in p.fields.items()} == {
                "nll_weight": FIELDS["nll_weight"]
            }


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--engine.kind", "local"], "sequence_parallel shares rows among the processes of kind deepspeed, got 2"),
        (["--train.packing", "false"], "needs train.packing and model.attention auto .* got train.packing false"),
        (["--model.attention", "sdpa"], "got train.packing none and model.attention sdpa"),
    ],
)
def test_settings_that_share_no_rows(flags, words):
    with pytest.raises(UserError, match=words):
        config_file.load(None, ["--engine.kind", "deepspeed", "--engine.sequence_parallel", "2", *flags])


def test_heads_that_cannot_be_dealt(tmp_path):
    """28 heads of which 4 are of keys and values, as Qwen2.5-7B has them, go to two, four and no more."""
    assert [s for s in (1, 2, 4, 7, 8, 14, 28) if ulysses.undealt(28, 4, s) is None] == [1, 2, 4, 28]
    assert ulysses.undealt(28, 4, 8) == "its 28 attention heads cannot be dealt to 8 ranks"
    assert ulysses.undealt(12, 4, 6) == "its 4 heads of keys and values cannot be dealt to 6 ranks"
    assert all(ulysses.undealt(64, 8, s) is None for s in (2, 4, 8, 16, 32, 64))
    rope = SimpleNamespace(num_attention_heads=4, rope_parameters={"rope_type": "dynamic"})
    assert "longest position" in ulysses.obstacle(SimpleNamespace(get_text_config=lambda: rope), 2)


@pytest.mark.parametrize(
    "size,ranks,words",
    [(2, 3, "3 processes cannot be groups of 2"), (4, 4, "its 2 attention heads cannot be dealt to 4 ranks")],
)
def test_processes_that_cannot_share_rows(tmp_path, size, ranks, words):
    model = make_checkpoint(tmp_path / "model")
    cfg = copy_run(tmp_path, model, "--engine.kind", "deepspeed", "--engine.sequence_parallel", str(size))
    with pytest.raises(UserError, match=words):
        build.check_shared_rows(cfg, World(0, ranks))


def test_pictures_share_no_rows(tmp_path):
    make_vlm(tmp_path, "qwen2_5_vl")
    cfg = copy_run(tmp_path / "run", tmp_path, "--engine.kind", "deepspeed", "--engine.sequence_parallel", "2")
    with pytest.raises(UserError, match=r"2 processes cannot share the rows of .* pictures give tokens positions"):
        build.check_shared_rows(cfg, World(0, 2))


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four processes left, with runs of one process beside it."""
    folder = tmp_path_factory.mktemp("ulysses")
    process = processes.launch("ulysses_worker.py", folder, processes=4)
    out = processes.finish(process, 1500)
    assert process.returncode == 0, out[-4000:]
    scale_worker.train(folder / "local", folder / "tied")
    scale_worker.train(folder / "gae", folder / "tied", *scale_worker.GAE)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


@deepspeed
@pytest.mark.integration
@pytest.mark.timeout(1800)
class TestFourProcesses:
    """Four processes on a CPU, over gloo: rows shared by two (so two of them at a time) and by all four."""

    @pytest.mark.parametrize("groups", [4, 2, 1])
    @pytest.mark.parametrize("size", [2, 4])
    def test_attention_over_parts_is_attention_over_rows(self, found, groups, size):
        """Outputs and gradients, with shared prompts and sliding windows; sums are of at most 53 terms near 1."""
        assert found["attention"][f"{groups} by {size}"] < 53 * torch.finfo(torch.float32).eps

    def test_a_lone_sequence_of_any_length(self, found):
        """Loss, gradient, log-probs and entropies, of the policy and of a plain copy; lengths from 4 to 16 tokens of the row,
        and three answers that share a prompt."""
        assert len(found["lengths"]) == 28 and max(found["lengths"].values()) < 1e-6

    @pytest.mark.parametrize("size", ["2", "4"])
    def test_what_a_rank_keeps_for_the_backward_pass(self, found, size):
        """Within 2 % of the plan; it knows nothing of the indices and of the hidden states of rows with a loss."""
        kept, planned = found["kept"][size]
        assert kept == pytest.approx(planned, rel=0.02)

    @pytest.mark.parametrize("case", ulysses_worker.CASES)
    def test_an_engine_whose_ranks_share_rows_equals_the_local_one(self, found, case):
        """Losses and norms, and the weights after three steps, to 1e-6; utility gradients and probes within what rounding may
        do (`scale_worker.Shake`)."""
        for what, (error, bound) in found["engines"][case].items():
            assert error <= bound < 0.1, what
            assert error < 1e-6 or what in ("utility", "probes"), what

    @pytest.mark.parametrize(("name", "reference"), [("by2", "local"), ("gae4", "gae"), ("from2to4", "local")])
    def test_a_run_on_shared_rows_follows_the_run_of_one_process(self, folder, name, reference):
        """Every figure of every step; with tiles, a value head, old and reference log-probs; resumed by others."""
        want, got = (without_times(lines(folder / f)) for f in (reference, name))
        assert_close(got, want)

"""bench/rollout.py: its loads, its checks, and a run from end to end on a tiny model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not part of the package

from amft_fast.rollout.transformers import TransformersEngine
from bench import rollout

TINY = ["--device", "cpu", "--rounds", "2", "--models", "tiny"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(rollout.MODELS, "tiny", (32, 2, 4, 2, 48, 60))
    monkeypatch.setitem(rollout.CASES, "tiny", (3, 2, 5, 4))
    monkeypatch.setattr(rollout, "overhead", lambda device: {rollout.ENGINE: 1.0})


def test_loads():
    case = (8, 8, 64, 32)
    even, ragged, tailed = (rollout.requests(load, case, 1000) for load in rollout.LOADS)
    assert {len(r.prompt_ids) for r in even + tailed} == {64} and {r.max_new_tokens for r in even} == {32}
    prompts = [len(r.prompt_ids) for r in ragged[::8]]
    assert (min(prompts), max(prompts)) == (16, 112) and len({r.prompt_ids for r in ragged}) == 8
    for asked in (ragged, tailed):
        assert np.mean([r.max_new_tokens for r in asked]) == pytest.approx(32, rel=0.05)
    assert max(r.max_new_tokens for r in tailed) > 4 * 32 and min(r.max_new_tokens for r in tailed) >= 1
    assert len({r.seed for r in tailed}) == 64


@pytest.mark.parametrize("load", rollout.LOADS)
def test_every_way_draws_what_is_asked_for_and_is_measured(load, tmp_path, capsys):
    ways = f"{rollout.ENGINE},{rollout.FORWARD},{rollout.GENERATE}"
    assert rollout.main([*TINY, "--loads", load, "--ways", ways, "--out", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    (result,) = written["results"]
    assert written["clock"] == "processor time" and written["commit"] and result["failed"] == {}
    assert set(result["ways"]) == set(ways.split(","))
    for figures in result["ways"].values():
        assert figures["tokens_per_s"] > 0 and len(figures["seconds"]) == 2
    assert result["ways"][rollout.GENERATE]["times_generate"] == 1
    assert f"tiny, {load}, {result['tokens']} tokens" in (tmp_path / "r.md").read_text()


def test_an_engine_with_other_greedy_tokens_is_red(monkeypatch):
    generate = TransformersEngine.generate

    def wrong(self, asked, sampling):
        out = generate(self, asked, sampling)
        out[-1].token_ids[-1] ^= 1
        return out

    monkeypatch.setattr(TransformersEngine, "generate", wrong)
    with pytest.raises(SystemExit, match="greedy tokens"):
        rollout.measure("tiny", "even", "cpu", 1, [rollout.GENERATE])


def test_a_way_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def broken(model, asked):
        raise RuntimeError("no pages here")

    monkeypatch.setattr(rollout, "hf_generate_batch", broken)
    result = rollout.measure("tiny", "even", "cpu", 1, [rollout.GENERATE, rollout.PAGED])
    assert result["failed"] == {rollout.PAGED: "RuntimeError: no pages here"} and set(result["ways"]) == {
        rollout.GENERATE
    }

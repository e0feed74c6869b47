"""How many CPU threads a run takes where its config does not say."""

import json
from types import SimpleNamespace

import pytest
import torch
from fakes import make_checkpoint
from runs import cfg_for
from transformers import AutoModelForCausalLM

from amft_fast.run import threads


@pytest.fixture
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """No thread count from the environment, and torch's own back at the end."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def cfg(folder, count=None):
    return SimpleNamespace(run=SimpleNamespace(threads=count, dir=str(folder)))


@pytest.mark.parametrize(
    ("seconds", "most", "want"),
    [
        ({1: 1.0, 2: 0.6, 3: 0.5}, 3, 3),
        ({1: 1.0, 2: 0.6, 4: 0.58, 6: 0.57}, 6, 2),
        ({1: 1.0, 2: 5.0, 4: 9.0}, 4, 1),
        ({1: 1.0, 2: 0.95}, 2, 1),
        ({}, 1, 1),
    ],
    ids=["each is faster", "no tenth more", "cores are taken", "hardly faster", "one core"],
)
def test_the_least_number_that_no_larger_one_beats_by_a_tenth(model, monkeypatch, seconds, most, want):
    monkeypatch.setattr(threads, "SECONDS", 0.0)
    monkeypatch.setattr(threads, "_seconds", lambda model, ids: seconds[torch.get_num_threads()])
    model.train()
    assert threads.fastest(model, most) == want and model.training


@pytest.mark.parametrize("begins", [3, 4, 5, 6])
def test_what_else_runs_for_a_moment_does_not_decide(model, monkeypatch, begins):
    """A machine that is four times slower for three passes, whichever number's they are."""
    passes = []

    def seconds(model, ids):
        passes.append({1: 1.0, 2: 0.6}[torch.get_num_threads()])
        return passes[-1] * (4 if begins <= len(passes) < begins + 3 else 1)

    monkeypatch.setattr(threads, "SECONDS", 0.0)
    monkeypatch.setattr(threads, "_seconds", seconds)
    assert threads.fastest(model, 2) == 2


def test_a_large_model_is_not_timed_long_on_few_threads(model, monkeypatch):
    """A pass of 64 seconds on one thread, as of some billions of parameters: once on few, four times on many."""
    passes = []

    def seconds(model, ids):
        passes.append(torch.get_num_threads())
        return 64 / passes[-1]

    monkeypatch.setattr(threads, "SECONDS", 0.0)
    monkeypatch.setattr(threads, "_seconds", seconds)
    assert threads.fastest(model, 64) == 64
    assert [passes.count(n) for n in (1, 2, 4, 8, 16, 32, 64)] == [1, 1, 1, 1, 1, 4, 4]


def test_a_real_model_is_timed(model, monkeypatch):
    monkeypatch.setattr(threads, "SECONDS", 0.0)
    assert threads.fastest(model, 2) in (1, 2)


def test_the_setting_the_resumed_run_and_the_environment_come_before_the_clock(model, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "fastest", lambda model, most: 7)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    torch.set_num_threads(3)
    assert threads.choose(cfg(tmp_path), model) == 7 == torch.get_num_threads()
    (tmp_path / "environment.json").write_text(json.dumps({"threads": "5"}))
    assert threads.choose(cfg(tmp_path), model) == 7, "a run that begins anew"
    assert threads.choose(cfg(tmp_path), model, resume=True) == 5
    assert threads.choose(cfg(tmp_path, 2), model, resume=True) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    assert threads.choose(cfg(tmp_path), model) == 4
    (tmp_path / "environment.json").write_text("{")
    assert threads.choose(cfg(tmp_path), model, resume=True) == 4


def test_no_more_threads_than_torch_had_or_the_quota_gives(model, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "fastest", lambda model, most: most)
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert threads.choose(cfg(tmp_path), model) == 2
    torch.set_num_threads(1)
    assert threads.choose(cfg(tmp_path), model) == 1


def test_a_run_says_which_it_took(tmp_path, checkpoint_folder):
    from runs import train

    run = cfg_for(tmp_path / "run", checkpoint_folder, "--train.steps", "1", "--eval.at_start", "false")
    assert train(run) == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == "1"

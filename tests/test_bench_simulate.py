"""bench simulate: what the model says where it can be worked out by hand, and its command."""

import argparse

import numpy as np
import pytest

from amft_fast import config_file
from amft_fast.doctor import shapes
from bench import simulate
from bench.simulate import CONTEXT, ROWS, STEP_S, Card, Server, best

CONFIG = "configs/plan/7b_8gpu.toml"
RATE = (1e-8, 14.0)


@pytest.fixture(scope="module")
def card():
    return Card.measured()


def run(card, gpus, drawing, mode, *flags, steps=6, model="Qwen2.5-7B"):
    cfg = config_file.load(CONFIG, list(flags))
    args = argparse.Namespace(steps=steps, servers=4, staleness=2, lengths=None)
    return simulate.simulate(cfg, shapes.find(model), card, gpus, drawing, mode, args, RATE)


def test_the_card_decodes_as_was_measured(card):
    server = Server(card, shapes.find("Qwen2.5-1.5B"), 1, ROWS)
    assert 0 < card.launch < STEP_S / 2, "rates explain most of the measured step"
    assert server.step_time(ROWS, ROWS * CONTEXT) == pytest.approx(STEP_S)


def test_answers_of_one_length_take_as_long_as_one_reckons(card, monkeypatch):
    """Eight GPUs in turns: 16 rows each of 100 tokens, then the update."""
    monkeypatch.setattr(simulate, "lengths_of", lambda cfg, run, rng, count: np.full(count, 100))
    flags = ["--train.prompts_per_step", "16", "--rollout.num_generations", "8"]
    found = run(card, 8, 8, "shared", *flags, "--train.method", "rl")
    server = Server(card, shapes.find("Qwen2.5-7B"), 1, 256)
    decode = 100 * server.step_time(16, 16 * (512 + 50))
    prefill = 16 * 2 * server.shape.parameters * 512 / 8 / card.products
    assert found.step_s == pytest.approx(decode + prefill + found.costs.train + found.costs.sync, rel=0.02)
    assert found.age == 0


def test_asynchrony_fills_what_waiting_leaves_idle(card):
    step, ahead, flight = (run(card, 8, 3, mode) for mode in ("in step", "ahead", "in flight"))
    assert step.age == 0 and 0 < ahead.age <= 1 and 0 < flight.age <= 2
    assert flight.step_s < ahead.step_s * 1.02 < step.step_s
    assert step.idle_servers + step.idle_trainers > 0.9, "one waits for the other"
    assert ahead.step_s >= ahead.costs.train and flight.idle_trainers < step.idle_trainers


def test_checkpoints_cost_the_copy_and_a_slow_disk_holds_the_next_one_up(card, monkeypatch):
    base = run(card, 8, 3, "in step")
    often = run(card, 8, 3, "in step", "--checkpoint.every", "1")
    assert often.step_s - base.step_s == pytest.approx(often.costs.copy, rel=0.05)
    monkeypatch.setattr(simulate, "DISK", 1e8)
    slow = run(card, 8, 3, "in step", "--checkpoint.every", "1")
    assert slow.step_s > often.step_s * 2


def test_what_does_not_fit_is_no_split(card):
    args = argparse.Namespace(steps=2, servers=2, staleness=2, lengths=None)
    assert best(config_file.load(CONFIG, []), shapes.find("Qwen2.5-72B"), card, 8, "ahead", args, RATE) is None


def test_the_command(tmp_path, capsys):
    few = [
        "--gpus",
        "8",
        "--steps",
        "2",
        "--servers",
        "1",
        "--train.prompts_per_step",
        "8",
        "--train.demos_per_step",
        "8",
    ]
    assert simulate.main([CONFIG, *few, "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert (
        out.count("| Qwen2.5-Math-7B | 8 |") == 4
        and "| in flight |" in out
        and (tmp_path / "p.png").stat().st_size > 1000
    )
    assert simulate.main([CONFIG, "--models", "no/such"]) == 2
    assert simulate.main([CONFIG, *few, "--lengths", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "no/such" in err and "--lengths" in err and "Traceback" not in err

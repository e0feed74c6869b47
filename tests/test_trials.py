"""Trials: what other weights would earn, the decisions made of it, and that what is tried leaves no trace."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import CopyTask, make_checkpoint
from runs import cfg_for, lines, steps, train, trainer_of

from amft_fast import config_file, controller
from amft_fast.controller.trials import EXPLORE, IMITATE, student
from amft_fast.held_out import HeldOut
from amft_fast.interfaces import Item, Sample
from amft_fast.meta_gradient import RolloutGroup

pytestmark = pytest.mark.cpu_isa


def make(*flags):
    return controller.make(config_file.load(None, ["--train.method", "amft", *flags]))


def rewards(right, prompts=20, answers=8):
    """[prompts, answers], of which the first `right` prompts have one right answer and one more a prompt further on."""
    out = np.zeros((prompts, answers))
    for i in range(right):
        out[i, : 1 + i % (answers - 1)] = 1
    return out


def told(c, rewards):
    return c.drawn(rewards, np.ptp(rewards, axis=1) > 0)


def gains(mean, prompts=20, spread=1.0):
    """Per prompt, with this mean and about this spread."""
    return mean + spread * np.cos(np.arange(prompts) * np.pi)


# ------------------------------------------------------------------------------------------------------ the decisions


def test_where_nothing_is_alive_it_imitates_and_looks_at_twice_as_many_updates_each_time():
    c = make()
    assert c.mu(0) == 0.5 and c.wants_look(0, 0)
    assert told(c, rewards(0))[0] is False and c.mu(0) == IMITATE
    c.looked(0, 100)
    looks = []
    for step in range(100):
        if c.wants_look(step, 10 * step):
            looks.append(step)
            assert told(c, rewards(0))[0] is False
            c.looked(10 * step, 100)
        c.observe(step)
    assert looks == [8, 16, 32, 64] and c.mu(0) == IMITATE


def test_it_imitates_as_long_as_that_shows():
    c = make()
    told(c, rewards(0))
    told(c, rewards(10))
    assert c.mu(0) == IMITATE, "from nothing to half of the prompts"
    _, figures = told(c, rewards(10))
    assert c.mu(0) == EXPLORE and figures["controller/rise_t"] == 0


def test_without_evidence_it_explores():
    c = make()
    try_it, figures = told(c, rewards(10))
    assert try_it and c.mu(0) == EXPLORE and figures["controller/alive"] == 0.5
    assert c.tried(gains(0.1), 1000)["controller/gain_sft_t"] < 2
    c.looked(1000, 600)
    assert not c.wants_rate(10) and not c.wants_look(10, 10_999) and c.wants_look(10, 11_000), (
        "a look is 6 % of its tokens"
    )
    told(c, rewards(10))
    c.tried(gains(-5), 1000)
    c.looked(12_000, 600)
    assert not c.wants_look(10, 31_999) and c.wants_look(10, 32_000), "and the next is twice as far away"


@pytest.mark.parametrize(("explored", "want"), [(0.0, IMITATE), (5.0, IMITATE), (200.0, EXPLORE)])
def test_a_trial_that_brings_something_is_held_against_exploring(explored, want):
    """Gains of 3 for 1,000 tokens against these for 20,000."""
    c = make("--controller.window", "4")
    told(c, rewards(10))
    c.tried(gains(3), 1000)
    c.looked(5000, 600)
    for step in range(4):
        assert not c.wants_rate(step) and c.mu(0) == EXPLORE
        c.observe(step)
    assert c.wants_rate(4) and not c.wants_look(4, 10**9)
    figures = c.explored(gains(explored), 25_000)
    assert figures["controller/gain_rl"] == pytest.approx(explored / 20_000 * 1e6)
    assert c.mu(0) == want and not c.wants_rate(4)


def test_what_was_alive_and_died_is_imitated_again():
    c = make()
    told(c, rewards(10))
    c.tried(gains(-1), 1000)
    c.looked(0, 600)
    assert told(c, rewards(0))[0] is False and c.mu(0) == IMITATE


def test_the_control_decides_by_lot_and_the_state_is_plain_json():
    ends = set()
    for seed in range(12):
        c = make("--controller.signal", "lot", "--run.seed", str(seed))
        told(c, rewards(10))
        ends.add(c.mu(0))
    assert ends == {IMITATE, EXPLORE}
    c = make()
    told(c, rewards(7))
    c.tried(gains(3), 1000)
    c.looked(700, 600)
    again = make()
    again.load_state_dict(json.loads(json.dumps(c.state_dict())))
    assert again.state_dict() == c.state_dict()


def test_what_is_solved_is_alive():
    held_out = drawn(log_softmax(np.zeros(3)), np.array([1.0, 0, 0]), 30, 2)
    for group in held_out.cache.groups:
        for sample in group.samples:
            sample.success = sample.reward == 1
    first = held_out.rewards
    assert held_out.alive.tolist() == [row.any() for row in first] and 0 < held_out.alive.mean() < 1


def test_students_t():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    assert student(values) == pytest.approx(3 / (np.sqrt(10 / 3) / 2)) and student(np.ones(5)) == 0 == student(
        np.zeros(5)
    )


# ---------------------------------------------------------------------------------------------------------- the gains


class Categorical:
    """Answers of one token with log-probs `logp`; stands for the scorer at other weights."""

    def __init__(self, logp):
        self.logp = logp

    def tokens(self, sequences):
        return [(self.logp[s.ids[-1:]], np.zeros(1)) for s in sequences]


def drawn(before, reward, prompts, answers, seed=0):
    """Held-out prompts with answers from softmax(`before`), which earn what `reward` says of their token."""
    rng, held_out = np.random.default_rng(seed), HeldOut([Item(str(i), i) for i in range(prompts)], None, 1.0, 50.0)
    p = np.exp(before)
    for i in range(prompts):
        tokens = rng.choice(len(p), answers, p=p / p.sum())
        samples = [
            Sample([1], [int(t)], [1], [float(before[t])], 0, "stop", str(i), i, reward=reward[t]) for t in tokens
        ]
        held_out.cache.groups.append(RolloutGroup(i, 0, samples))
    return held_out


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


def test_the_gain_is_the_difference_of_expected_rewards():
    """Exactly, for weights far away too: the mean of 20,000 prompts lies within four standard errors of it."""
    rng = np.random.default_rng(1)
    before, reward = log_softmax(rng.normal(size=6)), np.array([1.0, 0.0, 0.0, 1.0, 0.5, 0.0])
    after = log_softmax(before + 0.8 * rng.normal(size=6))
    held_out = drawn(before, reward, 20_000, 4)
    held_out.scorer = Categorical(after)
    found, tokens = held_out.gains()
    want = (np.exp(after) - np.exp(before)) @ reward
    assert abs(want) > 0.05 and abs(found.mean() - want) < 4 * found.std() / np.sqrt(len(found))
    alive = np.ptp(held_out.rewards, axis=1) > 0
    assert 0 < alive.mean() < 1 and tokens == 2 * 4 * alive.sum() // 3 and not found[~alive].any()


def test_near_by_it_is_the_policy_gradients_product_with_the_step():
    rng = np.random.default_rng(2)
    before, reward, d = log_softmax(rng.normal(size=5)), np.array([1.0, 0, 0, 1, 0]), rng.normal(size=5)
    held_out, eps = drawn(before, reward, 50, 8), 1e-6
    held_out.scorer = Categorical(log_softmax(before + eps * d))
    slope = d - np.exp(before) @ d  # of log π along d
    rewards_, tokens = (
        held_out.rewards,
        np.array([[s.response_ids[0] for s in g.samples] for g in held_out.cache.groups]),
    )
    others = (rewards_.sum(1, keepdims=True) - rewards_) / 7
    want = ((rewards_ - others) * slope[tokens]).mean(axis=1)
    assert held_out.gains()[0] / eps == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_a_weight_that_explodes_is_bounded():
    before = log_softmax(np.zeros(3))
    held_out = drawn(before, np.array([1.0, 0, 0]), 30, 6)
    held_out.cap, held_out.scorer = 5.0, Categorical(np.array([200.0, -300.0, -300.0]))
    assert np.abs(held_out.gains()[0]).max() <= 5


# ---------------------------------------------------------------------------------------------------------- whole runs

TRIED = (
    "--train.method",
    "amft",
    "--controller.look_prompts",
    "2",
    "--controller.trial_updates",
    "3",
    "--train.steps",
    "6",
)


class Alive(CopyTask):
    """Any answer is right or wrong by its letters, so that groups have spread from the beginning."""

    def start(self, item):
        episode = super().start(item)
        step = episode.step

        def judged(text):
            return replace(step(text), reward=float(sum(map(ord, text)) % 2))

        episode.step = judged
        return episode


class Known(CopyTask):
    """Held-out prompts are those of the training data."""

    def prompts(self, split):
        return super().prompts("train" if split == "val" else split)


def test_exploring_with_looks_is_exploring_without(tmp_path, checkpoint_folder):
    """To the bit: what a trial did is gone, and its demonstrations are those of the next step that takes any."""
    base, quiet = ("--train.steps", "6", "--train.warmup_steps", "0"), ("--controller.confidence", "1e9")
    rl = trainer_of(cfg_for(tmp_path, checkpoint_folder, *base, "--train.method", "rl"), Alive())
    amft = trainer_of(cfg_for(tmp_path, checkpoint_folder, *base, *TRIED, *quiet), Alive())
    tried = 0
    for a, b in zip(steps(rl, 6), steps(amft, 6)):
        tried += "controller/gain_sft" in b.figures
        assert b.mu == 0 and all(b.figures[k] == a.figures[k] for k in ("loss", "grad_norm", "entropy"))
        extra = b.tokens - a.tokens
        assert extra > 0 if "controller/gain_sft" in b.figures else extra == 0
    assert tried >= 1
    for x, y in zip(rl.engine.groups, amft.engine.groups):
        assert torch.equal(x.master, y.master)


def test_the_dead_are_imitated_to_life(tmp_path, checkpoint_folder):
    """Imitation alone, without rollouts, as long as the answers to a held-out prompt all earn the same."""
    flags = ("--train.warmup_steps", "0", "--controller.first_look", "4", "--controller.min_alive", "0.9")
    flags = (*TRIED, *flags, "--controller.look_prompts", "4", "--train.steps", "40", "--eval.every", "0")
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags), task=Known()) == 0
    records = lines(tmp_path)
    mus, alive = [r["mu"] for r in records], [r["controller/alive"] for r in records if "controller/alive" in r]
    assert mus[:4] == [1, 1, 1, 1] and set(mus) == {0.0, 1.0} and alive[0] < 0.9 <= max(alive)
    for r in records:
        assert ("success" in r) == (r["mu"] == 0) and ("sft_loss" in r) == (r["mu"] == 1)
    assert json.loads((tmp_path / "summary.json").read_text())["end"]["train"]["greedy"] > 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("done", [0, 2])
def test_back_to_the_bit(tmp_path, optimizer, done):
    cfg = cfg_for(
        tmp_path, make_checkpoint(tmp_path / "model"), "--train.optimizer", optimizer, "--train.warmup_steps", "0"
    )
    trainer, other = trainer_of(cfg), trainer_of(cfg)
    steps(trainer, done), steps(other, done)
    kept = trainer.engine.snapshot()
    steps(trainer, 2)
    trainer.engine.restore(kept)
    mine, theirs = trainer.engine.state_dict(), other.engine.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters(), other.policy.parameters()))

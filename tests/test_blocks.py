"""Blocks of imitation: what is decided at each look, and that what is taken back leaves no trace."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import CopyTask, make_checkpoint
from runs import cfg_for, lines, steps, taken_up, train, trainer_of
from safetensors.torch import save

from amft_fast import config_file, controller
from amft_fast.controller.statistics import student
from amft_fast.engine.parts import Tensors
from amft_fast.held_out import HeldOut, look
from amft_fast.interfaces import Item, Sample

pytestmark = pytest.mark.cpu_isa


def make(*flags):
    return controller.make(config_file.load(None, ["--train.method", "amft", "--train.steps", "100", *flags]))


def held_out(reward, alive=1.0, spread=0.3, prompts=20, right=0.5):
    """Prompts with this mean reward, of which this share is alive."""
    rewards = reward + spread * np.cos(np.arange(prompts) * 2.0)
    return HeldOut(rewards, np.arange(prompts) < alive * prompts, right, 0)


def looks(c, results, until=100.0):
    """Feeds these results at the looks that are asked for; returns their clocks, the verdicts, and μ after them."""
    clock, seen = 0.0, []
    results = iter(results)
    while clock < until:
        if c.wants_look(int(clock), clock):
            result = next(results, None)
            if result is None:
                break
            verdict, _ = c.looked(result, clock)
            seen.append((clock, verdict, c.mu(clock)))
        clock += 1
    return seen


def raised(result, t):
    """The same prompts with rewards higher by t standard errors."""
    noise = np.cos(np.arange(20) * 3.0)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    return result._replace(rewards=result.rewards + 0.02 * (t + noise * np.sqrt(20)))


# ------------------------------------------------------------------------------------------------------ the decisions


def test_a_block_that_shows_is_doubled_and_then_exploring_begins():
    results = [held_out(x) for x in (0.1, 0.3, 0.6, 0.6)]
    seen = looks(make("--controller.imitation_share", "0.05"), results)
    assert seen == [(0, "keep", 1), (5, "keep", 1), (10, "keep", 1), (20, "keep", 0)]


@pytest.mark.parametrize(("t", "verdict"), [(0.5, "keep"), (-0.8, "keep"), (-1.2, "back")])
def test_imitation_that_has_shown_before_and_does_not_now_stays_unless_it_has_fallen(t, verdict):
    c, shown = make(), held_out(0.3)
    c.looked(held_out(0.1), 0.0)
    assert c.looked(shown, 6.0)[0] == "keep" and c.mu(6) == 1
    assert c.looked(raised(shown, t), 12.0)[0] == verdict and c.mu(12) == 0
    assert c.imitated == (12 if verdict == "keep" else 6)


def test_blocks_of_imitation_are_at_most_two_of_the_first():
    """So a look that errs takes back no more."""
    seen = looks(make(), [held_out(x) for x in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)])
    assert [clock for clock, _, _ in seen] == [0, 6, 12, 24, 36, 48] and {mu for _, _, mu in seen} == {1}


def test_imitation_that_does_not_show_costs_one_block():
    assert looks(make(), [held_out(0.3), held_out(0.3)]) == [(0, "keep", 1), (6, "back", 0)]


@pytest.mark.parametrize(("t", "want"), [(1.2, "keep"), (0.8, "back")])
def test_half_of_the_confidence_is_asked_of_imitation(t, want):
    c, base = make(), held_out(0.1)
    c.looked(base, 0.0)
    verdict, figures = c.looked(raised(base, t), 6.0)
    assert figures["controller/rise_t"] == pytest.approx(t) and verdict == want


@pytest.mark.parametrize(("rise", "want"), [(0.02, "back"), (0.2, "keep"), (-0.5, "back")])
def test_the_rise_must_stand_out_of_its_noise(rise, want):
    c, rng = make(), np.random.default_rng(0)
    before = held_out(0.3)
    c.looked(before, 0.0)
    after = before._replace(rewards=before.rewards + rise + 0.2 * rng.normal(size=20))
    verdict, figures = c.looked(after, 6.0)
    assert verdict == want and figures["controller/rise_t"] == pytest.approx(student(after.rewards - before.rewards))


def test_the_dead_are_imitated_until_they_live():
    """Whatever the rise; what woke them stays, though few prompts have any success yet."""
    dead, woken = held_out(0.0, alive=0.0, spread=0.0), held_out(0.001, alive=0.1, spread=0.0)
    seen = looks(make(), [dead, dead, dead, woken, woken])
    assert [(clock, verdict) for clock, verdict, _ in seen] == [
        (0, "keep"),
        (6, "keep"),
        (12, "keep"),
        (24, "keep"),
        (36, "keep"),
    ]


def test_what_imitation_has_all_but_solved_is_not_explored():
    solved, flags = held_out(0.97, right=0.97), ("--controller.solved", "0.95")
    seen = looks(make(*flags), [held_out(0.3), solved, solved, solved, held_out(0.94, right=0.94)])
    assert [(clock, mu) for clock, _, mu in seen] == [(0, 1), (6, 1), (12, 1), (24, 1), (36, 0)]
    assert looks(make(*flags), [solved, solved])[-1] == (6, "back", 0), "a base that is as good by itself"


def test_exploring_goes_on_while_it_does_not_fall():
    """In blocks that double; what has risen is kept."""
    base = held_out(0.3)
    results = [base, base, raised(base, 0.5), raised(base, 1.2), raised(raised(base, 1.2), 1.5)]
    seen = looks(make(), results, until=97)
    assert seen == [(0, "keep", 1), (6, "back", 0), (12, "go on", 0), (24, "keep", 0), (48, "keep", 0)]


@pytest.mark.parametrize(("t", "verdict"), [(0.5, "keep"), (-0.5, "back")])
def test_exploring_that_stands_still_gives_imitation_another_try(t, verdict):
    """From the better of both, for two blocks; and it must not have fallen to stay."""
    base = held_out(0.3)
    still = raised(base, t)
    better = base if t < 0 else still
    seen = looks(make(), [base, base, base, base, still, raised(better, 0.5)], until=61)
    assert seen[:4] == [(0, "keep", 1), (6, "back", 0), (12, "go on", 0), (24, "go on", 0)]
    assert seen[4:] == [(48, verdict, 1), (60, "keep", 1)]


def test_imitation_that_has_shown_before_is_tried_again_sooner_and_each_time_later():
    shown = [held_out(0.1), held_out(0.3)]
    seen = looks(make(), [*shown, *[shown[1]] * 9])
    assert [(clock, mu) for clock, _, mu in seen] == [
        *[(0, 1), (6, 1), (12, 0), (18, 0), (30, 1), (42, 0), (48, 0), (60, 0), (84, 1), (96, 0)],
    ]


def test_exploring_that_falls_is_taken_back_and_imitation_has_another_try_of_twice_the_length():
    """And then stays where it does not fall, for exploring is no better."""
    flat = held_out(0.3)._replace(rewards=held_out(0.3).rewards + 0.1 * np.cos(np.arange(20) * 3.0))
    seen = looks(make(), [held_out(0.3), held_out(0.3), held_out(0.1), flat, held_out(0.5)], until=49)
    assert seen == [(0, "keep", 1), (6, "back", 0), (12, "back", 1), (24, "keep", 1), (36, "keep", 1)]
    both = looks(make(), [held_out(0.3), held_out(0.3), held_out(0.1), held_out(0.2), held_out(0.4)], until=31)
    assert both == [(0, "keep", 1), (6, "back", 0), (12, "back", 1), (24, "back", 0), (30, "keep", 0)]


def test_the_better_of_the_last_and_the_kept_weights_is_what_a_run_ends_with():
    c = make()
    assert not c.wants_last_look
    c.looked(held_out(0.3), 0.0)
    assert c.wants_last_look
    again = make()
    again.load_state_dict(c.state_dict())
    assert c.ended(held_out(0.29), 100.0) == ("back", pytest.approx({"reward": 0.29, "kept_reward": 0.3}, abs=0.02))
    assert again.ended(held_out(0.31), 100.0)[0] == "go on" and not again.wants_last_look


def test_what_dies_while_it_explores_is_imitated_again():
    c = make("--controller.window", "3")
    c.looked(held_out(0.3), 0.0)
    c.looked(held_out(0.3), 6.0)
    for alive in (False, False, True, False, False):
        c.explored(alive)
        assert not c.wants_look(11, 11.0)
    c.explored(False)
    assert c.wants_look(11, 11.0)
    assert c.looked(held_out(0.3), 11.0)[0] == "go on" and c.mu(11) == 0 and not c.wants_look(12, 12.0)
    for _ in range(3):
        c.explored(False)
    verdict, _ = c.looked(held_out(0.0, alive=0.0), 15.0)
    assert verdict == "keep" and c.mu(15) == 1 and not c.wants_look(20, 20.0) and c.wants_look(21, 21.0)


def test_the_control_decides_by_lot_and_the_state_is_plain_json():
    verdicts = set()
    for seed in range(12):
        c = make("--controller.signal", "lot", "--run.seed", str(seed))
        c.looked(held_out(0.1), 0.0)
        verdicts.add(c.looked(held_out(0.5), 6.0)[0])
    assert verdicts == {"keep", "back"}
    c = make()
    for taken in (0, 1):
        again = make()
        again.load_state_dict(json.loads(json.dumps(c.state_dict())))
        assert again.state_dict() == c.state_dict() and again.wants_look(0, 0.0) == c.wants_look(0, 0.0) == (not taken)
        c.looked(held_out(0.1), 0.0)


def test_students_t():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    assert student(values) == pytest.approx(3 / (np.sqrt(10 / 3) / 2)) and student(np.ones(5)) == 0 == student(
        np.zeros(5)
    )


def test_what_is_alive():
    """Answers that earned differently, and answers that are all right."""
    rows = [((0, 0), (False, False)), ((0, 1), (False, True)), ((1, 1), (True, True)), ((0.2, 0.4), (False, False))]
    samples = [
        Sample([1, 2], [3, 4], [1, 0], [0.0, 0.0], 0, "stop", str(i), i, reward=r, success=s)
        for i, (rewards, right) in enumerate(rows)
        for r, s in zip(rewards, right)
    ]
    found = HeldOut.of(samples, 4)
    assert found.alive.tolist() == [0, 1, 1, 1] and found.sampled == 8
    assert found.right == 3 / 8
    assert found.rewards == pytest.approx([0, 0.5, 1, 0.3])
    rounds = HeldOut.of(samples, 2, rounds=2)
    assert rounds.alive.tolist() == [0.5, 1] and rounds.rewards == pytest.approx([0.25, 0.65])
    joined = HeldOut.of(samples[:4], 2).joined(HeldOut.of(samples[4:], 2), 3)
    assert joined.rewards == pytest.approx([0.75, 0.35]) and joined.alive == pytest.approx([0.75, 1])
    assert joined.right == pytest.approx(0.25 * 0.25 + 0.75 * 0.5) and joined.sampled == 8


@pytest.mark.parametrize(
    ("tokens", "known", "want"),
    [
        (0, 0, [(0, 3, 0, 1)]),  # a few, whatever they cost
        (50, 0, [(0, 3, 0, 1), (3, 5, 0, 1)]),  # of 10 tokens a prompt
        (400, 0, [(0, 3, 0, 1), (3, 12, 0, 1), (0, 12, 1, 2)]),
        (9999, 0, [(0, 3, 0, 1), (3, 12, 0, 1), (0, 12, 1, 7)]),
        (100, 5, [(0, 5, 0, 1), (0, 5, 1, 1)]),  # as many prompts as before
    ],
)
def test_a_look_draws_as_many_prompts_and_then_answers_as_its_share_pays_for(tokens, known, want):
    drawn, items = [], [Item(str(i), i) for i in range(12)]

    def draw(prompts, part, rounds):
        drawn.append((prompts[0].data, prompts[-1].data + 1, part, rounds))
        return [
            Sample([1], [2] * 5, [1] * 5, [0.0] * 5, 0, "stop", i.id, 0, reward=float(i.data), success=True)
            for i in prompts
            for _ in range(2 * rounds)
        ]

    found, first = look(draw, items, 3, known, lambda samples: tokens)
    assert drawn == want and len(first) == 2 * len(found.rewards)
    assert found.rewards == pytest.approx(np.arange(len(found.rewards)))
    assert found.sampled == sum(10 * (b - a) * rounds for a, b, _, rounds in want)


# ---------------------------------------------------------------------------------------------------------- whole runs

AMFT = ("--train.method", "amft", "--controller.look_prompts", "2", "--train.warmup_steps", "0")
SHOWS, NEVER = ("--controller.confidence", "0"), ("--controller.confidence", "1e9")


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


def weights(trainer):
    return [g.master.clone() for g in trainer.engine.groups]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_took_imitation_back_is_where_it_was(tmp_path, checkpoint_folder, optimizer):
    """Its first step that explores is the first step of RL alone at the same number: the same samples, loss and gradient."""
    flags = (
        *AMFT,
        *NEVER,
        "--train.steps",
        "20",
        "--controller.imitation_share",
        "0.1",
        "--train.optimizer",
        optimizer,
    )
    amft = trainer_of(cfg_for(tmp_path, checkpoint_folder, *flags), Alive())
    begin = weights(amft)
    done = steps(amft, 2)
    assert [s.mu for s in done] == [1, 1] and not all(map(torch.equal, weights(amft), begin))
    rl = trainer_of(cfg_for(tmp_path, checkpoint_folder, *flags[2:], "--train.method", "rl"), Alive())
    rl.step = 2
    for a, b in zip(steps(rl, 3), steps(amft, 3)):
        assert b.mu == 0 and [s.response_ids for s in b.drawn.samples] == [s.response_ids for s in a.drawn.samples]
        assert all(b.figures[k] == a.figures[k] for k in ("loss", "grad_norm", "entropy"))
        extra = b.tokens - a.tokens
        assert 0 < extra <= 2 * 8 * 4 if "controller/reward" in b.figures else extra == 0, "the tokens of the look"
    assert all(map(torch.equal, weights(rl), weights(amft))) and amft.kept is not None


def test_a_step_that_imitates_has_the_compute_of_one_that_explores(tmp_path, checkpoint_folder):
    flags = (*AMFT, "--train.steps", "40", "--train.prompts_per_step", "8", "--controller.imitation_share", "0.05")
    trainer = trainer_of(cfg_for(tmp_path, checkpoint_folder, *flags, *NEVER), Alive())
    done = steps(trainer, 6)
    imitating, exploring = ([s for s in done if s.mu == mu] for mu in (1, 0))
    cost = lambda steps: np.mean([s.figures["tokens_trained"] + s.figures["tokens_sampled"] for s in steps])  # noqa: E731
    assert len(imitating) == 2 and trainer.updates > 3 and trainer.engine.attempts == 4, (
        "and what was taken back is not counted"
    )
    assert cost(imitating) == pytest.approx(cost(exploring), rel=0.4)


def test_the_dead_are_imitated_to_life_and_the_solved_are_not_explored(tmp_path, checkpoint_folder):
    flags = (
        *AMFT,
        "--controller.min_alive",
        "0.9",
        "--controller.look_prompts",
        "4",
        "--train.steps",
        "40",
        "--eval.every",
        "0",
    )
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags), task=Known()) == 0
    records = lines(tmp_path)
    mus, alive = [r["mu"] for r in records], [r["controller/alive"] for r in records if "controller/alive" in r]
    assert set(mus) == {1.0} and alive[-1] == 1
    assert all("success" not in r and "sft_loss" in r for r in records), "and no rollouts were paid for"
    assert json.loads((tmp_path / "summary.json").read_text())["end"]["train"]["greedy"] == 1


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


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_checkpoint_holds_what_may_be_taken_back(tmp_path, checkpoint_folder, at):
    """Taken up before, in and after the block."""
    flags = (*AMFT, *NEVER, "--train.steps", "20", "--controller.imitation_share", "0.15")
    cfg = cfg_for(tmp_path, checkpoint_folder, *flags)
    whole = trainer_of(cfg, Alive())
    steps(whole, at)
    cut = taken_up(whole, Alive())
    assert (cut.kept is None) == (whole.kept is None) == (at == 0)
    for a, b in zip(steps(whole, 5 - at), steps(cut, 5 - at)):
        assert a.mu == b.mu and a.tokens == b.tokens and a.figures["loss"] == b.figures["loss"]
    assert all(map(torch.equal, weights(whole), weights(cut)))


def test_a_run_whose_last_block_made_things_worse_ends_with_what_was_before_it(tmp_path, checkpoint_folder):
    """Also when it was broken off between its last step and its end."""
    flags = (
        *AMFT,
        *NEVER,
        "--train.steps",
        "8",
        "--controller.imitation_share",
        "0.25",
        "--controller.look_share",
        "0.1",
    )
    trainer = trainer_of(cfg_for(tmp_path, checkpoint_folder, *flags), Alive())
    steps(trainer, 8)
    trainer.controller.rewards = [2.0] * len(trainer.controller.rewards)  # no answer earns as much
    cut, before = taken_up(trainer, Alive()), weights(trainer)
    for one in (trainer, cut):
        tokens = one.tokens
        assert one.end()["kept_reward"] == 2
        assert one.tokens > tokens and one.end() is None
    assert all(map(torch.equal, weights(trainer), weights(cut))) and not all(map(torch.equal, weights(trainer), before))
    save(dict(trainer.tensors()))  # which takes no tensors that share memory


def test_tensors_under_a_prefix():
    found = Tensors.of({"kept.a": torch.ones(2, 3), "a": torch.zeros(2, 3), "kept.b": torch.arange(3)}).under("kept.")
    assert (
        set(found) == {"a", "b"}
        and torch.equal(found["a"], torch.ones(2, 3))
        and found.part("b", 1, 2).tolist() == [1, 2]
    )

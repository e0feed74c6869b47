"""Blocks of imitation: what is decided at each look, and that what is taken back leaves no trace."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import CopyTask, make_checkpoint
from runs import cfg_for, lines, steps, taken_up, train, trainer_of
from safetensors.torch import save

from amft_fast import config_file, controller
from amft_fast.controller.blocks import MARGIN
from amft_fast.controller.statistics import signed_rank, student
from amft_fast.engine.parts import Tensors
from amft_fast.held_out import HeldOut, luck_of
from amft_fast.interfaces import Sample

pytestmark = pytest.mark.cpu_isa


def make(*flags):
    return controller.make(config_file.load(None, ["--train.method", "amft", "--train.steps", "100", *flags]))


def held_out(reward, alive=1.0, spread=0.3, prompts=20, right=0.5, nll=(), luck=math.nan):
    """Prompts with this mean reward, of which this share is alive; and demonstrations."""
    rewards = reward + spread * np.cos(np.arange(prompts) * 2.0)
    return HeldOut(rewards, np.arange(prompts) < alive * prompts, right, 0, np.array(nll), luck)


def shaken(reward):
    """Prompts whose rewards moved by 0.14 beside their mean."""
    flat = held_out(reward)
    return flat._replace(rewards=flat.rewards + 0.2 * np.cos(np.arange(20) * 3.0))


def looks(c, results, until=100.0, middles=()):
    """Feeds these results at the looks that are asked for, and these likelihoods in between; returns the looks' clocks, the
    verdicts, and μ after them."""
    middles = list(middles)
    clock, seen = 0.0, []
    results = iter(results)
    while clock < until:
        if middles and c.wants_validation(int(clock), clock):
            c.validated([np.full(3, -x) for x in middles.pop(0)])
        if c.wants_look(int(clock), clock):
            result = next(results, None)
            if result is None:
                break
            verdict, _ = c.looked(result, clock)
            seen.append((clock, verdict, c.mu(clock)))
        clock += 1
    return seen


# ------------------------------------------------------------------------------------------------------ the decisions


def test_a_block_that_shows_is_doubled_and_the_first_that_does_not_is_taken_back():
    results = [held_out(x) for x in (0.1, 0.3, 0.6, 0.3)]
    seen = looks(make("--controller.imitation_share", "0.05"), results)
    assert seen == [(0, "keep", 1), (5, "keep", 1), (10, "keep", 1), (20, "back", 0)]


def test_imitation_that_does_not_show_costs_one_block():
    assert looks(make(), [held_out(0.3), held_out(0.3)]) == [(0, "keep", 1), (6, "back", 0)]


def test_imitation_that_has_shown_before_goes_on_until_it_is_seen_to_harm():
    """A rise of t = 0.5, and a fall of 1.9, which the first block would not have stayed for."""
    a, b = held_out(0.1), held_out(0.5)
    for before, want in ((False, "back"), (True, "keep")):
        c = make()
        c.looked(a if before else b, 0.0)
        if before:
            assert c.looked(b, 6.0)[0] == "keep"
        verdict, figures = c.looked(risen(0.5, [], b), 12.0)
        assert figures["controller/rise_t"] == pytest.approx(0.5) and verdict == want
        if before:
            now = risen(-1.9, [], risen(0.5, [], b))
            assert c.looked(now, 24.0)[0] == "keep" and c.looked(risen(-2.1, [], now), 48.0)[0] == "back"


@pytest.mark.parametrize(("rise", "want"), [(0.02, "back"), (0.2, "keep"), (-0.5, "back")])
def test_the_rise_must_stand_out_of_its_noise(rise, want):
    c, rng = make(), np.random.default_rng(0)
    before = held_out(0.3)
    c.looked(before, 0.0)
    after = before._replace(rewards=before.rewards + rise + 0.2 * rng.normal(size=20))
    verdict, figures = c.looked(after, 6.0)
    assert verdict == want and figures["controller/rise_t"] == pytest.approx(student(after.rewards - before.rewards))


def risen(t, nll, before):
    """A look at which rewards have risen by so many standard errors."""
    noise = np.cos(np.arange(len(before.rewards)) * 5.0)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * np.sqrt(len(noise))
    return before._replace(rewards=before.rewards + 0.01 * (t + noise), nll=np.array(nll))


DEMOS = np.linspace(0.5, 1.5, 40)


def falls_by(z, margin=0):
    """The losses of demonstrations that have this signed-rank statistic against DEMOS, about."""
    sizes, number = np.linspace(0.1, 0.4, 40), np.arange(40)
    moved = [np.where(number < n, sizes, -sizes) for n in range(41)]
    return (1 - margin) * DEMOS - min(moved, key=lambda x: abs(signed_rank(x) - z))


@pytest.mark.parametrize(
    ("t", "z", "want"),
    [
        (1.9, 2, "keep"),
        (0, 2, "back"),
        (0, 4, "keep"),
        (-1, 6, "keep"),
        (-1.5, 6, "back"),
        (2, 0, "back"),
        (3, 0, "keep"),
    ],
)
def test_the_first_block_is_judged_by_rewards_and_the_likelihood_of_demonstrations_together(t, z, want):
    """(t + z)/√2 > 2, z counted to 4, of a fall beyond the margin."""
    before = held_out(0.3, nll=DEMOS + 1)
    seen = looks(make(), [before, risen(t, falls_by(z, MARGIN), before)], middles=[DEMOS])
    assert [s[:2] for s in seen] == [(0, "keep"), (6, want)]


@pytest.mark.parametrize(
    ("luck", "t", "z", "want"),
    [(0.4, -1.5, 2.5, "keep"), (0.4, -2.1, 6, "back"), (0.4, -1, 1.5, "back"), (0.6, -1.5, 2.5, "back")],
)
def test_where_luck_leaves_imitation_the_whole_run_it_stays_for_what_it_learns(luck, t, z, want):
    before = held_out(0.3, nll=DEMOS + 1, luck=luck)
    seen = looks(make(), [before, risen(t, falls_by(z, MARGIN), before)], middles=[DEMOS])
    assert seen[-1][:2] == (6, want)


def test_getting_used_to_the_form_of_demonstrations_does_not_count():
    before = held_out(0.3, nll=DEMOS + 1)
    assert looks(make(), [before, risen(0, DEMOS, before)], middles=[DEMOS])[-1] == (6, "back", 0)
    c = make()
    seen = looks(c, [before, risen(0, DEMOS - 1, before), risen(-9, DEMOS, before)], middles=[DEMOS])
    assert [s[1] for s in seen] == ["keep", "keep", "back"] and c.settling is False


def test_a_likelihood_that_rises_by_next_to_nothing_has_not_risen():
    first = held_out(0.3, nll=DEMOS + 1)
    for before in (False, True):
        results, end = ([first, risen(3, DEMOS, first)], 12) if before else ([held_out(0.3, nll=DEMOS + 1)], 6)
        for loss, want in ((0.98, "back"), (0.96, "keep")):
            now = risen(0.5, loss * DEMOS, results[-1])
            assert looks(make(), [*results, now], middles=[DEMOS + 1 if before else DEMOS])[-1][:2] == (end, want)


def test_later_blocks_are_compared_with_the_kept_weights_beyond_a_margin_and_go_on_until_they_harm():
    first = held_out(0.3, nll=DEMOS + 1)
    second = risen(3, DEMOS, first)
    for t, z, want in ((0, 0.5, "keep"), (0, -2.5, "keep"), (0, -3.2, "back"), (-1, -1.5, "keep"), (-1, -2.2, "back")):
        found = looks(make(), [first, second, risen(t, falls_by(z, MARGIN), second)], middles=[DEMOS + 1])
        assert found[-1][:2] == (12, want)


def test_fallen_rewards_outweigh_any_likelihood():
    first = held_out(0.3, nll=DEMOS + 1)
    second = risen(3, DEMOS, first)
    assert looks(make(), [first, second, risen(-2.1, DEMOS - 0.4, second)], middles=[DEMOS + 1])[-1] == (12, "back", 0)


def test_a_block_of_imitation_is_a_quarter_of_the_run_at_most_and_the_last_one_goes_to_its_end():
    results = [held_out(x) for x in (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)]
    assert [clock for clock, _, _ in looks(make(), results)] == [0, 6, 12, 24, 48, 73]
    assert [clock for clock, _, _ in looks(make("--controller.imitation_share", "0.05"), results)] == [
        0,
        5,
        10,
        20,
        40,
        65,
    ]
    c = make("--controller.imitation_share", "0.45")
    assert [clock for clock, _, _ in looks(c, results)] == [0, 45] and c.ends == 100


@pytest.mark.parametrize(("steps", "want"), [(98, [0, 6, 12, 24, 48]), (100, [0, 6, 12, 24, 48, 96])])
def test_no_look_is_taken_that_leaves_the_run_next_to_nothing(steps, want):
    """After that at 96 of blocks of exploring that begin with 6, the run would have 2 or 4 steps."""
    flags = ("--train.steps", str(steps), "--controller.imitation_share", str(6 / steps))
    results = [held_out(0.5), held_out(0.5), held_out(0.6), held_out(0.7), held_out(0.8), held_out(0.9)]
    seen = looks(make(*flags), results, until=float(steps))
    assert [clock for clock, _, _ in seen] == want


def test_likelihood_is_asked_for_once_in_the_middle_of_imitation_that_begins():
    c = make()
    c.looked(held_out(0.3, nll=DEMOS), 0.0)
    assert [c.wants_validation(t, t) for t in (0, 2, 3, 5)] == [False, False, True, True]
    again = make()
    again.load_state_dict(json.loads(json.dumps(c.state_dict())))
    assert again.wants_validation(3, 3) and "controller/demo_nll" in again.validated([-DEMOS[:2]])
    assert not again.wants_validation(4, 4)
    c.looked(held_out(0.3, nll=DEMOS), 6.0)
    assert c.mu(6) == 0 and not c.wants_validation(9, 9)
    c.looked(held_out(-0.5, nll=DEMOS), 12.0)
    assert c.mu(12) == 1 and [c.wants_validation(t, t) for t in (12, 18)] == [False, True], (
        "exploring fell: it begins again"
    )


def test_after_a_warm_up_the_first_block_is_compared_with_its_beginning():
    c = make("--train.warmup_steps", "10")
    c.looked(held_out(0.3, nll=DEMOS), 0.0)
    assert not any(c.wants_validation(t, t) for t in range(6))
    assert c.looked(risen(0, falls_by(4, MARGIN), held_out(0.3)), 6.0)[0] == "keep"


def test_the_signed_rank_statistic():
    """Its variance is that of all signs, and no size of a value matters but its rank."""
    sizes = np.array([0.1, 0.5, 0.5, 2.0, 3.0, 700.0])
    ranks = np.array([1, 2.5, 2.5, 4, 5, 6])
    signs = np.array(list(itertools.product((-1, 1), repeat=6)))
    sums = (signs * ranks).sum(1)
    assert [signed_rank(s * sizes) for s in signs] == pytest.approx(list(sums / np.sqrt(6 * 7 * 13 / 6)))
    assert sums.std() == pytest.approx(np.sqrt(6 * 7 * 13 / 6), rel=0.01) and signed_rank(np.zeros(0)) == 0
    assert (
        signed_rank(sizes) == signed_rank(np.sign(sizes) * np.array([1, 2, 2, 3, 4, 5]))
        and signed_rank(np.zeros(9)) == 0
    )


def test_the_dead_are_imitated_until_they_live():
    """Whatever the rise; what woke them stays, though few prompts have any success yet."""
    dead, woken = held_out(0.0, alive=0.0, spread=0.0), held_out(0.001, alive=0.1, spread=0.0)
    seen = looks(make(), [dead, dead, dead, woken, woken])
    assert [(clock, verdict) for clock, verdict, _ in seen] == [
        (0, "keep"),
        (6, "keep"),
        (12, "keep"),
        (24, "keep"),
        (48, "keep"),
    ]


def test_what_imitation_has_all_but_solved_is_not_explored():
    solved, flags = held_out(0.97, right=0.97), ("--controller.solved", "0.95")
    seen = looks(make(*flags), [held_out(0.3), solved, solved, solved, held_out(0.94, right=0.94)])
    assert [verdict for _, verdict, _ in seen] == ["keep", "keep", "keep", "keep", "back"]
    assert [clock for clock, _, _ in seen] == [0, 6, 12, 24, 48]
    assert looks(make(*flags), [solved, solved])[-1] == (6, "back", 0), "a base that is as good by itself"


RISING = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)


@pytest.mark.parametrize(
    ("lucks", "last"),
    [
        ((0.95, 0.95, 0.95), 12),  # 10 % of the run are enough, and a block ends at 6 and at 12
        ((0.98, 0.98), 6),
        ((0.95, 0.85, 0.75), 48),  # on average 0.95, 0.9, 0.85, 0.82: 10, 20, 30 and 35 %
        ((0.5, 0.5, 0.5, 0.5), None),
        ((math.nan,) * 4, None),  # no two answers to a prompt, or no reward at all
    ],
)
def test_imitation_has_twice_the_share_of_the_variance_that_lies_between_prompts(lucks, last):
    """What it has learned stays, and is explored from."""
    results = [held_out(x, luck=luck) for x, luck in zip(RISING, (0.99, *lucks, lucks[-1]))]
    seen = looks(make(), results)
    assert next((clock for clock, _, mu in seen if mu == 0), None) == last
    assert {verdict for _, verdict, _ in seen} == {"keep"}


def test_luck_says_nothing_where_it_cannot():
    """At the look that finds the first success, where all but solved, in a run by lot."""
    lucky, dead = [held_out(x, luck=0.99) for x in RISING], held_out(0.0, alive=0.0, spread=0.0)
    assert [mu for _, _, mu in looks(make(), [dead, *lucky[:2]])] == [1, 1, 0]
    solved = [held_out(x, right=0.97, luck=0.99) for x in RISING[:4]]
    assert [mu for _, _, mu in looks(make(), [lucky[0], held_out(0.2, luck=0.2), *solved])] == [1] * 6
    by_lot = make("--controller.signal", "lot")
    by_lot._lot = lambda: True
    assert [mu for _, _, mu in looks(by_lot, lucky[:4])] == [1] * 4


def test_luck_ends_imitation_after_a_fall_of_exploring_too():
    """At a luck of 0.95 a tenth of the run is enough. What fell had 6 and imitation has 12 before exploring begins again."""
    results = [held_out(x, luck=0.95) for x in (0.1, 0.3, 0.5, 0.2, 0.7, 0.9)]
    seen = looks(make(), results)
    assert seen == [(0, "keep", 1), (6, "keep", 1), (12, "keep", 0), (18, "back", 1), (30, "keep", 0), (36, "keep", 0)]


@pytest.mark.parametrize(
    ("luck", "then", "want"),
    [
        (0.4, 0.27, ("back", 1)),  # a little lower: no fall by itself, and no rise
        (0.4, 0.33, ("go on", 0)),
        (0.6, 0.27, ("go on", 0)),
        (math.nan, 0.27, ("go on", 0)),
    ],
)
def test_exploring_must_rise_where_luck_leaves_imitation_the_whole_run(luck, then, want):
    """Of the first look: what came of imitation says nothing of the weights that exploring begins from."""
    first, after = held_out(0.3, luck=luck), held_out(0.3, luck=1 - luck)
    assert looks(make(), [first, after, shaken(then)], until=13)[-1] == (12, *want)


def test_exploring_that_has_risen_once_is_doubted_no_more():
    results = [held_out(0.3, luck=0.4), held_out(0.3), shaken(0.9), held_out(0.87)]
    assert [v for _, v, _ in looks(make(), results, until=25)] == ["keep", "back", "keep", "go on"]


def test_luck_is_the_share_of_the_variance_between_the_answers_to_a_prompt():
    """Its two mean squares, written out; and their meaning, over many draws."""
    rewards = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    means, squares = rewards.mean(axis=1), lambda x, m: ((x - m) ** 2).sum()
    within = squares(rewards, means[:, None]) / (3 * (3 - 1))
    between = (3 * squares(means, rewards.mean()) / (3 - 1) - within) / 3
    assert luck_of(rewards) == pytest.approx(within / (within + between)) and 0 < luck_of(rewards) < 1
    assert luck_of(np.repeat([[0.0], [1.0]], 4, axis=1)) == 0 and luck_of(np.array([[0.0, 1.0]] * 5)) == 1
    for nothing in (np.zeros((4, 4)), np.ones((4, 1)), np.ones((1, 4))):
        assert math.isnan(luck_of(nothing))
    rng = np.random.default_rng(0)
    for known in (0.0, 0.2, 0.4, 0.5):  # half of the prompts easier by so much, half harder
        chances = np.where(np.arange(4000) % 2, 0.5 + known, 0.5 - known)
        right = rng.random((4000, 8)) < chances[:, None]
        assert luck_of(right * 1.0) == pytest.approx(1 - (2 * known) ** 2, abs=0.02)


def test_exploring_goes_on_while_it_does_not_fall():
    """In blocks that double; what has risen is kept."""
    results = [held_out(0.3), held_out(0.3), shaken(0.31), held_out(0.5), shaken(0.48)]
    seen = looks(make(), results, until=97)
    assert seen == [(0, "keep", 1), (6, "back", 0), (12, "go on", 0), (24, "keep", 0), (48, "go on", 0)]


def test_exploring_that_falls_is_taken_back_and_imitation_has_another_try_of_twice_the_length():
    """And then stays where it does not fall, for exploring is no better."""
    flat = held_out(0.3)._replace(rewards=held_out(0.3).rewards + 0.1 * np.cos(np.arange(20) * 3.0))
    seen = looks(make(), [held_out(0.3), held_out(0.3), held_out(0.1), flat, held_out(0.5)], until=49)
    assert seen == [(0, "keep", 1), (6, "back", 0), (12, "back", 1), (24, "keep", 1), (36, "keep", 1)]
    both = looks(make(), [held_out(0.3), held_out(0.3), held_out(0.1), held_out(0.2), held_out(0.4)], until=31)
    assert both == [(0, "keep", 1), (6, "back", 0), (12, "back", 1), (24, "back", 0), (30, "keep", 0)]


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
    assert found.alive.tolist() == [False, True, True, True] and found.sampled == 8
    assert found.right == 3 / 8
    assert found.rewards == pytest.approx([0, 0.5, 1, 0.3])


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
        look = 2 * 8 * 4 + sum(len(s.ids) for s in amft.looks.demos)
        assert 0 < extra <= look if "controller/reward" in b.figures else extra == 0, "the tokens of the look"
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


class NoneHeldOut(Alive):
    """No demonstrations beside those of training."""

    def demos(self, split):
        return super().demos(split) if split == "train" else []


def test_a_look_reads_the_likelihood_of_held_out_demonstrations_where_there_are_some(tmp_path, checkpoint_folder):
    """The mean loss of each, by an independent forward pass; its tokens are counted."""
    cfg = cfg_for(tmp_path, checkpoint_folder, *AMFT, "--controller.look_demos", "8", "--train.steps", "40")
    seen = []
    for task in (Alive(), NoneHeldOut()):
        trainer = trainer_of(cfg, task)
        trainer.controller.value = 1.0  # as after imitation
        looked = trainer.controller.looked
        trainer.controller.looked = lambda found, clock, looked=looked: (seen.append(found), looked(found, clock))[1]
        trainer.look(0)
        tokens = sum(len(s.ids) for s in trainer.looks.demos)
        assert trainer.looked.tokens == seen[-1].sampled + tokens and (tokens > 0) == (len(seen) == 1)
        assert ("controller/demo_nll" in trainer.looked.figures) == (tokens > 0)
        if tokens:
            want = []
            for s in trainer.looks.demos:
                ids = torch.as_tensor(s.ids)[None]
                logp = trainer.policy.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                want.append(-float(logp[torch.as_tensor(s.trained)[1:]].mean()))
            assert seen[0].nll == pytest.approx(want, rel=1e-4) and len(want) <= 8
    assert len(seen) == 2 and len(seen[1].nll) == 0


def test_a_look_reads_demonstrations_only_where_a_verdict_asks_them():
    """Not after exploring, nor where the middle of the block to come will be the measure."""
    c, after = make("--train.warmup_steps", "0"), make("--train.warmup_steps", "5")
    assert not c.reads_demos and after.reads_demos
    for control in (c, after):
        control.looked(held_out(0.5), 0.0)
        assert control.value == 1 and control.reads_demos
        control.looked(held_out(0.5), 6.0)
        assert control.value == 0 and not control.reads_demos


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
    trainer.kept = kept
    save(dict(trainer.tensors()))  # which takes no tensors that share memory


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


def test_tensors_under_a_prefix():
    found = Tensors.of({"kept.a": torch.ones(2, 3), "a": torch.zeros(2, 3), "kept.b": torch.arange(3)}).under("kept.")
    assert (
        set(found) == {"a", "b"}
        and torch.equal(found["a"], torch.ones(2, 3))
        and found.part("b", 1, 2).tolist() == [1, 2]
    )


def test_a_look_that_costs_much_takes_nothing_of_the_block(tmp_path, checkpoint_folder):
    """Where tokens are the clock, a look moves it: the block after it has its own share of them nonetheless. In a short run of
    a real model a look cost 3.4 % of all, of 6 that a block has, and one step, mostly noise, decided about the rest."""
    budget, share = 8000, 0.1
    flags = [*AMFT, *NEVER, "--train.steps", "50", "--train.token_budget", str(budget), "--meta.num_generations", "32"]
    flags += [
        "--train.warmup_steps",
        "0",
        "--controller.imitation_share",
        str(share),
        "--controller.look_prompts",
        "32",
    ]
    trainer = trainer_of(cfg_for(tmp_path, checkpoint_folder, *flags), Alive())
    block = steps(trainer, 1)
    look = block[0].tokens - block[0].figures["tokens_trained"]
    while "controller/reward" not in (step := steps(trainer, 1)[0]).figures:
        block.append(step)
    trained = sum(s.figures["tokens_trained"] for s in block)
    assert all(s.mu == 1 for s in block) and look > block[-1].tokens, "it costs more than a step"
    assert share * budget <= trained < share * budget + block[-1].tokens + 1

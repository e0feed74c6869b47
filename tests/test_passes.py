"""Passes over the prompts that leave out some of what has taught nothing: data/stream.py, and its use by the rollouts."""

import json
from concurrent.futures import Future
from dataclasses import replace
from statistics import fmean

import pytest
from drawing import Drawing
from fakes import CopyEpisode, CopyTask
from runs import cfg_for, steps, taken_up, trainer_of

from amft_fast import config_file
from amft_fast.data.stream import MOST_IN_A_ROW, Passes, Stream
from amft_fast.errors import UserError
from amft_fast.interfaces import Item


def test_where_nothing_is_flat_passes_are_those_of_a_stream():
    want = Stream(7, 3, "x").take(30)
    assert Passes(7, 3, "x", 0.5).take(30) == want
    told = Passes(7, 3, "x", 1.0)
    told.told(dict.fromkeys(range(7), True), 0)
    assert told.take(30) == want, "with 1 all are asked again, flat or not"


def test_what_was_flat_k_times_in_a_row_is_in_a_pass_with_probability_again_to_the_k():
    n = 4000
    passes = Passes(n, 0, "x", 0.5)
    assert sorted(passes.take(n)) == list(range(n)) and passes.left_out == 0
    share = {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.125, 4: 0.125}
    for i in range(n):
        for _ in range(i % 5):
            passes.told({i: True}, n)
    taken = passes.take(1)
    taken += passes.take(passes.passes[-1].end - passes.position)
    assert len(set(taken)) == len(taken), "once in a pass"
    for k, probability in share.items():
        assert sum(i % 5 == k for i in taken) / (n / 5) == pytest.approx(probability, abs=0.07)
    assert passes.left_out == pytest.approx(1 - len(taken) / n)
    passes.told({4: False}, n)
    assert passes.flat[4] == 0 and passes.flat[9] == MOST_IN_A_ROW, "one that is not flat counts from the start again"


def test_each_stands_for_as_many_as_it_was_drawn_from():
    passes = Passes(3000, 0, "x", 0.5)
    passes.take(3000)
    passes.told({i: True for i in range(3000) if i % 3}, 3000)
    taken = passes.take(passes.n - 1)[: passes.passes[1].end - 3000]
    assert passes.chances(2990, 10).tolist() == [1] * 10, "of the first pass"
    chances = passes.chances(3000, len(taken))
    assert chances.tolist() == [0.5 if i % 3 else 1.0 for i in taken]
    assert (1 / chances).sum() == pytest.approx(3000, rel=0.05)


def test_a_pass_of_nothing_is_a_whole_one():
    passes = Passes(2, 0, "x", 1e-9)
    passes.told({0: True, 1: True}, 0)
    assert [sorted(passes.take(2)) for _ in range(3)] == [[0, 1]] * 3


def test_a_position_that_is_put_back_finds_what_stood_there():
    passes = Passes(20, 0, "x", 0.5)
    passes.take(15)
    whole = passes.take(40)
    passes.told(dict.fromkeys(range(0, 20, 2), True), 15)
    passes.position = 15
    assert passes.take(40) == whole, "passes that have begun stay what they are"
    later = passes.take(20)
    passes.told({}, passes.position)
    assert len(passes.passes) == 1, "those that will not come again are forgotten"
    passes.position -= 1
    assert passes.take(1) == later[-1:]


def test_passes_go_on_from_their_history():
    passes = Passes(20, 0, "x", 0.5)
    for _ in range(9):
        taken = passes.take(7)
        passes.told({i: i % 3 > 0 for i in taken}, passes.position - 14)
    state = json.loads(json.dumps(passes.history()))
    other = Passes(20, 0, "x", 0.5)
    other.load_history(state)
    other.position = passes.position - 14
    assert other.take(14 + 60)[14:] == passes.take(60)
    grown = Passes(21, 0, "x", 0.5)
    grown.load_history(state)
    grown.position = 42
    assert sorted(grown.take(21)) == list(range(21)), "of another number of prompts, nothing is known"
    other = Passes(20, 0, "x", 0.25)
    other.load_history(state)
    assert not other.passes, "passes of another probability are of another length"


def test_a_checkpoint_without_a_history_goes_on_where_it_stood():
    plain, passes = Stream(20, 0, "x"), Passes(20, 0, "x", 0.5)
    plain.position = passes.position = 50
    passes.load_history(None)
    assert passes.chances(50, 3).tolist() == [1, 1, 1], "nothing is known of what was drawn ahead"
    assert passes.take(10) == plain.take(10)
    assert passes.chances(30, 12).tolist() == [1] * 12


class Words(CopyTask):
    """Thirty prompts: the answers to every third are right and earn what they are long, those to the others nothing."""

    def prompts(self, split):
        if split != "train":
            return super().prompts(split)
        return [Item(f"train/{i}", "abcdef"[i % 6]) for i in range(30)]

    def start(self, item):
        return Graded(self, item.data, item.id in TEACH)


TEACH = {f"train/{i}" for i in range(0, 30, 3)}


class Graded(CopyEpisode):
    def __init__(self, task, word, teaches):
        super().__init__(task, word)
        self.teaches = teaches

    def step(self, text):
        done = super().step(text)
        reward = len(text.split()) * float(self.teaches)
        return replace(done, reward=reward, info=done.info | {"success": self.teaches})


def run_of(folder, model, *flags):
    base = ("--train.method", "rl", "--train.lr", "1e-6", "--train.warmup_steps", "0", "--train.steps", "40")
    return trainer_of(cfg_for(folder, model, *base, "--rollout.ask_again", "0.5", *flags), Words())


def asked(done):
    return [list(dict.fromkeys(s.prompt_id for s in step.drawn.samples)) for step in done]


@pytest.mark.parametrize("more", [(), ("--rollout.dynamic_sampling", "true", "--rollout.max_redraws", "1")])
def test_prompts_that_teach_come_more_often(tmp_path, checkpoint_folder, more):
    trainer = run_of(tmp_path, checkpoint_folder, *more)
    done = steps(trainer, 40)
    first, last = ([name in TEACH for step in part for name in step] for part in (asked(done[:7]), asked(done[-14:])))
    assert sum(last) / len(last) > 1.5 * sum(first) / len(first)
    assert done[0].drawn.figures["passed_over"] == 0 and done[-1].drawn.figures["passed_over"] > 0.4
    whole = run_of(tmp_path, checkpoint_folder, *more, "--rollout.ask_again", "1")
    assert "passed_over" not in steps(whole, 1)[0].drawn.figures


def test_success_is_also_said_as_if_all_had_been_asked(tmp_path, checkpoint_folder):
    """A third of all prompts are answered right, and more than that of those that are asked."""
    done = steps(run_of(tmp_path, checkpoint_folder), 50)[8:]
    assert fmean(s.success for step in done for s in step.drawn.samples) > 0.45
    assert fmean(step.drawn.figures["success_all"] for step in done) == pytest.approx(1 / 3, abs=0.06)


def test_a_run_that_is_taken_up_asks_what_it_would_have_asked(tmp_path, checkpoint_folder):
    trainer = run_of(tmp_path, checkpoint_folder)
    steps(trainer, 17)  # in the third pass
    other = taken_up(trainer, Words())
    assert asked(steps(other, 12)) == asked(steps(trainer, 12))


def test_a_step_that_is_broken_off_tells_nothing(tmp_path, checkpoint_folder):
    whole, broken = run_of(tmp_path, checkpoint_folder), run_of(tmp_path, checkpoint_folder)
    steps(whole, 14), steps(broken, 14)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broken, "update", stop)
        with pytest.raises(InterruptedError):
            broken.train_step()
    assert asked(steps(broken, 8)) == asked(steps(whole, 8))


def stop(*_):
    raise InterruptedError("stopped")


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("at", [1, 4, 5, 8, 10])
def test_what_is_drawn_ahead_is_asked_for_in_the_same_order_after_a_resume(checkpoint_folder, at, lost):
    """All groups of `Drawing` are flat. What was still being drawn when the state was saved is asked again."""
    whole, before, after = (Drawing(checkpoint_folder, 3, "--rollout.ask_again", "0.5") for _ in range(3))
    want = [whole.step(t)[1] for t in range(20)]
    assert len(set(map(tuple, want))) > 5
    assert [before.step(t)[1] for t in range(at)] == want[:at]
    there = len(before.rollouts.ahead)
    if lost:
        last = before.rollouts.ahead.queue[-1]
        last.drawn = Future()
        last.drawn.set_exception(InterruptedError("stopped"))
    after.rollouts.load_state_dict(json.loads(json.dumps(before.rollouts.state_dict())), at)
    got = [after.step(t)[1] for t in range(at, 20)]
    same = there if lost else 20 - at  # what is asked again shifts the rounds, so later passes begin with less told
    assert got[:same] == want[at : at + same]


def test_amft_asks_so_by_itself_and_what_learns_from_flat_groups_may_not(tmp_path, checkpoint_folder):
    def of(*flags):
        return config_file.load(None, list(flags)).ask_again

    assert of("--train.method", "amft") == 0.5 and of("--train.method", "amft", "--rollout.ask_again", "1") == 1
    assert of("--train.method", "rl") == of("--train.method", "sft_then_rl") == 1
    assert of("--train.method", "amft", "--controller.signal", "balanced") == 1
    assert of("--train.method", "amft", "--advantage.kind", "reinforce++") == 1, "there flat groups teach too"
    with pytest.raises(UserError, match=r"rollout\.ask_again .* advantage\.kind 'reinforce\+\+' .* got 0\.5"):
        of("--advantage.kind", "reinforce++", "--rollout.ask_again", "0.5")
    with pytest.raises(UserError, match=r"rollout\.ask_again passes over .* 'hpt' learns by imitation: leave it at 1"):
        of("--train.method", "hpt", "--rollout.ask_again", "0.5")
    with pytest.raises(UserError, match=r"ask_again: .*greater than 0"):
        of("--rollout.ask_again", "0")

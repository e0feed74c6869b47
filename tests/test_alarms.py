"""Alarms: each sign on its own, once, with the remedy, wherever people look."""

import html
import json

import pytest
from fakes import CopyTask, copy_run
from runs import lines

from amft_fast.config import Config
from amft_fast.interfaces import Message, StepResult
from amft_fast.report.page import write_report
from amft_fast.run import launch
from amft_fast.run.alarms import STEPS, Alarms

FINE = {
    "phase": "train", "reward": 0.5, "reward_spread": 1.0, "success": 0.5, "groups_without_spread": 0.3, "truncated": 0.1,
    "no_answer": 0.1, "entropy": 1.0, "entropy_target": 1.1,
}  # fmt: skip


def looked(rows, **settings):
    """The alarms that each of these records raises."""
    alarms = Alarms(Config.model_validate(settings))
    return [alarms.look(FINE | row) for row in rows]


@pytest.mark.parametrize(
    "row,name,remedy",
    [
        ({"groups_without_spread": 1.0}, "no_spread", "rollout.num_generations"),
        ({"reward_spread": 0.0, "groups_without_spread": 1.0, "success": 0.0}, "equal_rewards", "train.warmup_steps"),
        ({"reward_spread": 0.0, "groups_without_spread": 1.0, "success": 1}, "equal_rewards", "harder problems"),
        ({"truncated": 0.6}, "truncated", "rollout.max_new_tokens"),
        ({"no_answer": 0.6}, "no_answer", "train.warmup_steps"),
        ({"entropy": 0.2}, "entropy_low", "train.lr"),
        ({"entropy": 1.7}, "entropy_high", "train.lr"),
        ({"entropy": 1.7, "entropy_target": None}, "entropy_high", "the first step"),
    ],
)
def test_each_sign_is_said_once_after_it_has_stood_for_some_steps(row, name, remedy):
    first = {"entropy_target": None} if row.get("entropy_target", 1) is None else {}
    got = looked([first, *[row] * (STEPS + 3)])
    assert [bool(g) for g in got] == [False] * STEPS + [True] + [False] * 3
    assert list(got[STEPS]) == [name] and remedy in got[STEPS][name]
    # Steps apart are no sign, and neither are those of the warm-up.
    assert not any(looked([row, {}] * STEPS))
    assert not any(looked([row | {"phase": "warmup"}] * (2 * STEPS)))


def test_what_is_no_alarm():
    assert not any(looked([FINE] * 20))
    assert not any(looked([{"entropy": 0.4}, {"entropy": 1.5}] * 10)), "a run that learns may halve its entropy"
    flat = [{"groups_without_spread": 1.0}] * 20
    assert not any(looked(flat, advantage={"kind": "gae"})), "a value head learns without spread in a group"
    alarms = Alarms(Config())
    assert not any(alarms.look({"phase": "train", "sft_loss": 1.0}) for _ in range(20)), "no rollouts, no signs"


def test_the_entropy_bonus_is_named_where_it_is_what_drives():
    got = looked([{"entropy": 2.3, "entropy_target": 1.5}] * STEPS, objective={"entropy_coef": 0.01})
    assert "lower objective.entropy_coef (now 0.01)" in got[-1]["entropy_high"]
    assert Config().objective.entropy_coef == 0, "off unless asked for"


def test_a_checkpoint_takes_the_counts_along():
    """What was said is not said again after a resume, and a sign that stood goes on being counted."""
    first = Alarms(Config())
    for _ in range(STEPS - 1):
        first.look(FINE | {"truncated": 0.9})
    second = Alarms(Config())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(second.look(FINE | {"truncated": 0.9})) == ["truncated"]
    third = Alarms(Config())
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert not any(third.look(FINE | {"truncated": 0.9}) for _ in range(2 * STEPS))


class Deaf(CopyTask):
    """No answer is ever right, nor read."""

    def start(self, item):
        episode = super().start(item)
        episode.step = lambda text: StepResult(None, 0.0, True, {"success": False, "answer": None})
        episode.messages = [Message("user", item.data)]
        return episode


def test_a_run_says_them_in_the_terminal_the_metrics_and_the_report(tmp_path, checkpoint_folder, capsys):
    flags = ["--train.method", "rl", "--train.steps", str(STEPS + 3), "--train.lr", "1e-6"]
    assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, Deaf()) == 0
    raised = {r["step"]: r["alarms"] for r in lines(tmp_path) if "alarms" in r}
    assert list(raised) == [STEPS - 1] and {"equal_rewards", "no_answer"} <= set(raised[STEPS - 1])
    said, page = capsys.readouterr().out, write_report(tmp_path).read_text()
    for text in raised[STEPS - 1].values():
        assert said.count(f"alarm at step {STEPS - 1}: {text}") == 1
        assert html.unescape(page).count(f"Alarm at step {STEPS - 1}: {text}.") == 1

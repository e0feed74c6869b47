"""Penalties of length, truncated answers, and rewards that the task reports by name."""

import numpy as np
import pytest

from amft_fast import config_file, objective, reward_terms
from amft_fast.config import AdvantageConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample, Turn


def sample(length, reward=0.0, group=0, success=False, finish="stop", **info):
    s = Sample([2, 5], [6] * length, [1] * length, [-1.0] * length, 0, finish, f"p{group}", group, info=info)
    s.reward, s.success, s.turns = reward, success, [Turn(length, reward)]
    return s


def test_overlong_answers_lose_in_proportion_to_what_is_over():
    cfg = AdvantageConfig(overlong_buffer=4, overlong_penalty=2.0)
    samples = [sample(n) for n in (1, 6, 7, 9, 10)]
    np.testing.assert_allclose(reward_terms.penalties(samples, cfg, 10), [0, 0, -0.5, -1.5, -2.0])


def test_of_several_turns_the_longest_counts():
    s = sample(9)
    s.turns, s.loss_mask = [Turn(3, 0.0), Turn(9, 0.0)], [1, 1, 1, 0, 0, 0, 0, 1, 1]
    cfg = AdvantageConfig(overlong_buffer=2)
    assert reward_terms.penalties([s], cfg, 4) == pytest.approx([-0.5]), "3 tokens of 4, not 9"


def test_length_costs_more_where_the_prompt_is_easy():
    cfg = AdvantageConfig(length_penalty=0.1)
    samples = [sample(5, success=True), sample(10, success=True), sample(10, group=1), sample(2, group=1)]
    # Group 0 is solved wholly; of group 1 nothing is, which counts as one of its two.
    np.testing.assert_allclose(reward_terms.penalties(samples, cfg, 10), [-0.05, -0.1, -0.05, -0.01])


@pytest.mark.parametrize("level", ["trajectory", "turn"])
def test_penalties_reach_the_advantages(level):
    samples = [sample(4, 1.0), sample(8, 1.0)]
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    cfg = AdvantageConfig(kind="dr_grpo", level=level, overlong_buffer=4)
    objective.set_advantages(rl, samples, cfg, 8)
    assert [s.fields["advantages"][-1] for s in rl] == pytest.approx([0.5, -0.5])
    assert [s.turns[0].reward for s in samples] == [1.0, 1.0], "what the task gave stays as it was"


def test_gae_takes_penalties_off_the_last_token():
    s = sample(4, 1.0)
    rl = [objective.rollout_sequence(s, 1.0)]
    rl[0].fields["values"] = np.zeros(6)
    objective.set_advantages(rl, [s], AdvantageConfig(kind="gae", lam=0.0, overlong_buffer=2), 4)
    assert rl[0].fields["returns"][rl[0].trained].tolist() == [0, 0, 0, 0.0]


def test_rewards_by_name():
    samples = [
        sample(1, exact=1.0, short=0.2),
        sample(1, exact=0.0, short=0.4),
        sample(1, exact=1.0),
        sample(1, exact=0.0),
    ]
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    objective.set_advantages(rl, samples, AdvantageConfig(kind="dr_grpo", rewards={"exact": 1.0, "short": 2.0}), 8)
    total = np.array([1.0, 0, 1, 0]) - 0.5 + 2 * (np.array([0.2, 0.4, 0, 0]) - 0.15)
    np.testing.assert_allclose([s.fields["advantages"][2] for s in rl], total / total.std(), rtol=1e-4, atol=1e-9)
    samples[0].info["short"] = "no"
    with pytest.raises(UserError, match="reports 'short' as str, not as a number"):
        objective.set_advantages(rl, samples, AdvantageConfig(rewards={"exact": 1.0, "short": 2.0}), 8)


def test_rewards_are_set_as_a_table():
    cfg = config_file.load(None, ["--advantage.rewards", '{"exact": 1, "short": 0.5}'])
    assert cfg.advantage.rewards == {"exact": 1.0, "short": 0.5}

"""Advantages against cases worked by hand."""

import numpy as np
import pytest

from amft_fast.advantages import gae, group_advantages, normalise, several
from amft_fast.config import GROUP_KINDS

R = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0])
G = np.array([7, 7, 7, 7, 9, 9])


def test_grpo_divides_by_the_groups_own_spread():
    # Group 7: mean 1/2, std 1/2. Group 9 has no spread and gets zeros.
    np.testing.assert_allclose(group_advantages(R, G, "grpo"), [1, -1, -1, 1, 0, 0], atol=1e-5)


def test_dr_grpo_only_centres():
    np.testing.assert_allclose(group_advantages(R, G, "dr_grpo"), [0.5, -0.5, -0.5, 0.5, 0, 0])


def test_rloo_compares_with_the_others():
    # For the first sample the others' mean is 1/3.
    np.testing.assert_allclose(group_advantages(R, G, "rloo"), [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0])


def test_reinforce_pp_normalises_over_the_batch():
    a = group_advantages(R, G, "reinforce++")
    np.testing.assert_allclose(a, (R - 2) / R.std(), atol=1e-5)


def test_opo_weighs_the_baseline_by_length():
    lengths = np.array([1, 2, 3, 4, 1, 9])
    # Group 7: (1·1 + 4·1) / 10.
    np.testing.assert_allclose(group_advantages(R, G, "opo", lengths), [0.5, -0.5, -0.5, 0.5, 0, 0])
    np.testing.assert_allclose(group_advantages([1.0, 0.0], [0, 0], "opo", np.array([3, 1])), [0.25, -0.75])


def test_gpg_makes_up_for_groups_without_spread():
    # One of two groups has a spread.
    np.testing.assert_allclose(group_advantages(R, G, "gpg"), [1, -1, -1, 1, 0, 0])
    assert not group_advantages([2.0, 2.0], [0, 0], "gpg").any()


def test_reinforce_pp_baseline_centres_by_group_and_scales_by_batch():
    centred = np.array([0.5, -0.5, -0.5, 0.5, 0, 0])
    np.testing.assert_allclose(group_advantages(R, G, "reinforce++_baseline"), centred / centred.std(), atol=1e-5)


def test_maxrl_divides_by_the_mean():
    np.testing.assert_allclose(group_advantages([1.0, 0, 0, 0], [0] * 4, "maxrl"), [3, -1, -1, -1])
    assert not group_advantages([0.0, 0.0, 5.0, 5.0], [0, 0, 1, 1], "maxrl").any()


def test_several_rewards_are_normalised_one_by_one():
    """A reward ten times as large as the other does not drown it."""
    large, small = np.array([10.0, 0, 10, 0]), np.array([0.0, 0, 1, 1])
    a = several({"x": large, "y": small}, {"x": 1.0, "y": 2.0}, np.zeros(4), "grpo", np.ones(4))
    total = np.array([1 - 2, -1 - 2, 1 + 2, -1 + 2.0])
    np.testing.assert_allclose(a, total / total.std(), atol=1e-5)


def test_group_order_does_not_matter():
    order = np.array([4, 2, 0, 5, 3, 1])
    lengths = np.arange(1, 7)
    for kind in (*GROUP_KINDS, "reinforce++"):
        a, b = group_advantages(R[order], G[order], kind, lengths[order]), group_advantages(R, G, kind, lengths)
        np.testing.assert_allclose(a, b[order])


@pytest.mark.parametrize("kind", ["grpo", "gpg", "reinforce++_baseline", "maxrl"])
def test_equal_rewards_give_exact_zeros_in_spite_of_rounding(kind):
    assert not group_advantages(np.full(7, 0.1), np.zeros(7), kind).any()


def test_a_group_of_one_is_refused_by_name():
    with pytest.raises(ValueError, match="rloo needs at least 2"):
        group_advantages([1.0, 2.0, 3.0], np.array([0, 0, 1]), "rloo")
    assert group_advantages([1.0, 2.0, 3.0], np.array([0, 0, 1]), "reinforce++").shape == (3,)


def test_unknown_kind():
    with pytest.raises(ValueError, match="got 'ppo'"):
        group_advantages([1.0, 2.0], np.array([0, 0]), "ppo")


def test_gae_by_hand():
    # T = 2, gamma 0.9, lambda 0.5: delta_1 = 1 - 0.4 = 0.6; delta_0 = 0 + 0.9*0.4 - 0.3 = 0.06; A_0 = 0.06 + 0.45*0.6.
    a, r = gae(np.array([0.0, 1.0]), np.array([0.3, 0.4]), 0.9, 0.5)
    np.testing.assert_allclose(a, [0.33, 0.6])
    np.testing.assert_allclose(r, [0.63, 1.0])


def test_gae_with_lambda_1_is_return_minus_value():
    rewards, values = np.array([0.5, 0.0, 2.0]), np.array([1.0, -1.0, 0.5])
    a, r = gae(rewards, values, 1.0, 1.0)
    np.testing.assert_allclose(r, [2.5, 2.0, 2.0])
    np.testing.assert_allclose(a, r - values)


def test_normalise_over_all_tokens():
    flat = np.concatenate(normalise([np.array([1.0, 2.0]), np.array([6.0])]))
    assert abs(flat.mean()) < 1e-9 and abs(flat.std() - 1) < 1e-5

"""methods.py: a row says of its method what its own schedule does."""

import pytest

from amft_fast.methods import METHODS, Knobs

KNOBS = Knobs(mu=0.5, start=0.9, end=0.1, sft_share=0.3)


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.learned], ids=lambda m: m.name)
def test_has_sft_and_has_rl_are_what_the_schedule_does(method):
    mus = [method.shape(k / 100, KNOBS) for k in range(101)]
    assert all(0 <= mu <= 1 for mu in mus)
    assert method.has_sft == (max(mus) > 0 or bool(method.mixture))
    assert method.has_rl == (min(mus) < 1)
    assert method.staged == ({0.0, 1.0} == set(mus))
    assert not (method.learns_from_utility or method.learns_from_entropy)


def test_a_learned_method_learns_from_something():
    learned = [m for m in METHODS.values() if m.learned]
    assert {m.name for m in learned} == {"amft", "amft_no_meta", "amft_no_entropy", "gac"}
    assert all(m.has_sft and m.has_rl and not m.staged for m in learned)
    learns = [(m.learns_from_utility, m.learns_from_entropy, m.learns_from_noise) for m in learned]
    assert len(set(learns)) == 4 and all(map(any, learns))

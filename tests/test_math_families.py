"""Property tests: what a change that keeps the meaning makes of a gold is right, what another makes of it is wrong."""

import random

import pytest
from math_families import FAMILIES

from amft_fast.tasks.math.pool import Pool
from amft_fast.tasks.math.reward import rewards

GOLDS = 26
"""Golds of each family: some 10,000 responses in all."""


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2, seconds=30.0)
    yield pool
    pool.close()


def responses(family, golds):
    """(gold, response, worth) of a family's random golds; what begins with a space is a sentence, the rest is boxed."""
    rng = random.Random(family.__name__)
    for _ in range(golds):
        gold, right, wrong = family(rng)
        for worth, answers in ((1.0, right), (0.0, wrong)):
            for answer in answers:
                sentence = answer.startswith(" ") and not answer.endswith(" ")
                yield gold, answer[1:] if sentence else f"\\boxed{{{answer}}}", worth


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_meaning_decides(family, pool):
    drawn = list(responses(family, GOLDS))
    got = rewards([response for _, response, _ in drawn], [gold for gold, _, _ in drawn], pool)
    assert [row for row, r in zip(drawn, got) if r != row[2]] == []


def test_there_are_enough():
    drawn = sum(len(right) + len(wrong) for family in FAMILIES for _, right, wrong in [family(random.Random(0))])
    assert len(FAMILIES) >= 30 and drawn * GOLDS >= 10_000

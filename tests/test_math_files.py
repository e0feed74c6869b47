"""The reward and the layouts on real files, where they are (see math_files.py)."""

import pytest
from math_files import FILES, FOLDER, needs_files

from amft_fast.tasks.math.answer import extract
from amft_fast.tasks.math.compare import plain_verdict
from amft_fast.tasks.math.data import Limits, Store, load
from amft_fast.tasks.math.pool import Pool
from amft_fast.tasks.math.sources import Source
from amft_fast.tasks.math.task import rewards

pytestmark = needs_files

# (problems, with a demonstration, with choices in letters) of each file.
COUNTS = {
    "aime24.jsonl": (30, 29, 0),
    "amc23.jsonl": (40, 0, 0),
    "gsm8k_test.jsonl": (1319, 1319, 0),
    "luffy_arc_c.parquet": (1172, 0, 1150),  # 22 number their choices, and are answered by that number
    "luffy_valid_all.parquet": (1590, 0, 0),
}
# Gold answers that are not right when written as the end of a sentence instead of in a box.
NOT_IN_A_SENTENCE = {
    "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer with $\\mho(a)=0$",
}
# Pairs of golds whose texts differ and that mean the same (a list has no order).
SAME = [{"x=5", "5"}, {"$k=3$", "3"}, {"2,3,4", "2,4,3"}]
SLOW = [pytest.param(f, marks=pytest.mark.integration) if f == "luffy_valid_all.parquet" else f for f in FILES]


@pytest.fixture(scope="module")
def problems():
    out = {}
    for name in FILES:
        store = Store()
        load(name, [Source(str(FOLDER / name))], lambda key, store=store: store, limits=Limits(1 << 60))
        out[name] = list(store)
    return out


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2, seconds=5.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", FILES)
def test_layouts_of_the_files(problems, name):
    n, demos, choices = COUNTS[name]
    found = problems[name]
    assert (len(found), sum(p.response is not None for p in found), sum(p.choices for p in found)) == (
        n,
        demos,
        choices,
    )


@pytest.mark.parametrize("name", FILES)
def test_every_gold_against_itself(problems, pool, name):
    golds = [p.answer for p in problems[name]]
    got = rewards([f"Hence it is $\\boxed{{{g}}}$." for g in golds], golds, pool)
    assert [g for g, r in zip(golds, got) if r != 1.0] == []
    got = rewards([f"Hence.\nThe final answer is {g}." for g in golds], golds, pool)
    wrong = {g for g, r in zip(golds, got) if r != 1.0}
    assert wrong <= NOT_IN_A_SENTENCE and len(wrong) <= 0.01 * len(golds)


@pytest.mark.parametrize("name", SLOW)
def test_every_gold_against_another_problems(problems, pool, name):
    """Against the gold of a problem further on, which is any other, and against the next one in order of the texts."""
    golds = [p.answer for p in problems[name]]
    ordered = sorted(set(golds))
    pairs = [(g, golds[(i + 7) % len(golds)]) for i, g in enumerate(golds)]
    pairs += [(ordered[i - 1], ordered[i]) for i in range(len(ordered))]
    pairs = [(a, b) for a, b in pairs if plain_verdict(a, b) is not True and {a, b} not in SAME]
    assert len(pairs) > 0.5 * len(golds)
    got = rewards([f"Hence it is $\\boxed{{{a}}}$." for a, _ in pairs], [b for _, b in pairs], pool)
    assert [pair for pair, r in zip(pairs, got) if r != 0.0] == []


def test_demonstrations_end_in_their_gold(problems):
    for name in ("gsm8k_test.jsonl", "aime24.jsonl"):
        for p in problems[name]:
            assert p.response is None or plain_verdict(extract(p.response), p.answer), p


@pytest.mark.integration
def test_ten_thousand_rewards_of_the_real_mix(problems):
    """None hangs: the pool has a limit for each. What they cost `python -m bench reward` says."""
    golds = [p.answer for name in FILES[2:] for p in problems[name]]
    pairs = [(golds[(i + k) % len(golds)], golds[i]) for k in (0, 3, 11) for i in range(len(golds))][:10_000]
    assert len(pairs) == 10_000
    pool = Pool(2)
    got = rewards([f"Step one. So \\boxed{{{a}}}." for a, _ in pairs], [g for _, g in pairs], pool)
    pool.close()
    assert 4081 <= sum(got) < 5000

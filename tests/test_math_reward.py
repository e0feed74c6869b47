"""The reward: forms that agree, forms that do not, where the answer stands, hostile answers, time limits, killed workers."""

import os
import signal
import subprocess
import sys
import time

import pytest
from math_files import needs_math_verify
from math_forms import AGREE, DIFFER, FOUND, HOSTILE, NOT_FOUND
from operations import lines_run

from amft_fast.tasks.math.answer import MAX_RESPONSE, extract
from amft_fast.tasks.math.pool import Pool, _Worker
from amft_fast.tasks.math.task import choice_reward, format_reward, reward, rewards


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2, seconds=5.0)
    yield pool
    pool.close()


@needs_math_verify
def test_forms_that_agree(pool):
    got = rewards([f"thus \\boxed{{{answer}}}" for _, answer in AGREE], [gold for gold, _ in AGREE], pool)
    assert [pair for pair, r in zip(AGREE, got) if r != 1.0] == []


def test_forms_that_do_not(pool):
    got = rewards([f"thus \\boxed{{{answer}}}" for _, answer in DIFFER], [gold for gold, _ in DIFFER], pool)
    assert [pair for pair, r in zip(DIFFER, got) if r != 0.0] == []
    # The other way round as well, except where it is a unit that is missing, which is forgiven.
    back = [(answer, gold) for gold, answer in DIFFER if answer]
    got = rewards([f"thus \\boxed{{{answer}}}" for _, answer in back], [gold for gold, _ in back], pool)
    assert [pair for pair, r in zip(back, got) if r != 0.0] == []


@pytest.mark.parametrize(("response", "gold"), FOUND)
def test_where_the_answer_stands(response, gold, pool):
    assert rewards([response], [gold], pool) == [1.0], extract(response)


@pytest.mark.parametrize(("response", "gold"), NOT_FOUND)
def test_what_is_no_answer(response, gold, pool):
    assert rewards([response], [gold], pool) == [0.0], extract(response)


def test_single_reward_is_a_float_and_bad_ground_truths_are_named():
    assert reward("so \\boxed{5}", "5") == 1.0 and isinstance(reward("x", "5"), float)
    assert reward(None, "5") == 0.0
    with pytest.raises(ValueError, match=r"ground_truths\[1\]"):
        rewards(["a", "b"], ["5", ""])
    with pytest.raises(ValueError, match="got 2 and 1"):
        rewards(["a", "b"], ["5"])


def test_choice_letters():
    for response in (
        "\\boxed{C}",
        "The answer is (C).",
        "Answer: C",
        "\\boxed{\\text{C}}",
        "**Answer: C) Days get shorter**",
    ):
        assert choice_reward(response, "C") == 1.0, response
        assert choice_reward(response, "D") == 0.0
    for response in ("\\boxed{C or D}", "\\boxed{A, C}", "C", "\\boxed{}", "maybe"):
        assert choice_reward(response, "C") == float(response == "C"), response


def test_format_reward_is_apart_from_the_answer():
    assert format_reward("so \\boxed{5}") == 1.0 and format_reward("the answer is 5") == 0.0 == format_reward(
        "\\boxed{}"
    )
    assert format_reward("<think>a</think> so \\boxed{5}", thinking=True) == 1.0
    for bad in (
        "so \\boxed{5}",
        "<think>a so \\boxed{5}",
        "<think>\\boxed{5}</think> done",
        "<think></think></think>\\boxed{5}",
    ):
        assert format_reward(bad, thinking=True) == 0.0, bad


# --------------------------------------------------------------------------------------------------------- hostile answers


@needs_math_verify
def test_hostile_answers_cost_their_own_item_alone():
    pool = Pool(2, seconds=1.0)
    responses = [f"\\boxed{{{h}}}" for h in HOSTILE]
    mixed = [text for h in responses for text in (h, "\\boxed{1+x}")]
    golds = ["x", "x+1"] * len(HOSTILE)
    assert rewards(mixed, golds, pool) == [0.0, 1.0] * len(HOSTILE)
    pool.close()


def test_text_of_the_policy_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    for code in (
        f"__import__('pathlib').Path('{mark}').touch()",
        f"().__class__ or open('{mark}', 'w')",
        f"`touch {mark}`",
    ):
        assert reward(f"\\boxed{{{code}}}", "x+1") == 0.0
        assert reward(f"The answer is {code}", "x+1") == 0.0
    assert not mark.exists()


def test_a_response_of_a_megabyte_is_read_once():
    """A step that is quadratic in its length would run a million times the lines counted here, or, in a regex, not end."""
    for text in (
        "\\boxed{" * 150_000,
        "$" * 10**6,
        "\\frac{" * 170_000,
        "answer is " * 100_000,
        "{" * 10**6,
        "#### " * 200_000,
    ):
        for response, want in ((text, 0.0), (text + " \\boxed{5}", 1.0)):
            assert reward(response, "5") == want
            assert lines_run(lambda response=response: reward(response, "5")) < 3 * len(response)
    assert reward("\\boxed{5}" + " " * MAX_RESPONSE, "5") == 0.0  # out of reach: the end of a response is read


# ------------------------------------------------------------------------------------------------------------- the workers


def test_a_worker_that_hangs_is_killed_and_replaced():
    """Stopped by a signal, a worker is as one that hangs in a computation no signal reaches."""
    pool = Pool(1, seconds=0.3)
    assert pool.compare([("d,b", "b,d")]) == [True]
    first = pool._workers[0].process
    os.kill(first.pid, signal.SIGSTOP)
    assert pool.compare([("a,b", "b,a"), ("(a,b)", "(b,a)"), ("c,b", "b,c")]) == [False, False, True]
    assert pool.killed == 1 and first.poll() is not None
    pool.close()


def test_a_computation_that_no_signal_reaches_ends_by_the_kernel(monkeypatch, tmp_path):
    """A worker in whose way stands a comparison that spins with Python's signals blocked."""
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\n"
        "from amft_fast.tasks.math import compare\n"
        "def spin(answer, gold, real=compare.same):\n"
        "    if answer == 'spin':\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})\n"
        "        while True: pass\n"
        "    return real(answer, gold)\n"
        "compare.same = spin\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = Pool(1, seconds=1.0)
    assert pool.compare([("a,b", "b,a")]) == [True]
    first = pool._workers[0].process
    assert pool.compare([("spin", "x"), ("c,b", "b,c")]) == [False, True]
    assert pool.killed == 1 and first.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    pool.close()


def test_a_worker_killed_from_outside_costs_nothing():
    pool = Pool(2, seconds=5.0)
    pairs = [(f"a,{n}", f"{n},a") for n in range(40)]
    assert pool.compare(pairs[:4]) == [True] * 4
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    assert pool.compare(pairs) == [True] * 40 and pool.killed == 0
    pool.close()


def test_workers_end_with_their_parent():
    code = (
        "from amft_fast.tasks.math.pool import PATIENCE, Pool; p = Pool(1); p.compare([('a,b', 'b,a')]);"
        "print(p._workers[0].process.pid, flush=True); import os; os._exit(1)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    for _ in range(1200):  # it ends when it reads the end of its input, once it has loaded its libraries
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_verdicts_are_remembered(pool):
    pair = ("remembered,b", "b,remembered")
    assert pool.compare([pair] * 3) == [True] * 3
    for worker in pool._workers:
        worker.give = None  # any further work would fail
    try:
        assert pool.compare([pair]) == [True]
    finally:
        pool.close()


def test_without_math_verify_structure_numbers_and_texts_still_compare():
    code = (
        "import sys; sys.modules['math_verify'] = None\n"
        "from amft_fast.tasks.math.compare import same, available\n"
        "assert not available()\n"
        "yes = [('1/2', '0.5'), ('2, 1', '\\\\{1,2\\\\}'), ('(1, 2]', '\\\\left(1,2\\\\right]'), ('x = 5', '5')]\n"
        "no = [('x+1', '1+x'), ('1', '2'), ('(1,2)', '(2,1)')]\n"
        "assert all(same(*p) for p in yes) and not any(same(*p) for p in no)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_math_verify
def test_of_ten_thousand_rewards_a_few_hundred_comparisons_reach_the_workers(monkeypatch):
    """The mix of the benchmarks: mostly numbers, a quarter of formulas, answers right and wrong, most given more than once.

    A worker takes milliseconds for a pair: numbers are compared before, and each pair of formulas is given once.
    """
    given = []
    monkeypatch.setattr(
        _Worker,
        "give",
        lambda self, job, pair, seconds, give=_Worker.give: (given.append(pair), give(self, job, pair, seconds)),
    )
    pool = Pool(2)
    formulas = [
        (f"\\frac{{{n}\\sqrt{{{k}}}}}{{2}}", f"\\frac{{{n}}}{{2}}\\sqrt{{{k + n % 2}}}")
        for n in range(3, 28)
        for k in (2, 3, 5, 7)
    ]
    formulas += [(f"x^2+{n}x", f"x(x+{n + n % 3})") for n in range(100)]
    numbers = [(str(n), str(n + n % 2)) for n in range(600)]
    pairs = [(numbers if i % 4 else formulas)[(7 * i) % (600 if i % 4 else 200)] for i in range(10_000)]
    got = rewards([f"So \\boxed{{{a}}}." for _, a in pairs], [g for g, _ in pairs], pool)
    assert 0 < len(given) == len(set(given)) <= 200
    assert 3000 < sum(got) < 7000
    pool.close()

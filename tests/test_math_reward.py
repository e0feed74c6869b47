"""The reward: forms that agree, forms that do not, where the answer stands, hostile answers, time limits, killed workers."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from math_forms import AGREE, BOMBS, DIFFER, FOUND, HOSTILE, NOT_FOUND
from operations import lines_run

from amft_fast.tasks.math.answer import MAX_RESPONSE, extract
from amft_fast.tasks.math.pool import Pool, _Worker
from amft_fast.tasks.math.task import choice_reward, format_reward, reward, rewards

# Variations of what people reported of other verifiers: gold, response, and whether that is right.
ROWS = [json.loads(line) for line in (Path(__file__).parent / "math_variations.jsonl").read_text().splitlines()]
RIGHT, WRONG = ([(row["gold"], row["response"]) for row in ROWS if row["right"] == right] for right in (1, 0))


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2, seconds=5.0)
    yield pool
    pool.close()


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


@pytest.mark.parametrize(("cases", "worth"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_variations_of_reported_cases(cases, worth, pool):
    got = rewards([response for _, response in cases], [gold for gold, _ in cases], pool)
    assert [case for case, r in zip(cases, got) if r != worth] == []


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
    assert format_reward("a</think> so \\boxed{5}", thinking=True, opened=True) == 1.0
    for bad in ("<think>a</think> so \\boxed{5}", "so \\boxed{5}", "a</think></think> so \\boxed{5}"):
        assert format_reward(bad, thinking=True, opened=True) == 0.0, bad
    for bad in (
        "so \\boxed{5}",
        "<think>a so \\boxed{5}",
        "<think>\\boxed{5}</think> done",
        "<think></think></think>\\boxed{5}",
    ):
        assert format_reward(bad, thinking=True) == 0.0, bad


# --------------------------------------------------------------------------------------------------------- hostile answers


def test_hostile_answers_cost_their_own_item_alone():
    pool = Pool(2, seconds=1.0)
    responses = [f"\\boxed{{{h}}}" for h in HOSTILE]
    mixed = [text for h in responses for text in (h, "\\boxed{1+x}")]
    golds = ["x", "x+1"] * len(HOSTILE)
    assert rewards(mixed, golds, pool) == [0.0, 1.0] * len(HOSTILE)
    pool.close()


def test_bombs_cost_no_worker_its_life():
    """Bounded before anything is computed: on every kind of gold, and in no worker's memory."""
    pool = Pool(1, seconds=30.0)
    assert pool.compare([("x+1", "1+x")]) == [True]
    first = pool._workers[0].process.pid
    golds = ["5", "x+1", "\\sqrt2", "n!", "y=2x", "1, \\sqrt3", "(1,2)", "1<x<2", "\\text{no}"]
    pairs = [(bomb, gold) for bomb in BOMBS for gold in golds]
    assert rewards([f"\\boxed{{{bomb}}}" for bomb, _ in pairs], [gold for _, gold in pairs], pool) == [0.0] * len(pairs)
    assert pool.compare(pairs) == [False] * len(pairs)
    assert pool.killed == 0 and [w.process.pid for w in pool._workers] == [first]
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
        "<answer>" * 120_000,
        "is the answer " * 70_000,
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


def test_threads_get_their_own_verdicts():
    """Pairs of opposite verdicts from eight threads at once, with one among them that takes its time."""
    pool = Pool(2, seconds=1.0)
    right = [(f"\\sqrt{{{n * n * 2}}}", f"{n}\\sqrt2") for n in range(2, 42)]
    wrong = [(f"\\sqrt{{{n * n * 2}}}", f"{n + 1}\\sqrt2") for n in range(2, 42)]

    def compare(i: int) -> list[bool]:
        pairs = right if i % 2 else wrong
        return pool.compare(pairs[i:] + pairs[:i])

    with ThreadPoolExecutor(8) as threads:
        for i, verdicts in enumerate(threads.map(compare, range(16))):
            assert verdicts == [i % 2 == 1] * 40
    assert pool.compare(right) == [True] * 40 and pool.compare(wrong) == [False] * 40
    pool.close()


def test_from_asyncio():
    async def judged() -> list[list[float]]:
        calls = [asyncio.to_thread(rewards, [f"\\boxed{{{a}+x}}"] * 3, ["x+1"] * 3) for a in (1, 2, 1)]
        return await asyncio.gather(*calls)

    assert asyncio.run(judged()) == [[1.0] * 3, [0.0] * 3, [1.0] * 3]


def test_what_was_broken_off_is_nobodys_verdict(monkeypatch):
    """Ctrl-C while workers are at work: what they would have said is not taken for the next pairs'."""
    pool = Pool(1, seconds=5.0)
    assert pool.compare([("x+1", "1+x")]) == [True]

    def interrupted() -> list:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(pool, "_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.compare([("2x", "x+x")])
    assert pool.compare([("3x", "x"), ("x", "3x")]) == [False, False]
    pool.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_leaves_the_workers_alone():
    code = (
        "import os; from amft_fast.tasks.math.pool import Pool\n"
        "pool = Pool(1); assert pool.compare([('x+1', '1+x')]) == [True]\n"
        "child = os.fork()\n"
        "right = pool.compare([('x+2', '2+x'), ('x', '2x')]) == [True, False]\n"
        "if not child: pool.close(); os._exit(0 if right else 1)\n"
        "assert right and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert pool.compare([('x+3', '3+x')]) == [True]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_verdicts_are_remembered(pool):
    pair = ("remembered,b", "b,remembered")
    assert pool.compare([pair] * 3) == [True] * 3
    for worker in pool._workers:
        worker.give = None  # any further work would fail
    try:
        assert pool.compare([pair]) == [True]
    finally:
        pool.close()


def test_no_algebra_package_is_needed():
    code = (
        "import sys\n"
        "for m in ('math_verify', 'sympy', 'latex2sympy2_extended'): sys.modules[m] = None\n"
        "from amft_fast.tasks.math.compare import same\n"
        "assert same('x+1', '1+x') and same('\\\\sqrt{8}', '2\\\\sqrt2') and not same('x+1', 'x+2')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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

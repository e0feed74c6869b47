"""Rewards of one's own on rows of one's own: resolved, called, bounded, added up; and a failure named with its row."""

import contextlib
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import SHORT_RUN

from amft_fast import cli, config_file
from amft_fast.config import DataConfig
from amft_fast.errors import RewardFailure, UserError
from amft_fast.report.page import write_report
from amft_fast.run.build import make_task
from amft_fast.tasks.data import code
from amft_fast.tasks.data.guard import Hang, within
from amft_fast.tasks.data.rewards import threshold
from amft_fast.tasks.data.shipped import shipped
from amft_fast.tasks.data.task import DataTask

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
ROWS = [
    {"prompt": f"Say {w}.", "answer": w, "response": w}
    for w in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my_rewards.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def rows(*data):
    return [(f"my.jsonl:{i}", row) for i, row in enumerate(data, 1)]


def task(*rewards, data=ROWS, **settings):
    return DataTask(DataConfig(**settings), rows(*data), rewards)


def answer(made, *texts, split="train"):
    return made.step_all([made.start(i) for i in made.prompts(split)[: len(texts)]], list(texts))


def named(name, function):
    function.__name__ = name
    return function


def constant(name, value):
    return named(name, lambda completions: [value] * len(completions))


# ------------------------------------------------------------------------------------------------------------- whole runs


def test_the_pages_example_runs(folder, checkpoint_folder):
    """docs/rewards.md: a function, an async one and a class, each a figure of its own in metrics, evaluations and report."""
    flags = re.search(r"train CONFIG (--task\.name.*?)\n\n", PAGE, re.DOTALL)[1].replace("\\\n", " ")
    given = [g.strip("'") for g in re.findall(r"'[^']*'|\S+", flags)]
    argv = ["train", "c.toml", "--model.path", str(checkpoint_folder), "--run.dir", "run", *given]
    assert cli.main(argv) == 0
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for step in steps:
        parts = [step[f"task/{name}"] for name in ("exact", "short", "polite")]
        assert step["reward"] == pytest.approx(parts[0] + 0.2 * parts[1] + 0.1 * parts[2])
        assert step["success"] == parts[0] and parts[1] > 0
    end = json.loads((folder / "run/summary.json").read_text())["end"]
    assert {"exact", "short", "polite"} <= end["test"].keys()
    report = (folder / "run/report.html").read_text()
    assert "The task&#39;s own figures" in report and "short" in report


BROKEN = """
import os
def exact(completions, answer):
    if os.path.exists("broken") and any(a == open("broken").read() for a in answer):
        raise KeyError("no such word")
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_a_reward_that_raises_ends_the_run_with_its_state_saved(folder, checkpoint_folder, capsys):
    """And the resumed run is the run that was never broken off."""
    (folder / "my_rewards.py").write_text(BROKEN)
    common = [
        "train",
        "c.toml",
        "--model.path",
        str(checkpoint_folder),
        "--task.name",
        "data",
        "--eval.splits",
        '["val"]',
    ]
    common += ["--task.data.train", "my.jsonl", "--task.data.rewards", "my_rewards.py:exact", "--run.dir"]
    assert cli.main([*common, "whole"]) == 0
    made = make_task(config_file.load("whole/config.toml").task)
    words = {p.columns["answer"]: p.place for p in made.problems["train"]}
    word = next(iter(words))
    (folder / "broken").write_text(word)
    flags = [*common, "run", "--train.prompts_per_step", str(len(words))]  # every word in every step
    assert cli.main(flags) == 2
    said = capsys.readouterr().err
    assert f"reward 'exact' (my_rewards.py:exact) raised KeyError: 'no such word' on row {words[word]}" in said
    assert "the state is saved in run/checkpoints/step-000000, go on with --resume" in said and "Traceback" not in said
    (folder / "broken").unlink()
    assert cli.main([*flags, "--resume"]) == 0
    assert json.loads((folder / "run/summary.json").read_text())["steps"] == 2


# -------------------------------------------------------------------------------------------------------------- adding up


def test_rewards_are_weighed_and_none_is_left_out():
    made = task(constant("one", 1), constant("half", 0.5), constant("no", None), weights=None)
    result = answer(made, "x")[0]
    assert result.reward == 1.5 and result.done and result.info == {"success": True, "one": 1.0, "half": 0.5}
    weighed = DataTask(DataConfig(rewards=["length"], weights=[2.0]), rows(*ROWS))
    assert answer(weighed, "x")[0].reward == 2.0


def test_columns_and_completions_are_as_trl_gives_them():
    seen = {}

    def look(prompts, completions, answer, note, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, note=note, rest=rest)
        return [0.0] * len(completions)

    data = [dict(row) for row in ROWS]
    data[0]["note"] = "n"
    texts = answer(task(look, data=data), "x", "y")
    assert len(texts) == 2 and seen["completions"] == ["x", "y"] and set(seen["rest"]) == {"prompt", "response"}
    assert seen["prompts"] == [f"Say {a}." for a in seen["answer"]] and set(seen["note"]) <= {"n", None}
    chat = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": r["prompt"]}]} for r in ROWS]
    made = task(
        named("look", lambda completions: seen.update(c=completions) or [1.0]), data=chat, system_prompt="other"
    )
    answer(made, "x")
    assert seen["c"] == [[{"role": "assistant", "content": "x"}]]
    assert next(m.content for m in made.start(made.prompts("train")[0]).messages) == "s"


@pytest.mark.parametrize(
    ("text", "solved"),
    [("", True), ("b", False), ("b >= 0.5", True), ("b>0.5", False), ("reward >= 1.5", True), ("reward > 1.5", False)],
)
def test_success_is_a_reward_or_a_threshold(text, solved):
    made = task(constant("a", 1), constant("b", 0.5), success=text)
    assert answer(made, "x")[0].info["success"] is solved


def test_a_threshold_on_a_reward_that_does_not_apply_is_not_met():
    assert not threshold("a >= 0", ["a"]).met({})


# ---------------------------------------------------------------------------------------------------------------- rows


def test_splits_share_no_prompt_and_do_not_hang_on_the_order():
    data = ROWS + [row | {"answer": "again"} for row in ROWS[:4]]
    first, again = task("length", data=data), task("length", data=data[::-1])
    seen = {}
    for split in first.splits:
        assert {i.id for i in first.prompts(split)} == {i.id for i in again.prompts(split)}
        for item in first.prompts(split):
            assert seen.setdefault(item.data.key, split) == split
    ids = [i.id for split in first.splits for i in first.prompts(split)]
    assert len(ids) == len(set(ids)) == len(data)
    assert len(first.prompts("val")) >= 2 and len(first.prompts("test")) >= 1


def test_prompts_of_held_out_files_are_not_trained_on(folder):
    Path("val.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "new"}) + "\n{broken\n")
    made = task("length", data=ROWS, val=["val.jsonl"], test=["my.jsonl"][:0], test_share=0.0)
    assert len(made.prompts("val")) == 2 and len(made.prompts("train")) == len(ROWS) - 1 and not made.prompts("test")
    assert "2 rows, 1 left out; the first: val.jsonl:3: no JSON" in made.prepare()[0]


def test_demonstrations_are_the_rows_with_a_response():
    data = [
        {"prompt": [{"role": "user", "content": c}], "say": [{"role": "assistant", "content": c}]} for c in "abcdef"
    ]
    made = task("length", data=[*data, {"prompt": "g"}], response="say", val_share=0.3, test_share=0.2)
    demos = [d for split in made.splits for d in made.demos(split)]
    assert sorted(d.response for d in demos) == list("abcdef") and all(d.messages[-1].role == "user" for d in demos)


MISTAKES = [
    ({"rewards": []}, "rewards must name at least one reward"),
    ({"rewards": ["maths"]}, "task.data.rewards: 'maths' must be FILE.py:NAME or MODULE:NAME"),
    ({"rewards": ["my_rewards.py:exacts"]}, "my_rewards.py has no 'exacts'; did you mean exact?"),
    ({"rewards": ["length", "length"]}, "rewards must have names of their own"),
    ({"rewards": ["length"], "success": "shrt > 1"}, "success must be one of length, reward, or as in 'length >= 0.5'"),
    ({"rewards": ["code"]}, "say --task.data.allow_code true"),
    ({"rewards": ["math"], "train": ["noanswer.jsonl"]}, "noanswer.jsonl:1: reward math needs the column 'answer'"),
    ({"rewards": ["regex"], "pattern": "("}, "task.data.pattern must be a regular expression, got '('"),
    (
        {"rewards": ["length"], "prompt": "question"},
        "no column 'question' (task.data.prompt), only prompt, answer, response",
    ),
    ({"rewards": ["length"], "train": ["gone.jsonl"]}, "no data file 'gone.jsonl'"),
    ({"rewards": ["length"], "val": ["my.jsonl"]}, "none is left to train on beside val and test"),
]


@pytest.mark.parametrize(("settings", "said"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_mistakes_are_told_in_one_sentence(folder, settings, said):
    Path("noanswer.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(9)))
    flags = [f"--task.data.{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    with pytest.raises(UserError) as error:
        make_task(config_file.load(None, ["--task.name=data", "--task.data.train=my.jsonl", *flags]).task)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_rows_must_come_from_somewhere():
    with pytest.raises(ValueError, match="train must name at least one file"):
        DataTask(DataConfig(rewards=["length"]))


def test_a_dry_run_looks_at_rewards_and_rows(folder, capsys):
    flags = [
        "--task.name",
        "data",
        "--task.data.train",
        "my.jsonl",
        "--task.data.rewards",
        '["my_rewards.py:exact", "length"]',
    ]
    assert cli.main(["train", "c.toml", "--dry-run", *flags]) == 0
    assert "rewards: exact, length\ndata: my.jsonl, columns prompt, answer, response" in capsys.readouterr().err
    for more in (["--task.data.weights", "[1]"], ["--task.data.length", "[3, 2]"], ["--task.data.success", "x"]):
        assert cli.main(["train", "c.toml", "--dry-run", *flags, *more]) == 2
        assert "must be" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- failures


def wrong_at(i, value):
    """A reward whose value for the answer "bad" is none; asked about all at once, it fails as a whole."""
    return named("r", lambda completions: [value if c == "bad" else 1.0 for c in completions])


def raising(completions):
    assert "bad" not in completions, "two lines\nof it"
    return [1.0] * len(completions)


def hanging(completions):
    while "bad" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


def spinning(completions):
    while "bad" in completions:
        with contextlib.suppress(Exception):
            sum(range(1000))
    return [1.0] * len(completions)


async def waiting(completions):
    import asyncio

    await asyncio.sleep(3600 if "bad" in completions else 0)
    return [1.0] * len(completions)


def backtracking(completions):
    """Never gives another thread a turn."""
    return [float(bool(re.match("(a*)*b", "a" * 40 if c == "bad" else "b"))) for c in completions]


FAILURES = {
    "raised AssertionError: two lines on row": raising,
    "returned nan, which is no finite number, on row": wrong_at(1, float("nan")),
    "returned 'yes', which is no finite number, on row": wrong_at(1, "yes"),
    "returned 0 values for 1 completion on row": named(
        "r", lambda completions: [1.0 for c in completions if c != "bad"]
    ),
    "returned float, not a list of numbers, on row": named(
        "r", lambda completions: 0.0 if "bad" in completions else [1.0]
    ),
    "did not return within 1 s (task.data.reward_timeout_s) on row": hanging,
    "did not return within 1 s (task.data.reward_timeout_s) on row ": spinning,
    "did not return within 1 s (task.data.reward_timeout_s) on row  ": waiting,
    "did not return within 1 s (task.data.reward_timeout_s) on row   ": backtracking,
}


@pytest.mark.parametrize("said", FAILURES, ids=lambda s: f"{FAILURES[s].__name__}-{s[:14]}")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["main", "thread"])
def test_a_reward_that_fails_is_named_with_its_row(said, elsewhere):
    reward = FAILURES[said]
    if elsewhere and reward in (spinning, backtracking):
        pytest.skip("in a thread of its own it would go on for the rest of the tests")
    made = task(reward, reward_timeout_s=1 if "within" in said else 300)
    texts = ["x"] * 5 + ["bad", "x"]
    errors = []

    def judge():
        try:
            answer(made, *texts)
        except RewardFailure as e:
            errors.append(str(e))

    if elsewhere:
        thread = threading.Thread(target=judge)
        thread.start()
        thread.join()
    else:
        judge()
    place = made.prompts("train")[5].data.place
    assert errors == [f"reward {reward.__name__!r} {said.strip()} {place}"]


def test_a_function_that_fails_on_many_alone_is_named_with_all_rows():
    made = task(named("r", lambda completions: [1.0]))
    places = [made.prompts("train")[i].data.place for i in (0, 2)]
    with pytest.raises(
        RewardFailure, match=rf"'r' returned 1 values for 3 completions on row {places[0]} to {places[1]} tog"
    ):
        answer(made, "x", "y", "z")


def test_signals_and_timers_are_as_before():
    import signal

    before = [signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGPROF)]
    with pytest.raises(Hang):
        within(0.2, lambda: time.sleep(3600))
    assert within(60.0, lambda: 3) == 3
    assert [signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGPROF)] == before
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_arrays_are_lists_of_numbers():
    import torch

    assert answer(task(named("r", lambda completions: torch.ones(len(completions)))), "x")[0].reward == 1


# ----------------------------------------------------------------------------------------------------------------- shipped


def given(name, completions, settings=None, **columns):
    return shipped(name, DataConfig(**(settings or {})))(completions=completions, **columns)


def test_math_format_length_regex():
    assert given("math", ["so \\boxed{1/2}", [{"role": "assistant", "content": "\\boxed{3}"}]], answer=["0.5", 4]) == [
        1,
        0,
    ]
    assert given("format", ["\\boxed{1}", "1"]) == [1, 0]
    assert given("format", ["\\boxed{1}", "<think>x</think> \\boxed{1}"], {"thinking": True}) == [0, 1]
    assert given("length", ["", "ab", "abcd", "a" * 6, "a" * 9], {"length": (4, 4)}) == [0, 0.5, 1, 0.5, 0]
    assert given("regex", ["x1", "x"], {"pattern": r"\d"}) == [1, 0]
    assert given("regex", ["x1", "x", "y"], pattern=["x$", "x$", None]) == [0, 1, None]


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    texts = ['{"a": 1}', '{"a": "1"}', 'so\n```json\n{"a": 2}\n```', "no", "[" * 100000]
    assert given("json_schema", texts, {"json_schema": str(tmp_path / "s.json")}) == [1, 0, 1, 0, 0]
    assert given("json_schema", texts[:3], schema=[schema, json.dumps(schema), None]) == [1, 0, None]
    with pytest.raises(ValueError, match="no JSON schema"):
        given("json_schema", ["1"], schema=[{"type": 3}])


PROGRAMS = {
    "def add(a, b):\n    return a + b": 1.0,
    "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.": 1.0,
    "def add(a, b):\n    return 3": 0.5,
    "def add(a, b": 0.0,
    "raise SystemExit(0)": 0.0,
    "import os\nos._exit(0)": 0.0,
    "print('[\"x\", 2]')\nimport os\nos._exit(0)": 0.0,
    "while True: pass": 0.0,
    "x = ' ' * (1 << 34)": 0.0,
    "open('big', 'wb').write(b' ' * (1 << 22))": 0.0,
    "import numpy": 0.0,
    "\x00\ud800": 0.0,
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: repr(p[:20]))
def test_code_by_asserts(program):
    settings = {"allow_code": True, "code_seconds": 1.0, "code_memory_mb": 256}
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    assert given("code", [program], settings, tests=[tests]) == [PROGRAMS[program]]


def test_code_by_what_it_prints():
    pairs = [{"input": "1 2\n", "output": "3"}, {"input": "2 2\n", "output": "4\n"}]
    right = "print(sum(map(int, input().split())), ' ')"
    endless = "while True: print('3')"
    texts = [right, "print(3)", endless, "import os; os._exit(1)", "import sys; print(3); sys.exit(1)"]
    limits = code.Limits(1.0, 256 << 20)
    assert code.judge(texts, [pairs] * len(texts), limits) == [1, 0.5, 0, 0, 0]
    with pytest.raises(ValueError, match="the column tests must be a list"):
        code.judge(["x"], [[{"input": "1"}]], limits)


def test_a_program_sees_no_environment_and_leaves_nothing_running(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "s")
    source = "import os, subprocess, sys\nprint(os.environ.get('MY_SECRET'))\n"
    child = f"import time; time.sleep(1); open({str(tmp_path / 'x')!r}, 'w')"
    source += f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    limits = code.Limits(2.0, 512 << 20)
    assert code.judge([source], [[{"input": "", "output": "None"}]], limits) == [1]
    time.sleep(2)
    assert not (tmp_path / "x").exists()


def test_a_report_without_figures_of_the_task_has_no_such_section(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phase": "train", "success": 0.5}\n')
    assert "own figures" not in write_report(tmp_path).read_text()

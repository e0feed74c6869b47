"""Environments of the package verifiers, with the real package and two small modules (verifiers_words, verifiers_guess)."""

import gc
import json
import sys
from pathlib import Path

import pytest
from fakes import SHORT_RUN

from amft_fast import cli
from amft_fast.config import VerifiersConfig
from amft_fast.errors import RewardFailure, UserError
from amft_fast.interfaces import Message
from amft_fast.tasks.verifiers.task import VerifiersTask

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def package():
    return pytest.importorskip("verifiers.v1", reason="make test-integration installs it")


@pytest.fixture
def make():
    made = []

    def task(name, options=None, **settings):
        made.append(VerifiersTask(name, VerifiersConfig(**settings), options or {}))
        return made[-1]

    yield task
    for one in made:
        one.host.close()


def test_one_turn_with_its_own_rewards_and_weights(make):
    task = make("verifiers_words", {"lead": "Say it."}, success=2)
    item = task.prompts("train")[0]
    word = item.data.data.answer
    assert task.start(item).messages == (Message("system", "Say it."), Message("user", word))
    episodes = [task.start(item) for _ in range(3)]
    results = task.step_all(episodes, [word, f" {word}\n", "something else"])
    assert [(r.reward, r.done, r.message) for r in results] == [(2.5, True, None), (2.5, True, None), (0, True, None)]
    assert results[0].info == {"exact": 1.0, "short": 1.0, "letters": len(word), "success": True}
    assert results[2].info["success"] is False and task.demos("train") == []


def test_splits_share_nothing_and_are_the_same_again(make):
    words = json.dumps([f"w{i}" for i in range(20)] + ["w3"])
    tasks = [make("verifiers_words", {"words": words}) for _ in range(2)]
    ids = [[i.id for i in tasks[0].prompts(split)] for split in tasks[0].splits]
    assert [len(part) for part in ids] == [16, 2, 2], "what comes twice is one task"
    assert len({i for part in ids for i in part}) == 20 and ids == [
        [i.id for i in tasks[1].prompts(s)] for s in tasks[1].splits
    ]
    assert len(make("verifiers_words", max_tasks=5).prompts("train")) == 2


def test_several_turns_end_when_the_environment_or_the_bound_says(make):
    task = make("verifiers_guess", {"size": "9", "env": {"hint": "no"}}, max_turns=3)
    item = task.prompts("train")[0]
    answer = item.data.data.answer
    episode = task.start(item)
    first, second = episode.step("x"), episode.step(answer)
    assert episode.messages == (Message("user", f"{answer} ?"),)
    assert (first.message, first.done, first.reward) == (Message("user", "no"), False, 0)
    assert (second.done, second.reward, second.info) == (True, 1.0, {"found": 1.0, "success": True})
    lost = task.start(item)
    assert [lost.step(t).done for t in "xyz"] == [False, False, True], "judged at the bound on turns"


def test_tools_of_the_environment_are_offered_called_and_answered(make, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")  # the tools' process imports the module
    task = make("verifiers_tools", max_turns=4)
    item = next(i for split in task.splits for i in task.prompts(split) if i.data.data.answer == "46")
    episode = task.start(item)
    (asked,) = episode.messages
    (tool,) = asked.tools
    name = tool["function"]["name"]
    assert (
        "number" in name
        and "name" in tool["function"]["parameters"]["properties"]
        and asked.content.startswith("The number")
    )

    def call(**arguments):
        return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"

    both = episode.step(call(name="ann") + call(name="bob"))
    assert (both.message, both.done) == (Message("tool", "12\n\n34"), False)
    missing = episode.step('<tool_call>{"name": "rm", "arguments": {}}</tool_call>')
    assert missing.message.content == "there is no tool 'rm'"
    wrong = episode.step(call(nick="ann"))
    assert wrong.message.role == "tool" and "name" in wrong.message.content and not wrong.done
    assert episode.step("46").info == {"exact": 1.0, "success": True}


def test_an_episode_that_nobody_asks_any_more_is_let_go(make):
    task = make("verifiers_guess", max_turns=2)
    item = task.prompts("train")[0]
    for _ in range(3):
        assert task.start(item).messages
    gc.collect()
    later = task.start(item)
    assert later.step("x").done is False
    assert len(task.host.plays) == task.host.active == 1


def test_more_episodes_than_may_go_on_at_once(make, monkeypatch):
    monkeypatch.setattr("amft_fast.tasks.verifiers.host.AT_ONCE", 4)
    task = make("verifiers_words", success=2)
    items = [item for item in task.prompts("train") for _ in range(2)]
    episodes = [task.start(item) for item in items]
    said = [e.messages[-1].content for e in episodes]
    assert task.host.active <= 4 + len(task.prompts("train")) < len(items)
    results = task.step_all(episodes, [word if i % 2 else "?" for i, word in enumerate(said)])
    assert [r.info["success"] for r in results] == [bool(i % 2) for i in range(len(items))] and task.host.active == 0


TROUBLE = {
    "raise": "task .*: the environment failed: .*ZeroDivisionError.*of its own",
    "hang": "task .*: the environment took more than 2 s; raise task.verifiers.seconds",
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_an_environment_that_fails_is_named_with_its_task(make, trouble):
    task = make("verifiers_guess", {"trouble": trouble}, max_turns=2, seconds=2)
    episode = task.start(task.prompts("train")[0])
    with pytest.raises(RewardFailure, match=TROUBLE[trouble]):
        episode.step("x"), episode.step("y")


@pytest.mark.parametrize("name", ["verifiers_words", "verifiers_guess"])
def test_a_run_from_the_command_line(name, tmp_path, checkpoint_folder):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    flags = ["--run.dir", str(tmp_path / "run"), "--model.path", str(checkpoint_folder), "--train.method", "rl"]
    flags += ["--task.name", f"verifiers:{name}", "--task.verifiers.max_turns", "1" if name.endswith("words") else "2"]
    assert cli.main(["train", str(tmp_path / "c.toml"), *flags]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == f"verifiers:{name}" and summary["end"]["test"]["prompts"] == 1
    assert {"exact", "letters"} <= set(summary["end"]["test"]) or "found" in summary["end"]["test"]


MISTAKES = {
    ("verifiers:no_such_taskset",): "verifiers finds no taskset 'no_such_taskset'",
    ("verifiers:verifiers_words", "--task.options.wordz=[]"): "has no such option; did you mean words?",
    ("verifiers:verifiers_guess", "--task.options.size=x"): "task.options.size: input should be a valid integer",
    ("verifiers:verifiers_guess", "--task.options.env.hints=x"): "task.options.env",
    ("verifiers:verifiers_guess", "--task.options.size=0"): "verifiers:verifiers_guess has no tasks",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistakes_are_told_in_one_sentence(flags, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("")
    assert cli.main(["train", str(tmp_path / "c.toml"), "--dry-run", "--task.name", *flags]) == 2
    said = capsys.readouterr().err
    assert MISTAKES[flags] in said and said.count("\n") == 1


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n == "verifiers" or n.startswith("verifiers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(UserError, match=r"takes verifiers \(.*\): pip install 'amft-fast\[verifiers\]'"):
        VerifiersTask("x", VerifiersConfig(), {})

"""The word problems: what they say, what they share, what is right, and a run on them."""

import json
import re

import pytest
from fakes import SHORT_RUN

from amft_fast import cli, config_file
from amft_fast.run import launch
from amft_fast.tasks.math.reward import reward
from amft_fast.tasks.words import ask
from amft_fast.tasks.words.phrases import PHRASES
from amft_fast.tasks.words.task import Options, WordProblems, split_of

NAME = "amft_fast.tasks.words.task:WordProblems"


@pytest.fixture(scope="module")
def task():
    return WordProblems(Options(train=600, val=150, test=150, ood=150))


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_the_same_problems_at_every_call(task):
    again = WordProblems(Options(train=600, val=150, test=150, ood=150))
    assert all(task.prompts(s) == again.prompts(s) and task.demos(s) == again.demos(s) for s in task.splits)
    few = WordProblems(Options(train=5, val=5, test=5, ood=5))
    assert all(task.prompts(s)[:5] == few.prompts(s) for s in task.splits), "more problems move none"
    other = WordProblems(Options(train=5, val=5, test=5, ood=5, seed=1))
    assert few.prompts("train") != other.prompts("train")
    assert len({i.id for s in task.splits for i in task.prompts(s)}) == 600 + 3 * 150


def test_splits_share_neither_a_sentence_nor_a_triple_of_numbers(task):
    said, triples = {}, {}
    for split, phrases in PHRASES.items():
        for ways in phrases:
            for way in ways:
                assert said.setdefault(way, split) == split
    for split in task.splits:
        for item in task.prompts(split):
            found = tuple(numbers(item.data.text))
            assert len(found) == 3 and triples.setdefault(found, split) == split
            large = all(n >= 6 for n in found) and max(found) > 20
            assert large if split == "ood" else max(found) <= 20 and split_of(found) == split


def test_solutions_follow_from_the_problems_and_are_right_by_the_reward(task):
    kinds = set()
    for split in task.splits:
        for demo, item in zip(task.demos(split), task.prompts(split), strict=True):
            sums = re.findall(r"(\d+)([+*-])(\d+)=(\d+)\.", demo.response)
            assert len(sums) == 2 and demo.response.endswith(f"The answer is {item.data.answer}.")
            for left, sign, right, result in sums:
                assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)) == int(
                    result
                )
            assert sums[0][3] == sums[1][0] and sums[1][3] == item.data.answer == task.gold(item)
            assert numbers(item.data.text) == [int(sums[0][0]), int(sums[0][2]), int(sums[1][2])]
            kinds.add((split, sums[0][1], sums[1][1]))
            episode = task.start(item)
            assert demo.messages == episode.messages and demo.messages[-1].content == item.data.text
            assert reward(demo.response, item.data.answer) == 1 == episode.step(demo.response).reward
    assert len(kinds) == 6 * len(task.splits), "every kind of problem is in every split"


def test_what_is_not_the_answer_earns_nothing(task):
    item = task.prompts("test")[0]
    wrong = str(int(item.data.answer) + 1)
    for text in (
        "",
        wrong,
        f"The answer is {wrong}.",
        f"{item.data.answer} or {wrong}",
        "__import__('os').abort()",
        "9" * 9999,
    ):
        result = task.start(item).step(text)
        assert result.done and result.reward == 0 and not result.info["success"]
    right = task.step_all([task.start(item)] * 2, [f"The answer is {item.data.answer}.", f"\\boxed{{{wrong}}}"])
    assert [r.reward for r in right] == [1, 0] and [r.info["answer"] for r in right] == [item.data.answer, wrong]


def test_options_and_their_mistakes(tmp_path, capsys):
    plain = WordProblems(Options(train=1, val=2, test=1, ood=1, system_prompt=""))
    assert [m.role for m in plain.demos("train")[0].messages] == ["user"]
    for flags, words in ((["--task.options.train", "0"], "train"), (["--task.options.size", "3"], "size")):
        assert cli.main(["train", "configs/demo.toml", "--task.name", NAME, *flags, "--dry-run"]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and words in said[0]


def test_a_run_and_three_questions(tmp_path, checkpoint_folder, capsys):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    flags = ["--run.dir", str(tmp_path / "run"), "--model.path", str(checkpoint_folder), "--task.name", NAME]
    flags += ["--eval.max_prompts", "8", "--task.options.train", "50", "--checkpoint.export", "true"]
    assert launch.train(config_file.load(tmp_path / "c.toml", flags)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["end"].keys() == {"train", "val", "test", "ood"}
    capsys.readouterr()
    folders = [str(checkpoint_folder), str(tmp_path / "run" / "model")]
    assert ask.main([*folders, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert sum("(gold: " in line for line in lines) == 3 and sum(f"wrong  {folders[1]}:" in line for line in lines) == 3
    assert ask.main([str(tmp_path)]) == 2 and "it has no config.json" in capsys.readouterr().err

"""docs/tasks.md: its example is a task that runs, in 40 lines."""

import json
import re
from pathlib import Path

import pytest
from fakes import SHORT_RUN

from amft_fast import config_file
from amft_fast.run import launch

PAGE = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()


@pytest.fixture(scope="module")
def example():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    names = {}
    exec(compile(code, "docs/tasks.md", "exec"), names)
    return code, names["Sort"]


def test_the_example_fits_in_40_lines_of_code(example):
    assert len([line for line in example[0].splitlines() if line.strip()]) <= 40


def test_the_example_is_a_task(example):
    task, again = example[1](), example[1]()
    seen = {}
    for split in task.splits:
        items = task.prompts(split)
        assert items == again.prompts(split) and len(items) > 0 and task.demos(split) == again.demos(split)
        for item, demo in zip(items, task.demos(split), strict=True):
            episode = task.start(item)
            assert demo.messages == episode.messages
            result = episode.step(demo.response)
            assert result.done and result.reward == 1 and result.info == {"success": True, "placed": 1.0}
            assert seen.setdefault(frozenset(item.data), split) == split
    wrong = task.start(task.prompts("train")[0])
    first, second = wrong.step("__import__('os').abort()"), wrong.step("")
    assert first.message.content == "again" and not first.done
    assert second.done and second.message is None and second.info == {"success": False, "placed": 0.0}
    with pytest.raises(ValueError, match="alphabet must have"):
        example[1](alphabet="abc")


def test_the_example_trains(example, tmp_path, checkpoint_folder):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    flags = ["--run.dir", str(tmp_path / "run"), "--model.path", str(checkpoint_folder)]
    assert launch.train(config_file.load(tmp_path / "c.toml", flags), task=example[1]()) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["end"].keys() == {"train", "val", "test", "ood"} and "placed" in summary["end"]["test"]
    assert "task/placed" in (tmp_path / "run" / "metrics.jsonl").read_text()

"""Tasks of one's own: from files, modules and plug-ins, with typed options; nothing of the project is edited or patched."""

import json
import re
import sys
from pathlib import Path

import pytest
from fakes import SHORT_RUN

from amft_fast import cli, config_file
from amft_fast.config import TaskConfig, VirlConfig
from amft_fast.doctor.memory import Layout, Machine
from amft_fast.errors import UserError
from amft_fast.run.build import make_task
from amft_fast.tasks import own

PAGE = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()

TYPED = """
from pydantic import BaseModel, Field
from beside import WORDS
from amft_fast.interfaces import Demo, Item, Message, StepResult

class Copy:
    splits, max_turns = ("train", "val", "test"), 1

    class Options(BaseModel):
        size: int = Field(2, ge=1)
        words: list[str] = WORDS
        label: str = "word"
        shout: bool = False

    def __init__(self, options):
        self.options = options

    @staticmethod
    def dry_run(options, hub):
        return [f"{len(options.words)} words"]

    def prompts(self, split):
        return [Item(f"{split}/{w}", w) for w in self.options.words]

    def demos(self, split):
        return [Demo(i.id, self.start(i).messages, i.data) for i in self.prompts(split)]

    def start(self, item):
        return Episode(item.data)

class Episode:
    def __init__(self, word):
        self.messages, self.word = (Message("user", word),), word

    def step(self, text):
        return StepResult(None, float(text == self.word), True, {"success": text == self.word})

def two(size: int = 1):
    return Copy(Copy.Options(size=size))

def nothing():
    return object()

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's example, a class with `Options`, a config, and no part of the project."""
    (tmp_path / "my_task.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "beside.py").write_text('WORDS = ["a", "b", "c"]\n')
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("typed", "beside", "my_plug"):
        sys.modules.pop(name, None)


def task(name, *flags):
    return make_task(config_file.load(None, ["--task.name", name, *flags]).task)


def test_the_pages_example_runs_from_the_command_line(folder, checkpoint_folder, capsys):
    """docs/tasks.md, as it stands there, by its two flags."""
    flags = re.search(r"train CONFIG (--task\.name .*)", PAGE)[1].split()
    assert cli.main(["train", "c.toml", "--model.path", str(checkpoint_folder), "--run.dir", "run", *flags]) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["task"] == "my_task.py:Sort" and "placed" in summary["end"]["ood"]
    assert "My_Task" not in (report := (folder / "run" / "report.html").read_text()) and "my_task.py:Sort" in report
    resumed = config_file.load(folder / "run" / "config.toml").task
    assert resumed.options == {"max_turns": "3", "alphabet": "abcdefgh"}
    assert make_task(resumed).max_turns == 3


def test_options_are_typed_by_the_constructor(folder):
    sort = task("my_task.py:Sort", "--task.options.max_turns=3", "--task.options.seed", "7")
    assert (sort.max_turns, type(sort.max_turns)) == (3, int)
    assert [i.id for i in sort.prompts("train")] != [i.id for i in task("my_task.py:Sort").prompts("train")]
    assert task("typed:two", "--task.options.size", "4").options.size == 4


def test_options_are_typed_by_options(folder):
    flags = ["--task.options.words", '["x", "y"]', "--task.options.label", "12", "--task.options.shout"]
    options = task("typed.py:Copy", "--task.options.size=5", *flags).options
    assert options.model_dump() == {"size": 5, "words": ["x", "y"], "label": "12", "shout": True}


def test_options_stand_in_a_config_beside_the_file(folder, tmp_path_factory, monkeypatch):
    (folder / "c.toml").write_text('[task]\nname = "typed.py:Copy"\noptions = { words = ["q"] }\n')
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    cfg = config_file.load(folder / "c.toml", ["--task.options.size", "3"]).task
    assert cfg.name == f"{folder / 'typed.py'}:Copy"
    assert make_task(cfg).options.model_dump() == {"size": 3, "words": ["q"], "label": "word", "shout": False}


def test_arguments_without_annotation_or_default_take_json_or_text():
    def maker(a, b=None, *, c: "Missing" = 1, **rest): ...  # noqa: F821

    given = own.typed(maker, {"a": "3", "b": "[1]", "more": "x"}, "maker")
    assert given == {"a": 3, "b": [1], "more": "x"}


def test_nested_options_by_their_dots():
    flags = ["--task.options.a.b", "1", "--task.options.a.c=x=y", "--task.options.d", "--train.steps", "3"]
    assert config_file.parse_flags(flags) == {
        "task": {"options": {"a": {"b": "1", "c": "x=y"}, "d": "true"}},
        "train": {"steps": "3"},
    }


def test_a_plug_in_is_a_name_of_its_own(folder, monkeypatch):
    (folder / "my_plug.py").write_text(TYPED)
    info = folder / "my_plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[amft_fast.tasks]\ncopy_words = my_plug:Copy\nbroken = my_plug_gone:Copy\n")
    monkeypatch.syspath_prepend(str(folder))
    assert task("copy_words", "--task.options.size", "9").options.size == 9
    with pytest.raises(
        UserError, match=r"plug-in 'broken' \(my_plug_gone:Copy\) could not be loaded: ModuleNotFoundError"
    ):
        task("broken")
    with pytest.raises(UserError, match=r"got 'copy_word'; did you mean copy_words\?"):
        task("copy_word")


def test_a_dry_run_looks_at_the_task(folder, capsys):
    flags = ["--task.name", "typed.py:Copy", "--dry-run"]
    assert cli.main(["train", "c.toml", *flags]) == 0
    assert "task: typed.py:Copy is there\n3 words" in capsys.readouterr().err
    assert cli.main(["train", "c.toml", *flags, "--task.options.size", "0"]) == 2
    assert "task.options.size: input should be greater than or equal to 1, got 0" in capsys.readouterr().err


def test_turns_of_an_own_task_are_planned_for(folder):
    flags = ["--task.name", "my_task.py:Sort", "--rollout.max_new_tokens", "100"]
    longest = [
        Layout.of(config_file.load(None, [*flags, *more]), Machine(1, 80e9)).longest
        for more in ([], ["--task.options.max_turns", "3"])
    ]
    assert longest[1] - longest[0] == 200


MISTAKES = {
    ("gone.py:Sort",): "task.name: no file 'gone.py'",
    ("my_task.py:Sorted",): "task.name: my_task.py has no 'Sorted'; did you mean Sort?",
    ("my_task.py:",): "task.name: 'my_task.py:' must be FILE.py:NAME or MODULE:NAME",
    ("no_such_module:Sort",): "task.name: module 'no_such_module' could not be imported: ModuleNotFoundError",
    ("broken.py:Sort",): "broken.py could not be run: ZeroDivisionError: division by zero (line 2)",
    ("syntax.py:Sort",): "syntax.py could not be run: SyntaxError: '(' was never closed (syntax.py, line 1)",
    ("sort",): "name must be a shipped or installed task, FILE.py:CLASS or MODULE:CLASS, got 'sort'",
    ("virtl",): "got 'virtl'; did you mean virl?",
    ("typed.py:number",): "typed.py:number is a int, not a class or function that makes a task",
    ("typed.py:nothing",): "object has no splits, max_turns, prompts, demos, start; docs/tasks.md has a whole task",
    ("my_task.py:Sort", "--task.options.max_turn", "2"): "Sort has no such option; did you mean max_turns?",
    ("my_task.py:Sort", "--task.options.max_turns", "two"): "task.options.max_turns: input should be a valid integer",
    ("my_task.py:Sort", "--task.options.alphabet", "abc"): "alphabet must have at least 5 letters, got 'abc'",
    (
        "math",
        "--task.options.train",
        "x",
    ): "options are for tasks that are not shipped; the settings of math are --task.math",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistakes_are_told_in_one_sentence(folder, flags):
    Path("broken.py").write_text("a = 1\na / 0\n")
    Path("syntax.py").write_text("f(\n")
    with pytest.raises(UserError) as error:
        task(*flags)
    assert MISTAKES[flags] in str(error.value) and "\n" not in str(error.value)


def test_a_task_without_test_problems_is_refused():
    class Half:
        splits, max_turns = ("train", "val"), 1
        prompts = demos = start = None

    with pytest.raises(UserError, match=r"splits must hold train, val and test, got \['train', 'val'\]"):
        own.checked(Half(), "half")


def test_shipped_tasks_have_their_section():
    assert TaskConfig(name="virl").section == VirlConfig()
    assert TaskConfig(name="my_task.py:Sort").section is None

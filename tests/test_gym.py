"""Tasks of the package reasoning-gym. What needs the package is an integration test (`make test-integration` installs it)."""

import json

import pytest
from fakes import SHORT_RUN

from amft_fast import cli
from amft_fast.config import GymConfig
from amft_fast.errors import UserError
from amft_fast.tasks.gym.task import GymTask
from amft_fast.tasks.math.pool import Pool

SIZES = {"train_size": 12, "val_size": 4, "test_size": 3}


def made(answers=("1", None)):
    return {
        s: [(10 * n + i, f"{s} {i}?", a, b"") for i, a in enumerate(answers)]
        for n, s in enumerate(("train", "val", "test"))
    }


def test_answers_are_read_and_scored():
    asked = []

    def compare(pairs):
        asked.extend(pairs)
        return [{"1": 1.0, "2": 0.25}.get(answer, 0.0) for answer, _ in pairs]

    task = GymTask("x", GymConfig(), {}, made(), compare)
    items = task.prompts("val")
    texts = [
        "<answer>2</answer> no: <answer> 1 </answer>",
        "<answer>2</answer>",
        "1",
        "<answer></answer>",
        "<answer>" + "1" * 30000,
    ]
    results = task.step_all([task.start(items[i % 2]) for i in range(len(texts))], texts)
    assert [r.reward for r in results] == [1, 0.25, 0, 0, 0] and [r.info["success"] for r in results] == [True] + [
        False
    ] * 4
    assert [r.info["answered"] for r in results] == [1, 1, 0, 0, 0]
    assert asked == [("1", "2"), ("2", "3")], "what holds no answer is not judged; numbers go over all splits"
    bare = GymTask("x", GymConfig(answer_tags=False, system_prompt=""), {}, made(), compare)
    assert bare.start(bare.prompts("train")[0]).step(" 1\n").reward == 1
    assert [m.role for m in bare.start(bare.prompts("train")[0]).messages] == ["user"]


def test_demonstrations_are_the_problems_with_a_known_answer():
    task = GymTask("x", GymConfig(), {}, made(), list)
    (demo,) = task.demos("train")
    assert demo.id == "x/0" and demo.response == "<answer>1</answer>" and demo.messages[0].role == "system"
    assert demo.messages == task.start(task.prompts("train")[0]).messages
    assert "1 training ones with a demonstration" in task.prepare()[0]
    with pytest.raises(UserError, match="none gave reasoning_gym:x a training problem"):
        GymTask("x", GymConfig(), {}, made(()), list)


def test_a_pool_of_other_workers(tmp_path, monkeypatch):
    """The verifier's processes: a number as the verdict, limits on time, a worker that dies replaced."""
    (tmp_path / "my_worker.py").write_text(
        "import os\nfrom amft_fast.tasks.math.worker import serve\n"
        "def judge(answer, gold):\n"
        "    while answer == 'hang': pass\n"
        "    if answer == 'die': os._exit(1)\n"
        "    return len(answer) / float(gold)\n"
        "serve(lambda: judge)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    pool = Pool(1, 0.5, ("my_worker",))
    try:
        assert pool.compare([("ab", "4"), ("hang", "1"), ("die", "1"), ("abc", "4"), ("a", "0")]) == [
            0.5,
            0,
            0,
            0.75,
            0,
        ]
    finally:
        pool.close()


# ---------------------------------------------------------------------------------------------------------- the package


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym", reason="make test-integration installs it")


@pytest.mark.integration
def test_problems_are_the_same_again_and_no_split_shares_a_seed_or_question(gym):
    task, again = (GymTask("countdown", GymConfig(**SIZES), {"max_numbers": "4"}) for _ in range(2))
    seeds, questions = {}, {}
    for split in task.splits:
        assert task.prompts(split) == again.prompts(split) and len(task.prompts(split)) == SIZES[f"{split}_size"]
        assert task.demos(split) == again.demos(split)
        for item in task.prompts(split):
            assert seeds.setdefault(item.id, split) == questions.setdefault(item.data.question, split) == split
    larger = GymTask("countdown", GymConfig(**SIZES | {"train_size": 20}), {"max_numbers": "4"})
    assert larger.prompts("test") == [i for i in larger.prompts("test") if i.id in seeds], (
        "more training moves no split"
    )
    assert [i.id for i in larger.prompts("train")][:12] == [i.id for i in task.prompts("train")]
    demos = task.demos("train")
    texts = [
        demos[0].response,
        "<answer>9**9**9**9**9</answer>",
        "<answer>1 +</answer>",
        "<answer>__import__('os')</answer>",
    ]
    first = task.prompts("train")[0]
    assert demos[0].id == first.id
    assert [r.info["success"] for r in task.step_all([task.start(first)] * 4, texts)] == [True, False, False, False]


@pytest.mark.integration
def test_a_composite_of_two_tasks_trains_by_amft(gym, tmp_path, checkpoint_folder):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    parts = '[{"name": "leg_counting"}, {"name": "basic_arithmetic", "weight": 2, "config": {"max_digits": 1}}]'
    sizes = [f"--task.gym.{name}={n}" for name, n in SIZES.items()]
    flags = [
        "--run.dir",
        str(tmp_path / "run"),
        "--model.path",
        str(checkpoint_folder),
        *sizes,
        "--train.method",
        "amft",
    ]
    flags += ["--meta.prompts", "4", "--meta.num_generations", "2", "--controller.window", "1", "--task.gym.seed", "5"]
    flags += [
        "--task.name",
        "reasoning_gym:composite",
        "--task.options.datasets",
        parts,
        "--task.gym.score_seconds",
        "20",
    ]
    assert cli.main(["train", str(tmp_path / "c.toml"), *flags]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "reasoning_gym:composite" and summary["end"]["test"]["prompts"] == 3


MISTAKES = {
    ("countdwn",): "reasoning-gym has no task 'countdwn'; did you mean countdown?",
    ("countdown", "--task.options.min_number=3"): "has no such option; did you mean min_numbers?",
    ("countdown", "--task.options.min_numbers=x"): "task.options.min_numbers: input should be a valid integer",
    ("countdown", "--task.options.min_numbers=-3"): "does not take them: min_numbers must be greater than 1",
    ("countdown", "--task.options.seed=3"): "the sizes and the seed of generated problems are --task.gym.train_size",
    (
        "composite",
        "--task.options.datasets=[1]",
    ): "task.options.datasets must be a list of {name, weight, config}, got [1]",
}


@pytest.mark.integration
@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistakes_are_told_in_one_sentence(gym, flags, tmp_path, capsys):
    (tmp_path / "c.toml").write_text("")
    name, *more = flags
    assert (
        cli.main(["train", str(tmp_path / "c.toml"), "--dry-run", "--task.name", f"reasoning_gym:{name}", *more]) == 2
    )
    said = capsys.readouterr().err
    assert MISTAKES[flags] in said and said.count("\n") == 1


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match=r"takes reasoning-gym \(not here\): pip install 'amft-fast\[gym\]'"):
        GymTask("countdown", GymConfig(), {})

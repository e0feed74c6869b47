"""Kept answers: gold, answer as read, advantage and reward beside the text, in the files and on the report's cards."""

import json

import pytest
from fakes import CopyEpisode, CopyTask, copy_run
from pages import Page, lines
from runs import lines as rows_of

from amft_fast.config import GeneralPointsConfig, MathConfig, VirlConfig
from amft_fast.interfaces import Message, Sample
from amft_fast.report import page as report
from amft_fast.report import reader
from amft_fast.run import answers, launch
from amft_fast.tasks.general_points.task import GeneralPoints, verify_formula
from amft_fast.tasks.general_points.vision import GeneralPointsVision
from amft_fast.tasks.math.task import MathTask
from amft_fast.tasks.virl.task import Virl


def judged(task, item, *texts):
    """The info of the last of these answers to a problem."""
    episode = task.start(item)
    return [episode.step(text) for text in texts][-1].info


@pytest.mark.parametrize("form", ["json", "formula"])
@pytest.mark.parametrize("kind", [GeneralPoints, GeneralPointsVision])
def test_general_points_tells_a_right_formula_and_the_one_it_read(kind, form):
    task = kind(GeneralPointsConfig(num_cards=3, targets=(10, 12), max_train=4, answer_format=form))
    item, demo = task.prompts("train")[0], task.demos("train")[0]
    assert verify_formula(task.gold(item), item.data.values, item.data.target).kind == "correct"
    right = judged(task, item, demo.response)
    assert right["success"] and verify_formula(right["answer"], item.data.values, item.data.target).kind == "correct"
    assert judged(task, item, "I do not know")["answer"] is None
    wrong = "1 + 1" if form == "formula" else '{"cards": [], "number": [], "formula": "1+1"}'
    if form == "formula" and kind is GeneralPointsVision:
        wrong = f"J formula {wrong}"
    info = judged(task, item, wrong)
    assert info["answer"].replace(" ", "") == "1+1" and not info["success"]


def test_virl_tells_the_right_actions_and_those_it_read():
    task = Virl(VirlConfig(num_train=2, num_val=1, num_test=1, cities=1, legs=(2, 2)))
    demo, item = task.demos("train")[0], task.prompts("train")[0]
    texts = [demo.response, *(answer for _, answer in demo.more)]
    assert judged(task, item, *texts)["answer"] == task.gold(item)
    assert len(task.gold(item).split(", ")) == len(item.data.points)
    assert judged(task, item, "what?")["answer"] is None
    assert judged(task, item, "what?", texts[0])["answer"] == f"?, {task.gold(item).split(', ')[0]}"


def test_mathematics_tells_the_gold_answer_and_the_one_it_read(tmp_path):
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = MathTask(MathConfig(train=[str(tmp_path / "a.jsonl")], val_share=0.0))
    item = next(i for i in task.prompts("train") if i.data.problem == "What is 3 + 1?")
    assert task.gold(item) == "4"
    assert judged(task, item, "It is \\boxed{5}")["answer"] == "5"
    assert judged(task, item, "I do not know.")["answer"] is None


class Said(CopyTask):
    """`CopyTask` that tells gold and answer; its prompts have a system message."""

    def gold(self, item):
        return item.data

    def start(self, item):
        task = self

        class Episode(CopyEpisode):
            def step(self, text):
                result = super().step(text)
                result.info["answer"] = text.split()[0] if text.split() else None
                return result

        episode = Episode(task, item.data)
        episode.messages = [Message("system", "a"), Message("user", item.data)]
        return episode


def test_kept_answers_of_a_run(tmp_path, checkpoint_folder):
    flags = ["--train.method", "rl", "--train.steps", "2", "--log.samples_every", "1", "--rollout.num_generations", "4"]
    assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, Said()) == 0
    kept = rows_of(tmp_path, "samples.jsonl")
    assert {r["step"] for r in kept} == {0, 1}
    for r in kept:
        assert set(r) == {"step", "prompt", "completion", "gold", "answer", "advantage", "reward", "success"}
        assert r["prompt"] == f"a\n\n{r['gold']}", "as the task wrote it, without the template's tokens"
        assert "<" not in r["prompt"] + r["completion"].replace("<unk>", "")
        assert r["answer"] == (r["completion"].split() or [None])[0]
        assert r["success"] == (r["reward"] == 1.0)
    for step in (0, 1):
        assert any(r["advantage"] != 0 for r in kept if r["step"] == step) or all(
            r["groups_without_spread"] == 1 for r in rows_of(tmp_path) if r["step"] == step
        )
    evaluated = rows_of(tmp_path, "eval_samples.jsonl")
    assert {(r["at"], r["split"]) for r in evaluated} == {(at, s) for at in (0, 2) for s in Said.splits}
    assert all("advantage" not in r and r["gold"] in "abcdef" for r in evaluated)
    page = (tmp_path / "report.html").read_text()
    assert "Answers in evaluations" in page and "Gold answer" in page and "Answer as read" in page
    for row in rows_of(tmp_path):
        assert row["no_answer"] + 1 > 0 and row["tokens"] == row["tokens_sampled"] + row["tokens_trained"]
        assert row["update_tokens_per_s"] == pytest.approx(row["tokens_trained"] / row["time/update"])
        assert row["rollout_tokens_per_s"] == pytest.approx(row["tokens_sampled"] / row["time/rollout"])


def test_the_advantage_that_is_kept_is_the_one_trained_on(tmp_path, checkpoint_folder):
    """Groups of four 0/1 rewards under GRPO: (r - mean) / standard deviation."""
    seen = []
    flags = ["--train.method", "rl", "--train.steps", "3", "--log.samples_every", "1", "--rollout.num_generations", "4"]
    real = answers.kept

    def watch(task, item, sample):
        seen.append(sample)
        return real(task, item, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "kept", watch)
        assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, Said()) == 0
    trained = [s for s in seen if s.advantage is not None]
    assert trained
    for s in trained:
        assert (s.advantage > 0) if s.reward == 1 and s.advantage else s.advantage <= 0


def test_items_are_found_by_their_ids():
    items = CopyTask().prompts("train")
    assert [i.data for i in answers.find(iter(items), ["train/c", "train/a"]).values()] == ["a", "c"]


def test_cards_show_what_is_there_and_escape_it(run_folder):
    new = {
        "prompt": "p",
        "completion": "c",
        "gold": "<i>4",
        "answer": None,
        "advantage": -0.5,
        "reward": 0.0,
        "success": False,
    }
    old = {"prompt": "3 5 8", "completion": "", "reward": 1.0, "success": True}
    evaluated = [new | {"step": 3, "at": 4, "split": "aime<24"}, old | {"step": -1, "at": 0, "split": "aime<24"}]
    run = run_folder(
        **{"samples.jsonl": lines([new | {"step": 1}, old | {"step": 3}]), "eval_samples.jsonl": lines(evaluated)}
    )
    text = report.write_report(run).read_text()
    words = Page(text).words
    assert "· advantage −0.5" in words and "(none could be read)" in words and "(empty)" in words
    assert "<i>4" in words and "<i>4" not in text, "shown, not markup"
    assert "aime<24, at 4: 0 of the 1 completions" in words and "at 0" not in words
    assert words.count("advantage −") == 2


def test_headline_tiles_show_benchmarks_first_and_both_speeds(run_folder):
    row = {"prompts": 30, "k": 8, "greedy": 0.2, "sampled": 0.25, "pass_at_k": 0.5, "stderr": 0.01}
    end = {"val": row, "test": row, "aime24": row | {"sampled": 0.5}, "math500": row}
    summary = {"method": "fixed", "task": "math", "steps": 4, "wall_s": 1.0, "tokens": 1, "start": {}, "end": end}
    metrics = [
        {"step": i, "phase": "train", "mu": 0.5, "rollout_tokens_per_s": 10.0 * i, "update_tokens_per_s": 99.0}
        for i in range(4)
    ]
    run = run_folder(**{"summary.json": json.dumps(summary), "metrics.jsonl": lines(metrics)})
    tiles = report.tiles(reader.read(run))
    labels = [label for label, _, _ in tiles]
    assert labels[:3] == ["aime24, sampled success", "math500, sampled success", "test, sampled success"]
    assert tiles[0][1].endswith("50%") or tiles[0][1].endswith("50.0%")
    speeds = {label: figure for label, figure, _ in tiles if "tokens per second" in label}
    assert speeds == {"rollouts, tokens per second": "15", "updates, tokens per second": "99"}


def test_sample_has_no_advantage_before_it_is_judged():
    assert Sample([1], [2], [1], [0.0], 0, "stop", "a", 0).advantage is None

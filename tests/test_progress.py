"""Progress: ETAs by hand-made clocks, and that long phases say something while they last."""

import io
import json
import sys
import time

import pytest
from fakes import CopyTask, copy_run
from runs import lines

from amft_fast.rollout import episodes
from amft_fast.run import launch, progress
from amft_fast.run.evaluate import Evaluator
from amft_fast.run.progress import Pace, Phase, Progress, clock_text


def test_clock_text_never_shows_sixty():
    assert [clock_text(s) for s in (0, 7.4, 59.6, 119.7, 3119.9, 3599.6, 7620, -3)] == [
        "0m00s", "0m07s", "1m00s", "2m00s", "52m00s", "1h00m", "2h07m", "0m00s",
    ]  # fmt: skip


def test_the_pace_counts_steps_and_evaluations_apart():
    """10 steps of 1 s are left, and evaluations of 50 answers at 1.8 s an answer: 100 s, whatever the first evaluation took."""
    pace = Pace(0)
    assert pace.left(30, 50) is None
    pace.evaluation(100, 180.0)
    for i in range(20):
        pace.step(i + 1, 1, 1.0)
    assert pace.left(30, 50) == pytest.approx(10 + 50 * 1.8)
    assert pace.left(30, 0) == pytest.approx(10)


def test_the_warm_up_tells_nothing_of_the_steps_after_it():
    bar = Progress(total=12, start=0, every=1, enabled=False, warmup=2)
    said = []
    bar.say = said.append
    bar.evaluated(10, 20.0)
    bar.step(-1, 1, 0.1, 10, {"mu": 1.0, "success": None})
    bar.step(0, 1, 0.1, 10, {})
    bar.step(1, 1, 5.0, 10, {"mu": 0.5})
    bar.step(2, 1, 7.0, 10, {})
    assert said[0] == "step 1/12  mu 1  warm-up ends in 0m00s" and said[1] == "step 2/12  warm-up ends in 0m00s"
    assert said[2] == "step 3/12  mu 0.5  eta 1m05s", "9 steps of 5 s and 10 answers of 2 s"
    assert said[3] == "step 4/12  eta 1m08s", "8 steps of 6 s and 10 answers of 2 s"


def test_looks_at_held_out_prompts_are_no_pace_and_each_kind_of_step_has_its_own():
    """A first step of 100 s, 90 of them on a look: the 29 that are left are not expected to look too."""
    pace = Pace(0)
    pace.step(1, 1, 100.0, aside=90.0)
    assert pace.left(30, 0) == pytest.approx(29 * (10 + 90 / 20))
    for i in range(9):
        pace.step(2 + i, 1, 2.0, imitates=True)
    assert pace.left(30, 0) == pytest.approx(20 * (2 + 90 / 20)), "at the pace of the present kind"
    pace.step(11, 1, 14.0)
    assert pace.left(30, 0) == pytest.approx(19 * (12 + 90 / 20))
    for i in range(19):
        pace.step(12 + i, 1, 12.0)
    assert pace.left(50, 0) == pytest.approx(20 * (12 + 90 / 30)), "past twenty steps: over all of them"


def test_a_token_budgets_clock_moves_by_what_was_used():
    bar = Progress(total=100, start=0, every=1, enabled=False)
    said = []
    bar.say = said.append
    bar.step(2.5, 2.5, 5.0, 30, {})
    assert said == ["step 2/100  eta 3m15s and evaluations"]


def test_a_phases_eta_is_what_is_left_at_its_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    phase = Phase("evaluating", 400, "answers", False, print)
    assert phase.eta() is None and phase.text() == "evaluating: 0/400 answers  0m00s so far"
    now[0] += 30
    for _ in range(100):
        phase.advance()
    assert phase.text() == "evaluating: 100/400 answers  eta 1m30s"
    assert Phase("loading", None, "", False, print).text() == "loading  0m00s so far"
    drawing = Phase("in step 3", None, "answers drawn", False, print)
    drawing.advance(7)
    now[0] += 31
    assert drawing.text() == "in step 3: 7 answers drawn  0m31s so far"


def wait_for(condition):
    """Until it holds; a minute is enough on any machine."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError("a minute went by")


def test_the_first_of_many_answers_to_end_tells_no_pace(monkeypatch):
    """Answers are drawn side by side: of 144 two had ended after 29 s, and the rest took a minute."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    phase = progress.Phase("evaluating", 144, "answers", False, lambda text: None)
    now[0] = 29.0
    phase.advance(2)
    assert phase.eta() is None and phase.text() == "evaluating: 2/144 answers  0m29s so far"
    phase.advance(57)
    assert phase.eta() == pytest.approx(29 * 85 / 59)
    slow = progress.Phase("evaluating", 1e6, "answers", False, lambda text: None)
    slow.begin, slow.done = now[0] - 301, 1000
    assert slow.eta() == pytest.approx(301 * 999), "hours ahead are told after minutes"


def test_a_phase_is_silent_at_first_and_then_speaks_from_a_thread(monkeypatch):
    said = []
    with progress.phase("short", say=said.append):
        pass
    assert not said
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "PAUSES", (0.0, 0.0))
    with progress.phase("long", 4, "answers", bars=False, say=said.append) as phase:
        phase.advance(2)
        wait_for(lambda: len(said) > 2)
    assert said[-1].startswith("long: 2/4 answers  eta ")
    with progress.phase("hidden", shown=False, say=said.append) as phase:
        phase.advance()
    assert not any("hidden" in text for text in said)


def test_on_a_terminal_a_phase_is_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with progress.phase("drawing", 4, "answers", bars=True) as phase:
        phase.advance(2)
        wait_for(lambda: "2/4 answers" in screen.getvalue())
    assert "drawing:  50%" in screen.getvalue() and "eta" in screen.getvalue()


def test_the_weights_that_transformers_loads_are_counted(checkpoint_folder):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    phase = Phase("loading", None, "", False, print)
    with progress.weights_loaded(phase):
        model = AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    assert phase.done == phase.total and phase.total >= len(list(model.named_parameters())) // 2
    assert logging.set_tqdm_hook(None) is None, "put back as it was"


class Judged(CopyTask):
    """`CopyTask` whose answers are judged all at once."""

    def step_all(self, going, texts):
        return [episode.step(text) for episode, text in zip(going, texts)]


@pytest.mark.parametrize("task", [CopyTask(), CopyTask(max_turns=2), Judged()])
def test_every_answer_is_told_as_it_ends(model, encoder, task):
    from amft_fast.interfaces import Sampling
    from amft_fast.rollout.transformers import TransformersEngine

    told = []
    samples = episodes.run(
        TransformersEngine(model), task, task.prompts("train"), encoder, Sampling(stop_token_ids=encoder.stop_token_ids),
        num_generations=2, max_new_tokens=3, seed_parts=(0,), on_answer=lambda: told.append(1),
    )  # fmt: skip
    assert len(told) == len(samples) == 8


def test_a_run_shows_its_long_phases_and_counts_all_answers(tmp_path, checkpoint_folder, monkeypatch):
    """Each phase's count reaches its total; H*, both evaluations in between, loading and the profile's reading are phases."""
    seen = []
    stop = Phase.stop

    def watch(self):
        seen.append((self.what, self.done, self.total))
        stop(self)

    monkeypatch.setattr(Phase, "stop", watch)
    flags = [
        *("--controller.signal", "balanced"),
        *("--train.method", "amft", "--train.steps", "4", "--train.warmup_steps", "1", "--controller.window", "2"),
        *("--meta.prompts", "2", "--eval.every", "2", "--eval.num_samples", "2", "--profile.steps", "1"),
    ]
    assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, CopyTask()) == 0
    counted = {what: (done, total) for what, done, total in seen}
    assert {
        "reading the data",
        "loading the model",
        "starting the engines",
        "measuring H*",
        "reading the profile",
    } <= set(counted)
    assert {f"evaluating at {at}" for at in (0, 1, 3, 5)} == {what for what in counted if what.startswith("evaluating")}
    for what, (done, total) in counted.items():
        if total and what != "reading the profile":
            assert done == total, what
    assert any(what == "reading the profile" and done == 100 for what, done, _ in seen)


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_start_evaluation_can_be_left_out(tmp_path, checkpoint_folder, warmup, capsys):
    flags = ["--train.steps", "4", "--train.warmup_steps", str(warmup), "--eval.every", "2", "--eval.at_start", "false"]
    assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, CopyTask()) == 0
    evals = lines(tmp_path, "evals.jsonl")
    assert [e["at"] for e in evals] == ([2, 4] if warmup == 0 else [1, 3, 5])
    assert "– ->" in capsys.readouterr().out and (tmp_path / "report.html").exists()


def test_the_evaluation_after_the_warm_up_is_a_whole_one(tmp_path, checkpoint_folder, capsys):
    """Of the answers that start and end have; the table shows three stages, the report a column more."""
    flags = ["--train.steps", "4", "--train.warmup_steps", "2", "--eval.every", "2", "--eval.num_samples", "3"]
    flags += ["--eval.after_warmup", "true"]
    left = []
    with pytest.MonkeyPatch.context() as patch:
        real = Evaluator.evaluate

        def watch(self, trainer, on_answer=lambda: None):
            before, result = self.answers_left(), real(self, trainer, on_answer)
            left.append((trainer.step, before, self.answers_left()))
            return result

        patch.setattr(Evaluator, "evaluate", watch)
        assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, CopyTask()) == 0
    whole, scheduled = (4 + 2 + 1 + 2) * 4, 2 * 5
    all_of_it = scheduled + 2 * whole
    assert left == [
        (0, all_of_it, all_of_it), (2, all_of_it, scheduled + whole), (4, scheduled + whole, whole), (6, whole, whole),
    ]  # fmt: skip
    evals = lines(tmp_path, "evals.jsonl")
    assert [(e["at"], e["full"]) for e in evals] == [(0, True), (2, True), (4, False), (6, True)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["warmup"] == {k: evals[1][k] for k in CopyTask.splits}
        and summary["warmup"].keys() == summary["end"].keys()
    )
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("test "))
    stages = [f"{summary[at]['test']['greedy']:.1%}" for at in ("start", "warmup", "end")]
    assert [x.strip() for x in row.removeprefix("test").split("->")][:2] == stages[:2]
    assert "start -> after the warm-up -> end" in said
    assert ">warm-up</th>" in (tmp_path / "report.html").read_text()


def test_answers_left_are_those_of_the_schedule_and_the_end(tmp_path, checkpoint_folder):
    """Told by a run: what an evaluation announces is what it draws, and after the last one nothing but the end is left."""
    flags = ["--train.steps", "5", "--eval.every", "2", "--eval.num_samples", "3", "--eval.schedule_num_samples", "2"]
    announced = []
    real = Evaluator.evaluate

    def watch(self, trainer, on_answer=lambda: None):
        drawn = []
        result = real(self, trainer, lambda: drawn.append(1))
        announced.append((trainer.step, self.answers(self.whole(trainer) is not None), len(drawn), self.answers_left()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", watch)
        assert launch.train(copy_run(tmp_path, checkpoint_folder, *flags), False, CopyTask()) == 0
    whole, scheduled = (4 + 2 + 1 + 2) * 4, 2 * 3
    assert announced == [
        (0, whole, whole, 2 * scheduled + whole), (2, scheduled, scheduled, scheduled + whole),
        (4, scheduled, scheduled, whole), (5, whole, whole, whole),
    ]  # fmt: skip

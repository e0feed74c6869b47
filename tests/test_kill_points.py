"""A run that is killed at any instant, or stopped at any and then killed, goes on as the undisturbed one, bit for bit.

test_attack_kills.py kills processes at random moments; here all moments come, one after the other, by kill_points.py.
"""

import json
import shutil

import pytest
from fakes import CopyTask, make_checkpoint
from kill_points import RECORDS, copied_at_each_change, differences, stopped
from runs import cfg_for

from amft_fast.run import checkpoint, launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

LEARNED = (
    "--train.method",
    "amft",
    "--controller.signal",
    "balanced",
    "--controller.window",
    "2",
    "--meta.prompts",
    "2",
    "--meta.num_generations",
    "4",
)
BLOCKS = (
    *("--train.method", "amft", "--controller.look_prompts", "2", "--meta.num_generations", "4"),
    *("--controller.imitation_share", "0.3", "--controller.confidence", "1e9"),
)
SHORT = (
    *("--train.steps", "4", "--train.warmup_steps", "1", "--eval.every", "2", "--eval.schedule_max_prompts", "1"),
    *("--eval.max_prompts", "1", "--log.samples_every", "1"),
)
ALWAYS = ("--checkpoint.every", "1", "--checkpoint.keep_last", "1")
MORE = (
    *("--objective.kl_coef", "0.01", "--train.minibatches_per_rollout", "2", "--rollout.dynamic_sampling", "true"),
    *("--meta.memory", "0", "--meta.min_ess", "1"),  # held-out rollouts are drawn twice for a u
)
RUNS = {
    "saved at each step": (*LEARNED, *SHORT, *ALWAYS),
    "saved at each step, blocks": (*BLOCKS, *SHORT, *ALWAYS, "--train.steps", "6"),
    "saved seldom": (*LEARNED, *SHORT, *MORE, "--checkpoint.every", "3"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    """A report takes longer than the run, and is made of what is compared."""
    monkeypatch.setattr(launch, "write_report", lambda folder: folder / "report.html")


class Runs:
    def __init__(self, folder, model, flags):
        self.whole, self.model, self.flags = folder / "whole", model, flags

    def life(self, folder, resume=False):
        return launch.train(cfg_for(folder, self.model, *self.flags), resume, CopyTask())

    def faults(self, what, folder):
        """What is wrong once the run in `folder` has gone on to its end; the folder goes when there is nothing."""
        resume = (folder / "metrics.jsonl").exists()  # without it there is no run to go on with
        try:
            assert self.life(folder, resume) == 0
        except Exception as e:
            return [f"{what}: {e!r}"]
        return self.compared(what, folder)

    def compared(self, what, folder):
        found = [f"{what}: {difference}" for difference in differences(folder, self.whole)]
        if not found:
            shutil.rmtree(folder)
        return found


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_killed_at_any_instant_goes_on_as_if_it_had_not_been(tmp_path, model, flags, capsys):
    runs = Runs(tmp_path, model, flags)
    with copied_at_each_change(runs.whole, tmp_path / "kills") as copies:
        assert runs.life(runs.whole) == 0
    assert len(copies) > 40
    faults = [fault for copy in copies for fault in runs.faults(f"killed at {copy.name}", copy)]
    assert not faults, "\n".join(faults)
    said = capsys.readouterr().out
    assert "passed over" not in said and "damaged" not in said


def test_a_run_stopped_at_any_place_and_then_killed_before_it_saves_again_goes_on_so_too(tmp_path, model):
    runs = Runs(tmp_path, model, (*LEARNED, *SHORT, *MORE, *ALWAYS, "--train.steps", "2", "--eval.every", "1"))
    with stopped() as asked:
        assert runs.life(runs.whole) == 0
    for part in ("evaluate", "after_warmup", "draw_utility", "take_step", "run"):
        assert any(place.startswith(f"{part}:") for places in asked for place in places), part
    faults, states = [], set()
    for at in range(len(asked)):
        if asked[at] == asked[at - 1]:  # in the midst of drawing one batch of answers
            continue
        folder = tmp_path / f"stop{at}"
        with stopped(at):
            assert runs.life(folder) == 143
        saved = newest(folder)
        if saved in states:  # a stop in the midst of a step undoes what it has drawn
            shutil.rmtree(folder)
            continue
        states.add(saved)
        with copied_at_each_change(folder, tmp_path / f"kills{at}") as copies:
            assert runs.life(folder, resume=True) == 0
        faults += runs.compared(f"stopped at {at} in {asked[at]}", folder)
        written = set()
        for copy in copies:
            rows = tuple((copy / name).read_bytes() for name in RECORDS)
            if newest(copy) == saved and rows not in written:  # how files are opened is the same at each start
                written.add(rows)
                faults += runs.faults(f"stopped at {at} in {asked[at]}, killed at {copy.name}", copy)
            else:
                shutil.rmtree(copy)
    assert len(states) > 5 and not faults, "\n".join(faults)


def test_a_run_killed_while_it_overwrites_another_goes_on_as_itself(tmp_path, model):
    runs = Runs(tmp_path, model, (*RUNS["saved at each step"], "--train.steps", "2"))
    assert runs.life(runs.whole) == 0
    earlier = Runs(tmp_path, model, (*runs.flags, "--train.lr", "0.02"))
    assert earlier.life(tmp_path / "run") == 0
    runs.flags += ("--run.overwrite",)
    with copied_at_each_change(tmp_path / "run", tmp_path / "kills") as copies:
        assert runs.life(tmp_path / "run") == 0
    # While all of the earlier run's checkpoints are there it is the one to go on; from its own first on see the tests above.
    found = [[path.name for _, path in checkpoint.steps(copy / "checkpoints")] for copy in copies]
    taken = next(i for i, names in enumerate(found) if names != found[0])
    begun = copies[taken : found.index(["step-000001"])]
    assert len(begun) > 15
    faults = [fault for copy in begun for fault in runs.faults(f"killed at {copy.name}", copy)]
    assert not faults, "\n".join(faults)


def newest(folder):
    """The newest checkpoint that is whole: its name and what it holds, times apart; None where there is none."""
    for _, path in reversed(checkpoint.steps(folder / "checkpoints")):
        if (path / "state.json").exists():
            state = json.loads((path / "state.json").read_text())
            return path.name, json.dumps({k: v for k, v in state.items() if k not in ("wall_s", "sha256")})
    return None

"""A run's folder in bad company: full disks, other hands, other runs, other settings. A sentence, and nothing is lost."""

import json
import os
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fakes import CopyTask
from holders import hold
from kill_points import stopped
from runs import cfg_for, lines, train, without_times

from amft_fast import config_file
from amft_fast.errors import UserError
from amft_fast.run import checkpoint, launch
from amft_fast.run.loop import Loop
from amft_fast.run.signals import StopSignal


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint_folder):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(cfg_for(folder, checkpoint_folder)) == 0
    return folder


def same(folder, whole):
    """The run left what the undisturbed one did."""
    assert without_times(lines(folder)) == without_times(lines(whole))
    a, b = (checkpoint.load(f / "checkpoints" / "step-000006")[0] for f in (folder, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert set(json.loads((folder / "summary.json").read_text())["end"]) == {"train", "val", "test", "ood"}


def everything(folder):
    """All that is in a folder, links and contents; the lock apart, whose file comes and goes."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if (p.is_symlink() or p.is_file()) and p.name != "run.lock"
    }


@pytest.mark.parametrize(
    ("file", "flags", "said"),
    [
        ("config.toml", (), r"config.toml cannot be written: File too large"),
        ("metrics.jsonl", ("--checkpoint.every", "0", "--checkpoint.keep_best", "false"), "metrics.jsonl cannot be written"),
        ("checkpoints/step-000006/state.safetensors", (), r"the checkpoint of step \d could not be written .*File too large"),
    ],
    ids=lambda x: x.rpartition("/")[2] if isinstance(x, str) and "." in x else "",
)  # fmt: skip
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(
    tmp_path, checkpoint_folder, whole, file_limit, file, flags, said
):
    """The size of files is bounded just under that of one file of the run; a row's times have more digits or fewer."""
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, *flags)
    limit = (whole / file).stat().st_size - 100
    if file == "metrics.jsonl":  # the settings, which come first, must fit
        settings = (whole / "config.toml").stat().st_size
        assert settings + 50 < limit
        limit = (settings + limit) // 2
    with file_limit(limit), pytest.raises(UserError, match=said):
        train(cfg)
    assert train(cfg, resume=True) == 0
    same(tmp_path / "run", whole)


def test_a_full_disk_at_a_resume_leaves_everything_as_it_was(tmp_path, checkpoint_folder, whole, file_limit):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    before = everything(folder)
    cfg = cfg_for(folder, checkpoint_folder, "--train.steps", "6")
    with file_limit(100), pytest.raises(UserError, match="File too large"):
        train(cfg, resume=True)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("report.html", "the report cannot be written into .*: Is a directory"),
        ("model/config.json", "model could not be written: Is a directory; .*--resume writes it"),
    ],
)
def test_what_a_run_leaves_at_its_end_is_written_by_a_resume_where_it_could_not_be(
    tmp_path, checkpoint_folder, whole, file, said
):
    """A folder stands where the file should be."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True, ignore=shutil.ignore_patterns("report.html"))
    (folder / file).mkdir(parents=True)
    cfg = cfg_for(folder, checkpoint_folder, "--checkpoint.export", "true")
    with pytest.raises(UserError, match=said):
        train(cfg, resume=True)
    (folder / file).rmdir()
    assert train(cfg, resume=True) == 0
    assert (folder / "report.html").is_file() and (folder / "model" / "config.json").is_file()


def test_too_little_room_is_told_before_the_first_step(tmp_path, checkpoint_folder, whole, monkeypatch):
    saved = (whole / "checkpoints" / "step-000006" / "state.safetensors").stat().st_size
    for free, enough in ((saved // 2, False), (saved, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            assert train(cfg_for(tmp_path / "run", checkpoint_folder, "--train.steps", "1")) == 0
            continue
        with pytest.raises(UserError, match=r"GB are free there and one checkpoint takes .* GB"):
            train(cfg_for(tmp_path / "run", checkpoint_folder))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_checkpoints_that_cannot_be_are_told_before_the_first_step(tmp_path, checkpoint_folder):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints: File exists"):
        train(cfg_for(folder, checkpoint_folder, "--run.overwrite"))
    assert not (folder / "metrics.jsonl").exists()


class Taken(CopyTask):
    """At the third drawing of rollouts somebody takes the run's folder away."""

    def __init__(self, folder, hand):
        super().__init__()
        self.folder, self.hand, self.asked = folder, hand, 0

    def start(self, item):
        self.asked += 1
        if self.asked == 200:
            self.hand(self.folder)
        return super().start(item)


def delete(folder):
    """Whatever is still being written into it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("hand", [delete, lambda f: f.rename(f.with_name("moved"))], ids=["deleted", "moved"])
def test_a_folder_taken_away_stops_the_run_with_a_sentence(tmp_path, checkpoint_folder, hand):
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--train.steps", "30", "--eval.every", "0")
    with pytest.raises(UserError, match=r"moved or deleted|could not be written .*No such file"):
        train(cfg, task=Taken(tmp_path / "run", hand))
    assert not (tmp_path / "run").exists(), "nothing new was begun in its place"


@pytest.mark.parametrize("flags", [(), ("--run.overwrite",)], ids=["resume", "overwrite"])
def test_a_run_that_goes_on_is_neither_resumed_nor_overwritten_by_another(tmp_path, checkpoint_folder, whole, flags):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    before = everything(folder)
    process, _ = hold(folder)
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            train(cfg_for(folder, checkpoint_folder, *flags), resume=not flags)
        assert everything(folder) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not flags:
        assert train(cfg_for(folder, checkpoint_folder), resume=True) == 0
        same(folder, whole)


class Other(CopyTask):
    """Other training data."""

    def prompts(self, split):
        return super().prompts(split)[::-1] if split == "train" else super().prompts(split)


@pytest.mark.parametrize(
    ("flags", "task", "said"),
    [
        (("--run.seed", "3"), None, r"checkpoint is of seed 0, the config says 3"),
        (("--task.name", "math"), None, r"checkpoint is of task 'general_points', the config says 'math'"),
        ((), Other(), r"checkpoint is of other training data"),
        (("--train.method", "rl"), None, r"of method 'fixed', the config says 'rl'"),
        (("--advantage.kind", "gae"), None, r"does not fit this config: .*value_head"),
    ],
    ids=["seed", "task", "data", "method", "parameters"],
)
def test_a_resume_of_another_run_is_refused_and_leaves_everything_as_it_was(
    tmp_path, checkpoint_folder, whole, flags, task, said
):
    """config.toml and the rows after the checkpoint too."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    before = everything(folder)
    with pytest.raises(UserError, match=said):
        train(cfg_for(folder, checkpoint_folder, *flags), resume=True, task=task)
    assert everything(folder) == before


def test_settings_that_changed_are_named(tmp_path, checkpoint_folder, whole, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    cfg = cfg_for(folder, checkpoint_folder, "--train.steps", "5", "--train.lr", "0.02", "--objective.kl_coef", "0.5")
    assert train(cfg, resume=True) == 0
    out = capsys.readouterr().out
    assert "resumed with other settings: train.steps 4 -> 5, train.lr 0.01 -> 0.02, objective.kl_coef 0.0 -> 0.5" in out
    assert config_file.load(folder / "config.toml") == cfg
    assert train(cfg, resume=True) == 0
    assert "other settings" not in capsys.readouterr().out


def test_an_earlier_run_is_overwritten_only_by_one_that_starts(tmp_path, checkpoint_folder, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    before = everything(folder)
    with pytest.raises(UserError, match=r"no config\.json"):
        train(cfg_for(folder, tmp_path / "no_model_here", "--run.overwrite"))
    assert everything(folder) == before


def test_whole_damaged_checkpoints_are_not_begun_anew(tmp_path, checkpoint_folder, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    for _, path in checkpoint.steps(folder / "checkpoints"):
        (path / "state.json").write_text("{")
    before = everything(folder)
    with pytest.raises(UserError, match=r"no checkpoint under .* is whole"):
        train(cfg_for(folder, checkpoint_folder), resume=True)
    assert everything(folder) == before


class Killed(BaseException):
    """In place of a kill."""


def killed_in(owner, name):
    """A run in here ends where it would call this function."""
    return mock.patch.object(owner, name, side_effect=Killed)


@pytest.fixture
def no_reports(monkeypatch):
    """Where a report takes longer than all else."""
    monkeypatch.setattr(launch, "write_report", lambda folder: folder / "report.html")


def test_an_evaluation_that_the_checkpoint_of_its_step_does_not_know_of_is_written_once(
    tmp_path, checkpoint_folder, whole, no_reports
):
    """Stopped in its first evaluation, a run saves step 0; killed after that evaluation, it makes it again."""
    cfg = cfg_for(tmp_path / "run", checkpoint_folder)
    with stopped(at=0):
        assert train(cfg) == 143
    with killed_in(Loop, "take_step"), pytest.raises(Killed):
        train(cfg, resume=True)
    assert len(lines(tmp_path / "run", "evals.jsonl")) == 1
    assert train(cfg, resume=True) == 0
    for name in ("evals.jsonl", "eval_samples.jsonl"):
        assert without_times(lines(tmp_path / "run", name)) == without_times(lines(whole, name)), name


def test_a_best_checkpoint_gets_its_link_after_a_kill_between_the_two(tmp_path, checkpoint_folder, whole, no_reports):
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--checkpoint.keep_last", "1")
    with killed_in(checkpoint, "mark_best"), pytest.raises(Killed):
        train(cfg)
    best = tmp_path / "run" / "checkpoints" / "best"
    assert not best.exists()
    assert train(cfg, resume=True) == 0
    assert os.readlink(best) == os.readlink(whole / "checkpoints" / "best") and checkpoint.load(best)


def test_a_kill_while_an_earlier_run_is_overwritten_leaves_no_half_of_it(
    tmp_path, checkpoint_folder, whole, no_reports
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    cfg = cfg_for(folder, checkpoint_folder, "--run.overwrite")

    def half(path, **options):
        if path.exists():
            (path / "step-000006" / "state.json").unlink()
            raise Killed

    with mock.patch.object(shutil, "rmtree", half), pytest.raises(Killed):
        train(cfg)
    assert not checkpoint.steps(folder / "checkpoints") and lines(folder) == lines(whole), "it had come no further"
    assert train(cfg, resume=True) == 0
    same(folder, whole)
    assert without_times(lines(folder, "evals.jsonl")) == without_times(lines(whole, "evals.jsonl"))
    assert not list(folder.glob(".deleted-*"))


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP for what it starts."""
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, was)

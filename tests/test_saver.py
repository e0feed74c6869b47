"""Checkpoints written beside the steps: what they hold, who waits for them, and what their failure says."""

import errno
import signal
import threading

import pytest
import torch
from fakes import CopyTask
from runs import cfg_for, lines

from amft_fast.config import CheckpointConfig
from amft_fast.engine.parts import Part
from amft_fast.engine.world import ALONE
from amft_fast.errors import UserError
from amft_fast.run import checkpoint, launch
from amft_fast.run.saver import Saver
from amft_fast.run.signals import StopSignal


@pytest.fixture
def slow_disk(monkeypatch):
    """No file of tensors is written before this is set."""
    ready, write = threading.Event(), checkpoint._write

    def slow(path, tensors):
        assert ready.wait(60)
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write", slow)
    yield ready
    ready.set()


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path, slow_disk):
    told = []
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, done=told.append)
    w, flat, state = torch.zeros(3), torch.arange(4.0), {"mus": [0.5]}
    path = saver.save(1, {"w": w, "p": Part(flat[2:], 2, (4,))}, state, best=True, wait=False)
    w.fill_(9)
    flat.fill_(9)
    state["mus"].append(0.6)
    assert not path.exists() and not told
    slow_disk.set()
    saver.wait()
    tensors, loaded = checkpoint.load(path)
    assert tensors["w"].tolist() == [0, 0, 0] and tensors.part("p", 2, 2).tolist() == [2, 3]
    assert loaded["mus"] == [0.5] and told == [path] and (tmp_path / "best").resolve() == path.resolve()


def test_the_next_save_waits_and_takes_the_same_memory(tmp_path, slow_disk):
    saver, w = Saver(tmp_path, CheckpointConfig(keep_last=1), ALONE), torch.zeros(3)
    saver.save(1, {"w": w}, {}, best=False, wait=False)
    memory = saver.copies["w"].data_ptr()
    threading.Timer(0.3, slow_disk.set).start()
    saver.save(2, {"w": w + 1}, {}, best=False, wait=False)
    assert (tmp_path / "step-000001").exists() and saver.copies["w"].data_ptr() == memory
    saver.save(3, {"w": w + 2}, {}, best=False, wait=True)
    assert [path.name for _, path in checkpoint.steps(tmp_path)] == ["step-000003"]
    assert checkpoint.load(tmp_path / "step-000003")[0]["w"].tolist() == [2, 2, 2]


def test_steps_go_on_while_the_disk_is_slow(tmp_path, checkpoint_folder, slow_disk):
    """The disk comes back after the step that follows the first checkpoint."""
    seen = []

    class Listener:
        def on_step(self, record):
            if record["step"] == 2:
                seen.append(sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")))
                slow_disk.set()

        def on_checkpoint(self, path):
            seen.append((path.name, threading.current_thread() is threading.main_thread()))

    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--checkpoint.every", "2", "--eval.every", "0")
    assert launch.train(cfg, task=CopyTask(), listeners=[Listener()]) == 0
    assert seen == [[], *((f"step-{n:06d}", True) for n in (2, 4, 6))]


def test_a_failure_ends_the_run_at_the_next_step_with_a_sentence(tmp_path, checkpoint_folder, monkeypatch):
    write = checkpoint._write
    failed = threading.Event()

    def full(path, tensors):
        if "step-000004" in str(path):
            threading.Timer(0.1, failed.set).start()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    class Waits:
        def on_step(self, record):
            assert record["step"] != 4 or failed.wait(60)

    monkeypatch.setattr(checkpoint, "_write", full)
    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--train.steps", "30", "--eval.every", "0")
    with pytest.raises(UserError, match=r"checkpoint of step 4 could not be written to .*: No space left on device"):
        launch.train(cfg, task=CopyTask(), listeners=[Waits()])
    assert lines(tmp_path / "run")[-1]["step"] == 4, "steps 0 to 4 are done, and no more"
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")[0].name == "step-000002"


def test_a_stopped_run_waits_for_what_is_being_written(tmp_path, checkpoint_folder, slow_disk, monkeypatch):
    stops = []
    monkeypatch.setattr(
        StopSignal, "__enter__", lambda self, enter=StopSignal.__enter__: stops.append(self) or enter(self)
    )

    class Stops:
        def on_step(self, record):
            if record["step"] == 2:
                stops[0].request(signal.SIGTERM)
                threading.Timer(0.3, slow_disk.set).start()

    cfg = cfg_for(tmp_path / "run", checkpoint_folder, "--eval.every", "0")
    assert launch.train(cfg, task=CopyTask(), listeners=[Stops()]) == 143
    names = [path.name for _, path in checkpoint.steps(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000002", "step-000003"]
    for name in names:
        checkpoint.load(tmp_path / "run" / "checkpoints" / name)


def test_without_a_background_the_step_waits(tmp_path, slow_disk):
    slow_disk.set()
    saver = Saver(tmp_path, CheckpointConfig(background=False), ALONE)
    path = saver.save(1, {"w": torch.zeros(3)}, {}, best=False, wait=False)
    assert path.exists() and saver.thread is None and not saver.copies

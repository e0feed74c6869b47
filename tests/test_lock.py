"""Two runs in one folder: the second is told whose it is."""

import errno
import os
import signal
import threading

import pytest
from holders import hold

from amft_fast.errors import UserError
from amft_fast.run import lock


def test_the_second_is_told_whose_the_folder_is_and_a_death_gives_it_back(tmp_path):
    folder = tmp_path / "runs" / "x"
    process, _ = hold(folder)
    with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*--run.dir"), lock.locked(folder):
        pytest.fail("both hold it")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.locked(folder, pytest.fail):
        assert str(os.getpid()) in (folder / lock.FILE).read_text()
    assert (folder / lock.FILE).read_text() == ""


def test_a_run_that_is_started_again_waits_for_the_one_before_to_end(tmp_path):
    process, child = hold(tmp_path, "fork")
    os.kill(child, signal.SIGKILL)
    threading.Timer(0.5, process.kill).start()
    with lock.locked(tmp_path, pytest.fail, patience=60):
        assert process.wait() == -signal.SIGKILL
    process, _ = hold(tmp_path)
    with pytest.raises(UserError, match="in use by process"), lock.locked(tmp_path, pytest.fail, patience=0.3):
        pass
    process.kill()
    process.wait()


def test_a_child_that_outlives_it_does_not_hold_the_folder(tmp_path):
    """The workers of a data loader, say."""
    process, child = hold(tmp_path, "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        with lock.locked(tmp_path, pytest.fail):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    said = []
    with lock.locked(tmp_path, said.append):
        pass
    assert len(said) == 1 and "No locks available" in said[0]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"), lock.locked(tmp_path / "file" / "run"):
        pass

"""Checkpoints: atomic, verified, pruned; nothing whole is lost, whenever the process dies and whatever lies beside them."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from amft_fast.errors import UserError
from amft_fast.run import checkpoint


def save(folder, step, value=0.0):
    return checkpoint.save(folder, step, {"w": torch.full((3,), value)}, {"note": step})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_goes_round(tmp_path):
    flat = torch.arange(10.0)
    path = checkpoint.save(tmp_path, 7, {"a": flat[:4], "b": flat[4:].view(2, 3)}, {"x": [1, None, float("nan"), 1e-7]})
    tensors, state = checkpoint.load(path)
    assert torch.equal(tensors["a"], flat[:4]) and torch.equal(tensors["b"], flat[4:].view(2, 3))
    assert state["x"][:2] == [1, None] and state["x"][3] == 1e-7 and state["step"] == 7


def damage_truncate(path):
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def damage_flip(path):
    file = path / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_json(path):
    (path / "state.json").write_text("{")


def damage_missing(path):
    (path / "state.safetensors").unlink()


def damage_number(path):
    """JSON as before, with another number in it."""
    text = (path / "state.json").read_text()
    assert '"note": 2' in text
    (path / "state.json").write_text(text.replace('"note": 2', '"note": 3'))


def damage_empty(path):
    (path / "state.json").write_bytes(b"")


def damage_binary(path):
    (path / "state.json").write_bytes(b"\xff\xfe\x00" * 9)


def damage_deep(path):
    (path / "state.json").write_text("[" * 100_000)


def damage_list(path):
    (path / "state.json").write_text("[1, 2]")


def rewritten(path, **changed):
    """state.json with other fields and a checksum that is right."""
    state = json.loads((path / "state.json").read_text()) | changed
    state.pop("sha256")
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state | {"sha256": digest}))


def damage_no_files(path):
    rewritten(path, files={})


def damage_files_elsewhere(path):
    rewritten(path, files={"../step-000001/state.safetensors": "0" * 64})


def damage_other_step(path):
    """A copy of another step under this name."""
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000001"), path)


DAMAGES = [f for name, f in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_sentence(tmp_path, damage):
    save(tmp_path, 1, 1.0)
    damage(save(tmp_path, 2, 2.0))
    said = []
    path, tensors, state = checkpoint.latest(tmp_path, said.append)
    assert path.name == "step-000001" and state["note"] == 1 and tensors["w"][0] == 1
    assert len(said) == 1 and "step-000002" in said[0] and "\n" not in said[0]


def test_a_changed_record_with_its_own_checksum_is_read(tmp_path):
    """So that the two tests above fail for what they change, and for nothing else."""
    path = save(tmp_path, 1)
    rewritten(path, note=9)
    assert checkpoint.load(path)[1]["note"] == 9


def test_none_whole_is_not_a_fresh_start(tmp_path):
    damage_flip(save(tmp_path, 1))
    with pytest.raises(UserError, match=r"no checkpoint under .* is whole"):
        checkpoint.latest(tmp_path, lambda text: None)
    assert checkpoint.latest(tmp_path / "none") is None


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing after it runs (nothing here catches a BaseException or cleans up in finally)."""


def killed_at(call, monkeypatch, work):
    """Whether `work` reached its `call`-th change of the file system, where it was ended."""
    left = call

    def counted(function):
        def inner(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return inner

    with monkeypatch.context() as m:
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            m.setattr(module, name, counted(getattr(module, name)))
        m.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step saved already"])
def test_a_kill_at_any_moment_leaves_the_newest_whole_one(tmp_path, monkeypatch, again):
    """With keep_last 1, so that one checkpoint is all there is."""
    call, ended = 0, True
    while ended:
        folder = tmp_path / str(call)
        folder.mkdir()
        checkpoint.mark_best(folder, save(folder, 2, 1.0))
        step = 2 if again else 3

        def work(folder=folder, step=step):
            path = save(folder, step, 2.0)
            checkpoint.prune(folder, 1, path)

        ended = killed_at(call, monkeypatch, work)
        _, tensors, state = checkpoint.latest(folder, pytest.fail)
        assert state["step"] in (2, step) and tensors["w"][0] in (1.0, 2.0)
        assert checkpoint.load(folder / "best")[1]["step"] == 2
        work()  # the resumed run saves the step again, and what the kill left is cleared
        assert names(folder) == ["best", "step-000002"] + ["step-000003"] * (not again)
        assert checkpoint.latest(folder, pytest.fail)[1]["w"][0] == 2.0
        call += 1
    assert call > 6, "the kills reached all of it"


def test_a_checkpoint_caught_aside_is_found(tmp_path):
    path = save(tmp_path, 4, 1.0)
    path.rename(tmp_path / ".replaced-step-000004")
    assert checkpoint.latest(tmp_path, pytest.fail)[0] == path


def test_the_last_n_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        path = save(tmp_path, step)
        if step == 2:
            checkpoint.mark_best(tmp_path, path)
        checkpoint.prune(tmp_path, 2, path)
    assert names(tmp_path) == ["best", "step-000002", "step-000004", "step-000005"]
    assert checkpoint.load(tmp_path / "best")[1]["step"] == 2
    checkpoint.mark_best(tmp_path, tmp_path / "step-000005")
    checkpoint.prune(tmp_path, 2, path)
    assert names(tmp_path) == ["best", "step-000004", "step-000005"]


def test_a_million_comes_after_999999(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.prune(tmp_path, 2, save(tmp_path, step))
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert checkpoint.latest(tmp_path)[2]["step"] == 1_000_000


def test_a_damaged_later_one_takes_no_place(tmp_path):
    """The run went back to 1 because 5 is damaged; with keep_last 1 the step it saves next is the one to keep."""
    save(tmp_path, 1)
    damage_flip(save(tmp_path, 5))
    checkpoint.prune(tmp_path, 1, save(tmp_path, 2))
    assert names(tmp_path) == ["step-000002", "step-000005"]
    assert checkpoint.latest(tmp_path, lambda text: None)[2]["step"] == 2


def test_strangers_are_left_alone(tmp_path):
    """A file, a link and folders of other names, where checkpoints are; a folder `best` that was copied without links."""
    (tmp_path / "step-000009").write_text("a file")
    (tmp_path / "step-old").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-000008").symlink_to("elsewhere", target_is_directory=True)
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "best")
    checkpoint.mark_best(tmp_path, path)
    assert (tmp_path / "best").is_symlink()
    for step in (2, 3):
        checkpoint.prune(tmp_path, 1, save(tmp_path, step))
    assert names(tmp_path) == [
        "best", "elsewhere", "step-000001", "step-000003", "step-000008", "step-000009", "step-old",
    ]  # fmt: skip
    assert checkpoint.latest(tmp_path, pytest.fail)[2]["step"] == 3
    for step in (8, 9):  # the run reaches their numbers
        save(tmp_path, step)
    assert checkpoint.latest(tmp_path, pytest.fail)[2]["step"] == 9 and (tmp_path / "elsewhere").is_dir()


def test_the_format_before_this_one_is_read(tmp_path):
    """Format 2: state.json without a checksum of its own. One that has lost its checksum is not taken for it."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(ValueError, match="checksum"):
        checkpoint.load(path)
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    assert checkpoint.load(path)[1]["step"] == 1
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="checksum"):
        checkpoint.load(path)


def test_another_format_is_named(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load(path)


@pytest.mark.parametrize(("size", "note"), [(3000, ""), (5000, "x" * 9000)], ids=["the tensors", "state.json"])
def test_no_room_is_a_sentence_and_what_was_there_stays(tmp_path, file_limit, size, note):
    save(tmp_path, 1)
    with (
        file_limit(size),
        pytest.raises(UserError, match=r"the checkpoint of step 2 could not be written .*File too large.* --resume"),
    ):
        checkpoint.save(tmp_path, 2, {"w": torch.zeros(1000)}, {"note": note})
    assert names(tmp_path) == ["step-000001"]
    checkpoint.save(tmp_path, 2, {"w": torch.zeros(1000)}, {"note": note})
    assert checkpoint.latest(tmp_path, pytest.fail)[2]["step"] == 2


def test_a_run_folder_that_has_gone_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"step 3 could not be written to .*gone.*: No such file or directory"):
        save(tmp_path / "gone" / "checkpoints", 3)

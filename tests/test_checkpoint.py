"""Checkpoints: atomic, verified, pruned."""

import json

import pytest
import torch

from amft_fast.run import checkpoint


def save(folder, step, value=0.0):
    return checkpoint.save(folder, step, {"w": torch.full((3,), value)}, {"note": step})


def test_goes_round(tmp_path):
    flat = torch.arange(10.0)
    path = checkpoint.save(tmp_path, 7, {"a": flat[:4], "b": flat[4:].view(2, 3)}, {"x": [1, None]})
    tensors, state = checkpoint.load(path)
    assert torch.equal(tensors["a"], flat[:4]) and torch.equal(tensors["b"], flat[4:].view(2, 3))
    assert state["x"] == [1, None] and state["step"] == 7


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


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_json, damage_missing])
def test_a_damaged_one_is_passed_over_with_a_sentence(tmp_path, damage):
    save(tmp_path, 1, 1.0)
    damage(save(tmp_path, 2, 2.0))
    said = []
    path, tensors, state = checkpoint.latest(tmp_path, said.append)
    assert path.name == "step-000001" and state["note"] == 1 and tensors["w"][0] == 1
    assert len(said) == 1 and "step-000002" in said[0]


def test_a_half_written_one_is_not_seen_and_is_cleared(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def crash(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path)[0].name == "step-000001"
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_nothing_there(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None


def test_the_last_n_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        path = save(tmp_path, step)
        if step == 2:
            checkpoint.mark_best(tmp_path, path)
        checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004", "step-000005"]
    assert checkpoint.load(tmp_path / "best")[1]["step"] == 2
    checkpoint.mark_best(tmp_path, tmp_path / "step-000005")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000004", "step-000005"]


def test_another_format_is_named(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load(path)

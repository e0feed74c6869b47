"""60 damaged checkpoints: each is passed over with a sentence, and what is gone on from is the last whole one, bit for bit."""

import json
import random
import shutil

import pytest
import torch

from amft_fast.run import checkpoint

STATE = {
    "method": "amft", "prompt_position": 128, "demo_position": 64, "ahead": None, "best": None,
    "controller": {"value": 0.25, "window": [1, 2.5]},
    "cache": [{"ids": [5, 6], "reward": 1.0}], "entropy_target": 1.25, "mus": [0.5, 0.25], "wall_s": 12.5,
}  # fmt: skip


def tensors(step):
    g = torch.Generator().manual_seed(step)
    return {"param.a": torch.randn(40, generator=g), "exp_avg.a": torch.randn(40, generator=g), "rng": torch.arange(9)}


def flip(lot, path):
    """One bit, anywhere."""
    data = bytearray(path.read_bytes())
    data[lot.randrange(len(data))] ^= 1 << lot.randrange(8)
    path.write_bytes(data)


def cut(lot, path):
    data = path.read_bytes()
    path.write_bytes(data[: lot.randrange(len(data))])


def grow(lot, path):
    path.write_bytes(path.read_bytes() + lot.randbytes(1 + lot.randrange(40)))


def noise(lot, path):
    path.write_bytes(lot.randbytes(path.stat().st_size))


def zeros(lot, path):
    """What a crash of the machine leaves where the file system had not written yet."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(lot, path):
    path.unlink()


def folder(lot, path):
    path.unlink()
    path.mkdir()


def dangling(lot, path):
    path.unlink()
    path.symlink_to("nowhere")


def older(lot, path):
    """The file of the checkpoint before."""
    shutil.copy(path.parent.with_name("step-000001") / path.name, path)


def change(lot, path):
    """Any value of state.json for another, its own checksum as well."""
    at = json.loads((path.parent / "state.json").read_text())
    top, holder = at, None
    while isinstance(at, dict | list) and at:
        key = lot.choice(list(at)) if isinstance(at, dict) else lot.randrange(len(at))
        holder, at = at, at[key]
    values = [None, True, 7, -1, 2**70, 0.5, float("nan"), "x", [], {}, [[]], {"a": 1}]
    holder[key] = lot.choice([v for v in values if v != at])
    (path.parent / "state.json").write_text(json.dumps(top))


def drop(lot, path):
    """A field of state.json."""
    state = json.loads((path.parent / "state.json").read_text())
    del state[lot.choice(list(state))]
    (path.parent / "state.json").write_text(json.dumps(state))


DAMAGES = (flip, flip, cut, grow, noise, zeros, remove, folder, dangling, older, change, change, change, drop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        checkpoint.save(made, step, tensors(step), STATE | {"prompt_position": 64 * step})
    checkpoint.mark_best(made, made / "step-000002")
    return made


def test_60_damaged_checkpoints(tmp_path, whole):
    for seed in range(60):
        lot = random.Random(seed)
        damage = DAMAGES[seed % len(DAMAGES)]
        place = tmp_path / str(seed)
        shutil.copytree(whole, place, symlinks=True)
        hit = lot.choice(sorted((place / "step-000002").iterdir()))
        damage(lot, hit)
        said = []
        path, found, state = checkpoint.latest(place, said.append)
        context = f"{seed}: {damage.__name__} {hit.name}: {said}"
        if damage is grow and hit.name == "state.json" and not said:  # white space alone
            continue
        assert path.name == "step-000001" and state["prompt_position"] == 64, context
        assert all(torch.equal(found[k], v) for k, v in tensors(1).items()), context
        assert len(said) == 1 and "step-000002" in said[0] and len(said[0]) < 700 and "\n" not in said[0], context
        # The run goes on from there, and saves the step again over what is damaged.
        again = checkpoint.save(place, 2, tensors(2), STATE)
        checkpoint.prune(place, 1, again)
        assert checkpoint.latest(place, pytest.fail)[0] == again and checkpoint.load(place / "best")[1]["step"] == 2, (
            context
        )

"""What many processes need, tested in one: shares, dealt micro-batches, dummies, checkpoints in parts. See test_scale.py."""

import numpy as np
import pytest
import torch
from fakes import CopyTask, ScriptedEngine, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast import config_file, objective
from amft_fast.config import ObjectiveConfig, TrainConfig
from amft_fast.data.batch import FIELDS, deal, micro_batches, padded_groups
from amft_fast.engine import world as distributed
from amft_fast.engine.local import LocalEngine
from amft_fast.engine.parts import Part, Tensors
from amft_fast.engine.world import World
from amft_fast.errors import UserError
from amft_fast.interfaces import Sampling
from amft_fast.model.policy import Policy
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder
from amft_fast.run import checkpoint
from amft_fast.run.build import build


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_runs_that_differ_by_at_most_one(n, size):
    shares = [World(rank, size).share(n) for rank in range(size)]
    assert [i for s in shares for i in s] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 5), st.integers(20, 90))
def test_dealt_micro_batches_are_equally_many_within_the_bound_and_hold_everything_once(lengths, ranks, bound):
    """Padded ones; test_packing.py has the packed."""
    shares = deal(lengths, bound, ranks)
    assert len({len(s) for s in shares}) == 1 and len(shares) == ranks
    groups = [g for share in shares for g in share]
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert len(shares[0]) == -(-len(padded_groups(lengths, bound)) // ranks), "no more rounds than needed"
    for g in groups:
        assert len(g) <= 1 or len(g) * max(lengths[i] for i in g) <= bound


def test_dealt_micro_batches_are_balanced():
    """17 sequences of 10 tokens, 80 a micro-batch: 8 + 8 + 1 for one rank, but no more than 5 at once for two."""
    assert max(len(g) for share in deal([10] * 17, 80, 2) for g in share) == 5


def test_dummies_weigh_nothing(checkpoint_folder):
    """One sequence for three ranks, with every field a loss can have."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    policy = Policy(model, ObjectiveConfig(kl_coef=0.1, tis_cap=2.0), with_value=True)
    engine = LocalEngine(policy, TrainConfig())
    fields = {"behavior_logprobs": -1.0, "old_logprobs": -1.5, "ref_logprobs": -2.0, "advantages": 1.0, "returns": 1.0}
    one = objective.demo_sequence([2, 5, 3], [6, 7, 1]).with_fields(**fields, temperature=0.7)
    rl = objective.weigh_rl([one], 0.5, 3, policy.objective, value_coef=0.1)
    own, *dummies = [micro_batches(rl, 100, False, rank=r, ranks=3) for r in range(3)]
    assert own[0].members == [0] and engine.backward(own[0]).sums[0] != 0
    engine.take_gradient()
    for (dummy,) in dummies:
        assert dummy.members == [] and dummy.input_ids.numel() == 1 and dummy.fields.keys() == own[0].fields.keys()
        out = engine.backward(dummy)
        assert not out.sums.any() and not out.maxes.any()
    assert not any(g.grad.any() for g in engine.all_groups)
    assert micro_batches([], 100, False, rank=1, ranks=3) == []


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*FIELDS, "values", "token_weight"])
def test_a_dummy_carries_any_field_of_the_others(name, packed):
    """Two sequences for four ranks, one of which has the field: whatever the loss reads, and what is read before it."""
    plain = objective.demo_sequence([2, 5, 3], [6, 7, 1])
    with_it = objective.demo_sequence([2, 5], [6, 1]).with_fields(**{name: 0.5})
    owns = [micro_batches([plain, with_it], 6, packed, torch.float64, rank=r, ranks=4) for r in range(4)]
    assert sorted(i for (b,) in owns for i in b.members) == [0, 1]
    dummies = [b for (b,) in owns if not b.members]
    assert len(dummies) == 2
    for dummy in dummies:
        assert dummy.fields.keys() == ({name} & FIELDS.keys())
        assert dummy.counts == [] and dummy.rows.shape == dummy.targets.shape == (1,)
        for field in dummy.fields.values():
            assert field.dtype == torch.float64 and field.tolist() == [FIELDS[name]]


def test_parts_of_tensors_in_several_files_are_read_at_any_cut(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    for rank, (a, b) in enumerate([(0, 7), (7, 7), (7, 24)]):
        part = Part(whole.reshape(-1)[a:b], a, (4, 6))
        checkpoint._write(tmp_path / f"{rank}", {"w": part} | ({"n": torch.tensor(3)} if rank == 0 else {}))
    tensors = Tensors.read(sorted(tmp_path.iterdir()))
    assert torch.equal(tensors["w"], whole) and tensors["n"] == 3 and set(tensors) == {"w", "n"}
    for start, size in ((0, 24), (5, 4), (6, 1), (7, 17), (23, 1), (3, 0)):
        assert torch.equal(tensors.part("w", start, size), whole.reshape(-1)[start : start + size])
    with pytest.raises(ValueError, match="w: the files hold 17 of 24 elements"):
        Tensors.read([tmp_path / "2"])["w"]


def test_a_file_without_parts_holds_whole_tensors(tmp_path):
    save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "f")
    assert torch.equal(Tensors.read([tmp_path / "f"]).part("w", 2, 3), torch.arange(2.0, 5.0))


def test_shares_of_samples_are_those_of_the_whole(checkpoint_folder):
    """Prompts and seeds of a sample do not depend on who draws it, also where a group is cut."""
    encoder = Encoder(AutoTokenizer.from_pretrained(checkpoint_folder))
    task = CopyTask(max_turns=2)

    def draw(only=None):
        engine = ScriptedEngine([[5, 1]] * 50)
        samples = episodes.run(
            engine, task, task.prompts("train"), encoder, Sampling(stop_token_ids=(1,)), num_generations=3,
            max_new_tokens=4, seed_parts=(0, "x"), only=only,
        )  # fmt: skip
        return samples, {r.seed for r in engine.asked}

    samples, seeds = draw()
    parts = [draw(World(rank, 5).share(12)) for rank in range(5)]
    assert [s for part, _ in parts for s in part] == samples
    assert set().union(*(s for _, s in parts)) == seeds and sum(len(s) for _, s in parts) == len(seeds)
    assert draw(range(0)) == ([], set())


def test_several_processes_need_the_engine_for_them(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = config_file.load(None, ["--model.path", str(make_checkpoint(tmp_path)), "--run.dir", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"2 processes were started .* --engine.kind deepspeed"):
        build(cfg, lambda: False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT not set"):
        distributed.join(torch.device("cpu"))


def test_one_process_shares_with_nobody():
    world = World()
    x = torch.ones(2)
    assert world.sum(x) is x and world.max(x) is x and world.any(True) and not world.any(False)
    assert world.spread(3, list) == [0, 1, 2] and world.gather([1]) == [1] and world.broadcast(5) == 5
    with pytest.raises(InterruptedError):
        world.spread(1, lambda mine: (_ for _ in ()).throw(InterruptedError()))
    assert np.array_equal(world.share(4), range(4))

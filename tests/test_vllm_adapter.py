"""The real vLLM given the adapter alone: in the trainer's process and as a server, held against the trainer after each sync."""

from functools import partial

import pytest
import torch
from fakes import CopyTask, copy_run, make_checkpoint
from runs import lines
from vllm_cases import GREEDY, SAMPLED, assert_answers_as, requests

pytest.importorskip("vllm", reason="needs vLLM: make test-integration has an environment with it")

from amft_fast.config import LoraConfig, ModelConfig, VllmConfig
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.model import lora
from amft_fast.model.policy import load_model
from amft_fast.rollout import vllm
from amft_fast.rollout.vllm.setup import Setup
from amft_fast.run import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CPU = torch.device("cpu")
LORA = LoraConfig(rank=3, targets=["all-linear"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), hidden=32, head=32)


@pytest.fixture(scope="module", params=["colocate", "server"])
def pair(request, folder, tmp_path_factory):
    model = load_model(ModelConfig(path=str(folder), lora=LORA), CPU)
    cfg = VllmConfig(mode=request.param, adapter_only=True, kv_cache_bytes=16 << 20, max_num_seqs=64, call_timeout_s=60)
    weights = partial(lora.named_factors, model)
    engine = vllm.make(
        Setup(cfg, model, str(folder), CPU, tmp_path_factory.mktemp("run"), adapter=LORA, weights=weights)
    )
    yield model, engine
    engine.close()


def shake(model, seed):
    """Other factors, no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in lora.named_factors(model):
        torch.nn.init.normal_(p, std=0.3, generator=generator)


def test_after_each_of_several_syncs_it_answers_as_the_trainer(pair):
    model, engine = pair
    seen = set()
    for version in range(4):
        if version:
            shake(model, version)
        engine.sync(lora.named_factors(model), version)
        got = assert_answers_as(engine, model, requests(6))
        assert {c.weight_version for c in got} == {version}
        seen.add(tuple(got[0].logprobs))
    assert len(seen) == 4
    assert len(list(engine.setup.folder.glob("adapters/rank-0/amft-*"))) == 1, "older ones are deleted"


def test_its_samples_are_of_the_adapted_policy(pair):
    model, engine = pair
    shake(model, 11)
    engine.sync(lora.named_factors(model), 11)
    asked = requests(12)
    for r, c in zip(asked, engine.generate(asked, SAMPLED)):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]])
        with torch.no_grad():
            logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)[len(r.prompt_ids) - 1 :]
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), want, atol=2e-4, rtol=1e-3)


def test_a_factor_that_is_missing_is_named_and_a_whole_adapter_heals(pair):
    model, engine = pair
    factors = [x for x in lora.named_factors(model) if "layers.1.mlp.up_proj" not in x[0]]
    with pytest.raises(
        UserError, match=r"2 factors are missing, the first is base_model\.model\.model\.layers\.1\.mlp\.up_"
    ):
        engine.sync(factors, 20)
    with pytest.raises(RolloutFailure):
        engine.generate(requests(3), GREEDY)
    engine.sync(lora.named_factors(model), 21)
    assert {c.weight_version for c in engine.generate(requests(3), GREEDY)} == {21}


def test_a_server_that_was_killed_comes_back_with_the_adapter(pair):
    model, engine = pair
    if engine.setup.cfg.mode != "server":
        return
    engine.sync(lora.named_factors(model), 30)
    want = engine.generate(requests(6), GREEDY)
    engine.fleet[0].process.stop()
    got = engine.generate(requests(6), GREEDY)
    assert [c.token_ids for c in got] == [c.token_ids for c in want] and engine.fleet[0].restarts == 1


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_run_learns_with_the_adapter_alone(folder, tmp_path, mode):
    """And is resumed: every step's rollouts have the log-probs that the trainer finds."""
    flags = [
        *("--model.lora.rank", "8", "--train.lr", "0.02", "--train.steps", "6", "--train.method", "fixed"),
        *("--rollout.engine", "vllm", "--rollout.vllm.mode", mode, "--rollout.vllm.adapter_only", "true"),
        *("--rollout.vllm.kv_cache_bytes", str(16 << 20), "--checkpoint.every", "3"),
    ]
    cfg = copy_run(tmp_path / "run", folder, *flags)
    assert launch.train(cfg, False, CopyTask()) == 0
    records = lines(tmp_path / "run")
    assert len(records) == 6 and all(r["mismatch_max"] < 1e-3 for r in records)
    cfg = copy_run(tmp_path / "run", folder, *flags, "--train.steps", "8")
    assert launch.train(cfg, True, CopyTask()) == 0
    assert all(r["mismatch_max"] < 1e-3 for r in lines(tmp_path / "run")[6:])

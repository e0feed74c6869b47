"""The real vLLM inside the trainer's process (mode colocate on a CPU): weights synchronised in place, samples, refusals."""

import pytest
import torch
from fakes import make_checkpoint
from transformers import AutoModelForCausalLM
from vllm_cases import GREEDY, SAMPLED, assert_answers_as, named, requests, shake

pytest.importorskip("vllm", reason="needs vLLM: make test-integration has an environment with it")

from amft_fast.config import VllmConfig
from amft_fast.errors import RolloutFailure, UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout import vllm
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.rollout.vllm.setup import Setup

pytestmark = pytest.mark.integration


# Heads of 8 are padded to the 32 that vLLM's CPU attention wants.
@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), tie=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cfg = VllmConfig(bucket_bytes=4096, call_timeout_s=30, kv_cache_bytes=16 << 20)
    setup = Setup(cfg, model, str(folder), torch.device("cpu"), folder)
    engine = vllm.make(setup)
    with pytest.raises(RolloutFailure, match="no whole set of weights"):
        engine.generate(requests(3), GREEDY)
    engine.sync(named(model), 0)
    yield model, engine
    engine.close()


def test_after_each_of_several_syncs_greedy_tokens_are_the_trainers(pair):
    model, engine = pair
    seen = set()
    for version in range(1, 5):
        shake(model, version)
        engine.sync(named(model), version)
        got = assert_answers_as(engine, model, requests(6))
        assert {c.weight_version for c in got} == {version} and engine.target.weight_version() == str(version)
        seen.add(tuple(got[0].token_ids) + tuple(got[-1].token_ids))
    assert len(seen) > 1, "the syncs must have changed something"


def test_logprobs_are_those_of_the_distribution_sampled_from(pair):
    model, engine = pair
    engine.sync(named(model), 9)
    asked = requests(24)
    got = engine.generate(asked, SAMPLED)
    for r, c in zip(asked, got):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]])
        logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)[len(r.prompt_ids) - 1 :]
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), want.detach(), atol=2e-4, rtol=1e-3)
        assert c.finish_reason == ("stop" if c.token_ids[-1] == 1 else "length")
        assert 1 not in c.token_ids[:-1] and 1 <= len(c.token_ids) <= 12
    assert len({tuple(c.token_ids) for c in got}) > 12


def test_a_groups_samples_depend_on_its_seed_alone(pair):
    _, engine = pair
    asked = requests(24)
    everything = [c.token_ids for c in engine.generate(asked, SAMPLED)]
    alone = [c.token_ids for c in engine.generate(asked[8:16], SAMPLED)]
    assert alone == everything[8:16]
    other = [Request(r.prompt_ids, r.seed + 10**6, r.max_new_tokens) for r in asked]
    assert [c.token_ids for c in engine.generate(other, SAMPLED)] != everything


def test_a_sync_with_a_tensor_missing_is_refused_and_the_next_whole_one_heals(pair):
    model, engine = pair
    shake(model, 77)
    with pytest.raises(UserError, match=r"expected model\.layers\.1\.self_attn\.k_proj\.weight"):
        engine.sync([x for x in named(model) if "layers.1.self_attn.k_proj" not in x[0]], 20)
    with pytest.raises(RolloutFailure, match="no whole set of weights"):
        engine.generate(requests(3), GREEDY)
    engine.sync(named(model), 21)
    got, want = engine.generate(requests(6), GREEDY), TransformersEngine(model).generate(requests(6), GREEDY)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert got[0].weight_version == 21


def test_a_part_of_a_fused_module_that_the_trainer_does_not_know_of_is_found_by_the_worker(pair, monkeypatch):
    """q without k and v: vLLM itself would load it and say nothing."""
    model, engine = pair
    wire = engine.wire
    left = [s for s in wire.sources if "layers.0.self_attn.k_proj" not in s.name]
    monkeypatch.setattr(wire, "sources", left)
    monkeypatch.setattr(wire, "specs", [s for s in wire.specs if "layers.0.self_attn.k_proj" not in s.name])
    engine.sync_weights.close()
    with pytest.raises(UserError, match=r"1 modules .* model\.layers\.0\.self_attn\.qkv_proj"):
        engine.sync([x for x in named(model) if "layers.0.self_attn.k_proj" not in x[0]], 30)
    monkeypatch.undo()
    engine.sync_weights.close()
    engine.sync(named(model), 31)
    got, want = engine.generate(requests(6), GREEDY), TransformersEngine(model).generate(requests(6), GREEDY)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]


def test_a_prompt_that_leaves_no_room_is_refused_and_answers_are_cut_to_what_fits(pair):
    _, engine = pair
    with pytest.raises(UserError, match="max_model_len 256 leaves no room for an answer to a prompt of 300 tokens"):
        engine.generate([Request((5,) * 300, 1, 4)], GREEDY)
    (cut,) = engine.generate([Request((5,) * 250, 1, 40)], Sampling(1.0, stop_token_ids=()))
    assert len(cut.token_ids) == 6 and cut.finish_reason == "length"

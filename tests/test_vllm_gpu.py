"""Twins of the CPU's vLLM tests on GPUs: weights over CUDA IPC to a colocated engine, over NCCL to a server."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from vllm_cases import GREEDY, named, requests, shake

pytest.importorskip("vllm", reason="needs vLLM on a GPU")

from amft_fast.config import VllmConfig
from amft_fast.rollout import vllm
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.rollout.vllm.setup import Setup

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def checkpoint(folder, tie):
    """Heads of 64, which every CUDA attention takes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=64, max_position_embeddings=256, tie_word_embeddings=tie, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    return checkpoint(tmp_path / "model", request.param)


def check(model, engine, version):
    """The engine scores its own greedy answers as the trainer does, within what bf16 leaves."""
    asked = requests(6)
    judge = copy.deepcopy(model).float()
    for r, c in zip(asked, engine.generate(asked, GREEDY)):
        assert c.weight_version == version
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]], device="cuda")
        logp = judge(ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        drawn = logp.gather(-1, ids[0, len(r.prompt_ids) :, None]).squeeze(-1)
        assert (drawn - logp.max(-1).values).abs().max() < 0.1, "another token than the trainer's likeliest"
    return TransformersEngine(model).generate(asked, GREEDY)


def settings(folder, model, **cfg):
    cfg = VllmConfig(bucket_bytes=1 << 16, kv_cache_bytes=64 << 20, call_timeout_s=60, **cfg)
    return Setup(cfg, model, str(folder), torch.device("cuda"), folder, weights=lambda: named(model))


def several_syncs(model, engine):
    seen = set()
    for version in range(4):
        shake(model, version)
        engine.sync(named(model), version)
        seen.add(tuple(check(model, engine, version)[0].token_ids))
    assert len(seen) > 1, "the syncs must have changed something"


def test_ipc_brings_every_sync_to_a_colocated_engine_that_slept_in_between(model, tmp_path):
    engine = vllm.make(settings(tmp_path / "model", model, mode="colocate", backend="ipc", gpu_memory_utilization=0.2))
    try:
        several_syncs(model, engine)
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for the trainer and one for the server")
def test_nccl_brings_every_sync_to_a_server(model, tmp_path):
    engine = vllm.make(settings(tmp_path / "model", model, mode="server", backend="nccl", devices=["1"]))
    try:
        several_syncs(model, engine)
    finally:
        engine.close()

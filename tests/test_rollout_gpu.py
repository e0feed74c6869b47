"""Rollouts on a GPU: the attention kernel against fp64, the engine and its captured steps against transformers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout import graphs
from amft_fast.rollout.transformers import TransformersEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SIZES = {
    "vocab_size": 5000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# Largest difference of a log-prob; that of bf16 is its own rounding through three layers, as the trainer's forward has it.
OFF = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def make(dtype, config=Qwen2Config):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config(**SIZES), dtype=dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3 if p.dim() >= 2 else 1)
    return model


def asked(n):
    """Prompts of several lengths, each for four rows; answers from 3 to 40 tokens."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 5000, size).tolist()) for size in (5, 130, 17, 64, 300)]
    return [Request(prompts[i // 4 % 5], 100 + i, 3 + 7 * i % 38) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, key_heads, size", [(12, 2, 128), (14, 2, 64), (8, 8, 80), (4, 1, 256)])
def test_attention_is_its_definition(heads, key_heads, size, dtype):
    from amft_kernels.decode_attention import decode_attention

    torch.manual_seed(0)
    rows, room, capacity = 37, 40, 531
    query = torch.randn(rows, heads + key_heads, size, device="cuda", dtype=dtype)[:, :heads]
    keys, values = (torch.randn(room, key_heads, capacity, size, device="cuda", dtype=dtype) for _ in range(2))
    position = torch.randint(0, capacity, (rows,), device="cuda")
    position[0], position[1] = 0, capacity - 1
    hidden = torch.arange(capacity, device="cuda")[None] > position[:, None]
    # What lies behind a row's end must not be read.
    keys[:rows].masked_fill_(hidden[:, None, :, None], float("nan"))
    values[:rows].masked_fill_(hidden[:, None, :, None], float("nan"))
    got = decode_attention(query, keys, values, position, size**-0.5)
    wide = [x[:rows].double().nan_to_num().repeat_interleave(heads // key_heads, 1) for x in (keys, values)]
    bias = torch.zeros(rows, 1, 1, capacity, device="cuda", dtype=torch.float64).masked_fill_(
        hidden[:, None, None], -torch.inf
    )
    want = F.scaled_dot_product_attention(query.double()[:, :, None], *wide, attn_mask=bias).flatten(1)
    off = (got.double() - want).norm() / want.norm()
    assert off < (1e-5 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config], ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_logprobs_are_those_of_transformers(dtype, config):
    """The reference is the same weights in fp64."""
    model = make(dtype, config)
    engine = TransformersEngine(model, max_batch=12)
    requests = asked(40)
    found = engine.generate(requests, Sampling())
    assert engine.explain()[0] == "decoder", engine.explain()
    assert [len(c.token_ids) for c in found] == [r.max_new_tokens for r in requests]
    exact, off = make(dtype, config).double(), []
    for r, c in zip(requests, found):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]], device="cuda")
        with torch.no_grad():
            logp = exact(ids).logits[0, :-1].log_softmax(-1)[len(r.prompt_ids) - 1 :].cpu()
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        off.append((torch.tensor(c.logprobs) - want).abs().max().item())
    assert max(off) < OFF[dtype], off


def test_captured_steps_are_the_steps(monkeypatch):
    model = make(torch.bfloat16)
    captured = []
    capture = graphs.Graphs._capture
    monkeypatch.setattr(graphs.Graphs, "_capture", lambda self, rows: (captured.append(rows), capture(self, rows)))
    got = TransformersEngine(model, max_batch=24).generate(asked(60), Sampling())
    assert captured
    monkeypatch.setattr(graphs, "EAGER", 10**9)
    want = TransformersEngine(model, max_batch=24).generate(asked(60), Sampling())
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert [c.logprobs for c in got] == [c.logprobs for c in want]


def test_draws_are_those_of_a_cpu():
    """Same weights, same streams: in fp32 nearly every answer is the CPU's, token by token."""
    model = make(torch.float32)
    requests = asked(40)
    got = TransformersEngine(model).generate(requests, Sampling())
    want = TransformersEngine(model.cpu()).generate(requests, Sampling())
    same = [a.token_ids == b.token_ids for a, b in zip(got, want)]
    assert sum(same) >= 36, same

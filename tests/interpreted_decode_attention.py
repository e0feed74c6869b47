"""The decode kernel in Triton's interpreter: run by `test_decode_attention.py`, in a process of its own.

`TRITON_INTERPRET` must be set before Triton is imported. fp32 and fp16 only: interpreted `tl.dot` on bf16 operands returns
garbage.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from amft_kernels.decode_attention import decode_attention
from transformers import AutoModelForCausalLM, Qwen3Config

from amft_fast.interfaces import Request, Sampling
from amft_fast.rollout.decoder import DecoderReader
from amft_fast.rollout.transformers import TransformersEngine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group,size", [(1, 64), (3, 64), (7, 24)])
def test_every_row_sees_its_own_keys(group, size, dtype):
    torch.manual_seed(0)
    heads, capacity, positions = 2, 150, [0, 63, 64, 130, 149]
    keys, values = (torch.randn(7, heads, capacity, size, dtype=dtype) for _ in range(2))
    wide = torch.randn(len(positions), heads * group + heads, size, dtype=dtype)
    for row, position in enumerate(positions):  # what lies behind a row's end counts for nothing
        keys[row, :, position + 1 :] = values[row, :, position + 1 :] = 60000.0
    query = wide[:, : heads * group]
    got = decode_attention(query, keys, values, torch.tensor(positions), size**-0.5)
    for row, position in enumerate(positions):
        k, v = (x[row, :, : position + 1].repeat_interleave(group, 0).double() for x in (keys, values))
        weights = (torch.einsum("hd,hld->hl", query[row].double(), k) * size**-0.5).softmax(-1)
        want = torch.einsum("hl,hld->hd", weights, v).flatten()
        torch.testing.assert_close(got[row].double(), want, atol=1e-5 if dtype == torch.float32 else 5e-3, rtol=0)


def test_the_engine_draws_the_same_with_the_kernel(monkeypatch):
    torch.manual_seed(0)
    config = Qwen3Config(
        **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
        **dict(zip(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), (4, 2, 2))),
        head_dim=8,
        vocab_size=40,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    asked = [Request((2, 5, 3, 4)[: 2 + i % 3], i, 4) for i in range(5)]
    want = TransformersEngine(model).generate(asked, Sampling())
    made = DecoderReader.__init__

    def by_kernel(self, *args):
        made(self, *args)
        self.by_kernel = True

    monkeypatch.setattr(DecoderReader, "__init__", by_kernel)
    got = TransformersEngine(model, max_batch=3).generate(asked, Sampling())
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    for a, b in zip(got, want):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)

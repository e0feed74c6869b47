"""Rollouts by our own loop over a model's layers: equal to transformers' forward, whatever rows come and go, and refused where
a model is of another kind."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from amft_fast.config import LoraConfig
from amft_fast.interfaces import Request, Sampling
from amft_fast.model import lora
from amft_fast.model.layers import checkpoint_layers
from amft_fast.ops import bf16_is_faster
from amft_fast.rollout import cache as cache_module
from amft_fast.rollout import decoder, graphs, packed
from amft_fast.rollout.cache import Sections, StaticCache
from amft_fast.rollout.decoder import Decoder, DecoderReader
from amft_fast.rollout.sampling import BLOCK, sample_tokens
from amft_fast.rollout.transformers import TransformersEngine

pytestmark = pytest.mark.cpu_isa

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**SIZES, **kw),
    "llama with biases": lambda **kw: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **kw),
    "llama 3's rope": lambda **kw: LlamaConfig(**SIZES, rope_parameters=LLAMA3, **kw),
    "mistral": lambda **kw: MistralConfig(**SIZES, sliding_window=None, **kw),
    "qwen2": lambda **kw: Qwen2Config(**SIZES, **kw),
    "qwen3": lambda **kw: Qwen3Config(**SIZES, **kw),
    "one head a group": lambda **kw: LlamaConfig(**(SIZES | {"num_key_value_heads": 6}), **kw),
}


def make(config, dtype=torch.float32, factor=4):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # far from uniform, norms and biases too
            p.add_(torch.randn_like(p) * 0.1)
            p.mul_(factor if p.dim() >= 2 else 1)
    return model


def asked(n, length=9):
    """Prompts of four lengths, some twice; answers of two lengths."""
    prompts = [(2, 5, 3), (2, 6, 7, 8, 3, 4, 4), (2, 9), (2, 6, 7, 8, 3, 4, 4), (9, 8, 7, 6, 5)]
    return [Request(prompts[i % 5], 100 + i, length - 4 * (i % 3 == 0)) for i in range(n)]


def engine_by(model, own_loop, monkeypatch, **kw):
    with monkeypatch.context() as m:
        if not own_loop:
            m.setattr(decoder, "FAMILIES", ())
        engine = TransformersEngine(model, **kw)
        assert engine.explain()[0] == ("decoder" if own_loop else "transformers' forward")
    return engine


# ------------------------------------------------------------------------------------------------------------ the layers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers(family, tied, monkeypatch):
    model = make(FAMILIES[family](tie_word_embeddings=tied))
    engine = engine_by(model, True, monkeypatch)
    for r, c in zip(asked(7), engine.generate(asked(7), Sampling())):
        ids = torch.tensor([[*r.prompt_ids, *c.token_ids]])
        logp = model(ids).logits[0, :-1].log_softmax(-1)[len(r.prompt_ids) - 1 :]
        want = logp.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(c.logprobs), want.detach(), atol=1e-5, rtol=1e-5)
        entropy = torch.special.entr(logp.detach().double().exp()).sum().item()
        assert abs(c.entropy - entropy) < 1e-4 * len(c.token_ids)


@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_draw_the_same_and_are_given_back(family, dtype, monkeypatch):
    """Weights of any size, packed: fp32 log-probs as without; in bf16 within its rounding. What was packed is of one call. A
    CPU without products in bf16 packs nothing."""
    model = make(FAMILIES[family](), dtype, factor=1)
    plain = TransformersEngine(model).generate(asked(7), Sampling())
    monkeypatch.setattr(packed, "PAYS", {dtype: (0, 1, 64)})
    products = []
    call = packed.Packed.__call__
    monkeypatch.setattr(packed.Packed, "__call__", lambda self, x: (products.append(self), call(self, x))[1])
    engine = engine_by(model, True, monkeypatch)
    # A layer's q, k, v, o, down, and gate and up, together where neither has a bias; the head where its products make logits.
    head = dtype == torch.float32 or bf16_is_faster()
    want = 3 * (7 if family == "llama with biases" else 6) + head if packed.served(dtype) else 0
    assert len(set(products)) == want
    close, shared = 1e-5 if dtype == torch.float32 else 0.1, 0
    for a, b in zip(engine.generate(asked(7), Sampling()), plain):
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), len(b.token_ids))
        assert np.allclose(a.logprobs[:same], b.logprobs[:same], atol=close, rtol=0)
        shared += same
    drawn = sum(len(c.token_ids) for c in plain)
    assert shared == drawn if dtype == torch.float32 else shared > drawn / 2
    assert engine._decoder.layers == [] and engine._decoder.head_packed is None
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    moved = engine.generate(asked(7), Sampling())
    monkeypatch.undo()
    again = TransformersEngine(model).generate(asked(7), Sampling())
    if dtype == torch.float32:
        assert [c.token_ids for c in moved] == [c.token_ids for c in again], "new weights are packed anew"


def test_only_large_weights_are_packed_for_few_rows():
    small, large = torch.zeros(8, 8), torch.zeros(1 << 10, 1 << 9)
    assert (
        not packed.Packed(small).takes(16)
        and packed.Packed(large).takes(16)
        and packed.Packed(large[:512], large[512:]).takes(64)
    )
    assert not packed.Packed(large).takes(65) and not packed.Packed(large.double()).takes(16)
    assert not packed.Packed(large.to("meta")).takes(16)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 64])
def test_samples_are_the_same_by_either_way_and_whoever_joins(max_batch, monkeypatch):
    """With few places rows are replaced as they end, by others of other lengths."""
    model = make(FAMILIES["qwen3"](), torch.float64)
    sampling = Sampling(1.0, stop_token_ids=(1, 7))
    want = engine_by(model, False, monkeypatch).generate(asked(17), sampling)
    got = engine_by(model, True, monkeypatch, max_batch=max_batch).generate(asked(17), sampling)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert {c.finish_reason for c in want} == {"stop", "length"}
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_row_that_ends_is_replaced_at_once(monkeypatch):
    """Of three places none is empty while requests wait, and all rows of a group read their prompt once."""
    model, seen, read = make(FAMILIES["llama"]()), [], []
    engine = engine_by(model, True, monkeypatch, max_batch=3)
    step, prompts = DecoderReader.step, Decoder.read
    monkeypatch.setattr(DecoderReader, "step", lambda self, tokens: (seen.append(len(tokens)), step(self, tokens))[1])
    monkeypatch.setattr(Decoder, "read", lambda self, p, *more: (read.extend(p), prompts(self, p, *more))[1])
    requests = [Request((2, 5, 3) if i < 7 else (2, 4), i, 3 + i % 4) for i in range(12)]
    engine.generate(requests, Sampling())
    assert seen[: -seen[::-1].index(3)] == [3] * (len(seen) - seen[::-1].index(3))  # full until the last have begun
    assert sum(seen) == sum(r.max_new_tokens - 1 for r in requests)
    assert sorted(read) == [(2, 4), (2, 5, 3)]


def test_adapters_are_part_of_the_layers(monkeypatch):
    pytest.importorskip("peft")
    model = lora.add(make(FAMILIES["qwen2"](), torch.float64), LoraConfig(rank=2))
    with torch.no_grad():
        for layer in lora.layers(model).values():
            for p in lora.factors(layer).values():
                p.normal_()
    want = engine_by(model, False, monkeypatch).generate(asked(6), Sampling())
    assert [c.token_ids for c in engine_by(model, True, monkeypatch).generate(asked(6), Sampling())] == [
        c.token_ids for c in want
    ]


def test_weights_are_the_models_own_also_when_they_move(monkeypatch):
    """An update engine gives parameters new memory and writes into it; nothing of the old weights may be left."""
    model = make(FAMILIES["qwen3"](), torch.float64)
    engine = engine_by(model, True, monkeypatch)
    before = engine.generate(asked(5), Sampling())
    for p in model.parameters():
        p.data = p.data.clone().mul_(-0.7)
    after = engine.generate(asked(5), Sampling())
    assert [c.token_ids for c in after] == [
        c.token_ids for c in engine_by(model, False, monkeypatch).generate(asked(5), Sampling())
    ]
    assert [c.token_ids for c in before] != [c.token_ids for c in after]


def test_logits_are_fp32_where_weights_are_bf16(monkeypatch):
    """bf16 logits of size 16 are off by 0.06: the log-probs must be those of the fp32 product, by either way."""
    model = make(FAMILIES["llama"](), torch.bfloat16, factor=2)
    for own_loop in (True, False):
        (got,) = engine_by(model, own_loop, monkeypatch).generate([Request((2, 5, 3), 4, 1)], Sampling())
        with torch.no_grad():
            hidden = model.model(torch.tensor([[2, 5, 3]])).last_hidden_state[0, -1].float()
        logits = hidden @ model.lm_head.weight.float().T
        want = logits.log_softmax(-1)[got.token_ids[0]]
        assert got.logprobs[0] == pytest.approx(
            float(want.detach()), abs=0.1 if own_loop else 1e-5
        )  # sums differ in bf16 layers
        assert abs(float(logits.bfloat16().float().log_softmax(-1)[got.token_ids[0]] - want)) > 1e-4


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "config,why",
    [
        (Gemma2Config(**SIZES), "type gemma2"),
        (MistralConfig(**SIZES, sliding_window=4), "window"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "kind dynamic",
        ),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "MLP"),
    ],
)
def test_other_models_are_read_by_transformers(config, why):
    model = make(config)
    engine = TransformersEngine(model)
    got = engine.generate(asked(4), Sampling(0.0))
    way, reason = engine.explain()
    assert way == "transformers' forward" and why in reason
    for r, c in zip(asked(4), got):
        ids = torch.tensor([r.prompt_ids])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(c.token_ids)
        )
        assert c.token_ids == want[0, len(r.prompt_ids) :].tolist()


def test_a_model_whose_forward_is_another_is_found_out(capsys):
    """A Llama by its configuration, with an MLP of its own."""
    model = make(FAMILIES["llama"]())
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(torch.tanh(mlp.gate_proj(x)))
    engine = TransformersEngine(model)
    assert engine.explain()[0] == "transformers' forward" and "log-probs differ" in engine.explain()[1]
    assert "transformers' own forward pass is taken" in capsys.readouterr().err


def test_the_choice_is_made_as_the_model_reads_and_leaves_it_as_it_was():
    """Recomputing layers in training mode transformers would keep no cache."""
    model = make(FAMILIES["llama"]())
    checkpoint_layers(model)
    engine = TransformersEngine(model)
    assert model.training and engine.explain() == ("decoder", "its layers are llama's") and model.training


# ------------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("section", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_other_lengths_attend_to_their_own_keys(section, dtype, monkeypatch):
    monkeypatch.setattr(cache_module, "SECTION", section)
    lengths, heads, groups, size = [3, 9, 9, 9, 1, 7], 2, 3, 4
    torch.manual_seed(0)
    cache = StaticCache(1, (8, heads, 12, size), torch.zeros(0, dtype=dtype))
    for x in (*cache.keys, *cache.values):
        x.normal_()
    q = torch.randn(len(lengths), heads * groups, size, dtype=dtype)
    got = Sections(lengths, cache, 0.5).attend(0, q)
    for row, length in enumerate(lengths):
        k, v = (x[0][row, :, :length].repeat_interleave(groups, 0).double() for x in (cache.keys, cache.values))
        weights = (torch.einsum("hd,hld->hl", q[row].double(), k) * 0.5).softmax(-1)
        want = torch.einsum("hl,hld->hd", weights, v).flatten()
        torch.testing.assert_close(got[row].double(), want, atol=1e-12 if dtype == torch.float64 else 0.03, rtol=0)


def test_a_cache_grows_and_its_rows_move():
    cache = StaticCache(2, (4, 1, 3, 2), torch.zeros(0))
    for x in (*cache.keys, *cache.values):
        x.normal_()
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    cache.lengths[:] = [3, 2, 3, 1]
    assert cache.reserve(3) is False and cache.reserve(5) is True and cache.capacity == 5
    cache.move(np.array([0, 3, 2]))
    for x, old in zip((*cache.keys, *cache.values), before):
        assert x.shape == (4, 1, 5, 2) and torch.equal(x[0, :, :3], old[0]) and torch.equal(x[1, :, :1], old[3, :, :1])
    assert cache.lengths[:3].tolist() == [3, 1, 3]
    cache.append(0, cache.slots(torch.tensor([3, 1, 3])), torch.ones(3, 1, 2), torch.ones(3, 1, 2))
    assert cache.keys[0][1, 0, 1].tolist() == [1, 1] and torch.equal(cache.keys[0][1, :, :1], before[0][3, :, :1])


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("vocabulary", [4 * BLOCK, 4 * BLOCK + 1, 9 * BLOCK, 9 * BLOCK + 3])
def test_draws_of_large_vocabularies_are_the_plain_inverse_transform(vocabulary):
    torch.manual_seed(0)
    logits = 3 * torch.randn(300, vocabulary)
    logits[:, ::3] = -torch.inf
    u = torch.rand(300, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, logp, _ = sample_tokens(logits, u, Sampling())
    cdf = logits.double().softmax(-1).cumsum(-1)
    want = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1).clamp(max=vocabulary - 1)
    edge = (cdf.gather(1, tokens[:, None]).squeeze(1) - u * cdf[:, -1]).abs() < 1e-6  # fp32 probabilities may step over
    assert ((tokens == want) | edge).all() and (tokens == want).float().mean() > 0.98
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))
    assert torch.isfinite(logp).all()


# --------------------------------------------------------------------------------------------------------------- graphs


class StandInGraph:
    """For a CUDA graph on a machine without a GPU: what is captured is done again at every replay."""

    def pool(self):
        return "pool"

    def replay(self):
        self.core()


@pytest.fixture
def stand_ins(monkeypatch):
    """Steps go by graphs that are captured after one step; gives the list of those captured."""
    capture, captured = graphs.Graphs._capture, []

    class Capture:
        def __init__(self, graph, pool):
            self.graph = graph

        def __enter__(self):
            captured.append(self.graph)

        def __exit__(self, *error): ...

    def and_keep(self, rows):
        capture(self, rows)
        self.graphs[rows].core, self.graphs[rows].rows = lambda: self.core(*self.inputs[:, :rows]), rows

    made = DecoderReader.__init__

    def with_graphs(self, decoder, room, *more):
        made(self, decoder, graphs.padded_rows(room), *more)
        self.graphs = graphs.Graphs(self._step, graphs.padded_rows(room), self.logits.device)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(graphs.Graphs, "_capture", and_keep)
    monkeypatch.setattr(graphs, "EAGER", 1)
    monkeypatch.setattr(DecoderReader, "__init__", with_graphs)
    return captured


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_captured_steps_draw_the_same_samples(stand_ins, monkeypatch):
    model = make(FAMILIES["qwen2"](), torch.float64)
    with monkeypatch.context() as m:
        m.setattr(decoder, "FAMILIES", ())
        want = TransformersEngine(model).generate(asked(13, 12), Sampling())
    got = TransformersEngine(model, max_batch=6).generate(asked(13, 12), Sampling())
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert {g.rows for g in stand_ins} <= {1, 2, 4, 8} and 8 in {g.rows for g in stand_ins}


def test_graphs_of_a_cache_that_moved_are_dropped(stand_ins):
    model = make(FAMILIES["qwen2"](), torch.float64)
    reader = DecoderReader(Decoder(model), 2, 5)
    with torch.inference_mode():
        reader.join([Request((2, 5), 0, 3), Request((2, 6), 0, 3)], [0, 1])
        for _ in range(2):
            reader.step(np.array([3, 4]))
        assert set(reader.graphs.graphs) == {2}
        reader.reserve(9)
        assert not reader.graphs.graphs and reader.cache.capacity == 9


def test_sizes_that_are_captured():
    assert [graphs.padded_rows(n) for n in (1, 2, 3, 5, 33, 64, 65, 130, 512)] == [1, 2, 4, 8, 64, 64, 128, 192, 512]

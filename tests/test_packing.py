"""Packed rows: who rides together, who sees whom, and the same numbers as sequences one by one."""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import WIDEST, rounding
from sequences import assert_same, family_of, mixed
from transformers import AutoConfig, AutoModelForCausalLM

from amft_fast.config import ModelConfig, ObjectiveConfig
from amft_fast.data import packing
from amft_fast.data.batch import collate, micro_batches
from amft_fast.doctor import installed as doctor
from amft_fast.errors import UserError
from amft_fast.model import attention
from amft_fast.model.policy import Policy, load_model

pytestmark = pytest.mark.cpu_isa
# A gradient sums over all tokens, each of them a product of at most WIDEST terms.
SAME = rounding(sum(len(s.ids) for s in mixed()) + WIDEST)


@pytest.fixture(scope="module", params=["full", "sliding"])
def model_folder(request, checkpoint_folder, tmp_path_factory):
    """The tiny model, and one whose layers see 5 tokens back."""
    if request.param == "full":
        return checkpoint_folder
    config = AutoConfig.from_pretrained(checkpoint_folder)
    config.use_sliding_window, config.sliding_window = True, 5
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    folder = tmp_path_factory.mktemp("sliding")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_policy(folder, kernel, device="cpu", dtype=torch.float32):
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernel)
    return Policy(model.to(device), ObjectiveConfig())


def gradients(policy, sequences, max_tokens, packed):
    policy.zero_grad()
    for batch in micro_batches(sequences, max_tokens, packed):
        policy(batch.to(policy.head.weight.device)).loss.backward()
    return {n: p.grad.float().clone() for n, p in policy.named_parameters()}


@pytest.mark.parametrize("max_tokens", [10**6, 40, 1])
@pytest.mark.parametrize("tiny", [attention.TINY, 0])
def test_packed_gradients_are_those_of_single_sequences(model_folder, max_tokens, tiny, monkeypatch):
    monkeypatch.setattr(attention, "TINY", tiny)
    policy = make_policy(model_folder, "amft_packed")
    assert_same(gradients(policy, mixed(), max_tokens, True), gradients(policy, mixed(), 1, False), SAME)


def test_a_dense_mask_gives_the_same_with_attention_of_transformers_own(checkpoint_folder):
    policy = make_policy(checkpoint_folder, "eager")
    assert_same(gradients(policy, mixed(), 10**6, True), gradients(policy, mixed(), 1, False), SAME)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=5)
)
def test_segments_padded_calls_and_dense_mask_say_the_same(families):
    rng = np.random.default_rng(0)
    sequences = [s for prompt, answers in families for s in family_of(rng, prompt, answers)]
    row = packing.pack([s.ids for s in sequences], [int(s.trained.argmax()) for s in sequences])
    for i, s in enumerate(sequences):
        where = row.where(i, np.arange(len(s.ids)))
        np.testing.assert_array_equal(row.input_ids[where], s.ids)
        np.testing.assert_array_equal(row.position_ids[where], np.arange(len(s.ids)))
        seen = row.layout.mask(torch.float32)[0, 0].numpy() == 0
        for t in range(len(s.ids)):
            assert set(np.flatnonzero(seen[where[t]])) == set(where[: t + 1])
    size = len(row.input_ids)
    k_index = range(size) if row.layout.k_index is None else row.layout.k_index.tolist()
    by_segments, by_calls = np.zeros((size, size), bool), np.zeros((size, size), bool)
    for (q0, q1), (k0, k1) in zip(
        *(zip(b[:-1].tolist(), b[1:].tolist()) for b in (row.layout.q_starts, row.layout.k_starts))
    ):
        for q in range(q0, q1):  # causal as the kernels have it: the last query sees the last key
            by_segments[q, k_index[k0 : k1 - (q1 - 1 - q)]] = True
    calls, back = row.layout.padded
    flat = []
    for call in calls:
        for r, (queries, keys) in enumerate(zip(call.q_index.tolist(), call.k_index.tolist())):
            for j in range(len(queries)):
                sees = range(j + 1) if call.mask is None else call.mask[r, 0, j].nonzero().flatten().tolist()
                flat.append([keys[k] for k in sees])
    for q, at in enumerate(back.tolist()):
        by_calls[q, flat[at]] = True
    np.testing.assert_array_equal(by_segments, seen)
    np.testing.assert_array_equal(by_calls, seen)
    assert row.layout.pairs == seen.sum()


def test_a_prompt_is_read_once_and_nothing_past_the_last_trained_token():
    rng = np.random.default_rng(0)
    batch = collate(family_of(rng, 100, [3, 4, 5]), [0, 1, 2], True)
    assert batch.input_ids.shape == (1, 100 + 2 + 3 + 4)
    assert batch.layout.max_k == 104 and batch.layout.max_q == 100
    padded = collate(family_of(rng, 100, [3, 4, 5]), [0, 1, 2], False)
    assert padded.input_ids.shape == (3, 104)


def log_normal(count, shared, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    while len(out) < count:
        answers = np.clip(rng.lognormal(6, 0.9, 8 if shared else 1), 8, 8000).astype(int)
        out += family_of(rng, int(rng.integers(50, 400)), list(answers))
    return out


@pytest.mark.parametrize("shared", [False, True])
def test_a_log_normal_mix_wastes_little(shared):
    sequences = log_normal(1024, shared)
    budget = 16384
    batches = micro_batches(sequences, budget, True)
    assert sorted(i for b in batches for i in b.members) == list(range(len(sequences)))
    tokens = np.array([b.input_ids.numel() for b in batches])
    assert tokens.max() <= budget
    families = {s.ids[: s.trained.argmax()].tobytes(): s.trained.argmax() for s in sequences}
    needed = sum(families.values()) + sum(len(s.ids) - s.trained.argmax() - 1 for s in sequences)
    assert 1 - needed / tokens.sum() <= 0.03  # padding, and prompts read more than once because a family was cut
    cost = tokens + np.array([b.layout.pairs for b in batches]) * 2 / packing.BREAK_EVEN
    assert 1 - cost.mean() / cost.max() <= (0.15 if shared else 0.03)  # three families of eight answers fill a row
    assert len(tokens) <= np.ceil(1.125 * tokens.sum() / budget) + 1
    again = micro_batches(sequences, budget, True)
    assert [b.members for b in again] == [b.members for b in batches]


def test_a_family_too_large_for_a_row_is_cut_and_a_long_sequence_rides_alone():
    rng = np.random.default_rng(0)
    sequences = family_of(rng, 10, [20] * 9) + family_of(rng, 300, [2])
    batches = micro_batches(sequences, 100, True)
    assert sorted(i for b in batches for i in b.members) == list(range(10))
    assert sorted(b.input_ids.numel() for b in batches)[-2] <= 100
    assert [b.members for b in batches if 9 in b.members] == [[9]]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_get_equally_many_and_equally_dear_ones(ranks):
    sequences = log_normal(256, False)
    per_rank = [micro_batches(sequences, 16384, True, rank=r, ranks=ranks) for r in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert sorted(i for batches in per_rank for b in batches for i in b.members) == list(range(256))
    for at_once in zip(*per_rank):
        costs = [b.input_ids.numel() + b.layout.pairs * 2 / packing.BREAK_EVEN for b in at_once]
        assert max(costs) <= 1.2 * min(costs)
    few = [micro_batches(sequences[:1], 16384, True, rank=r, ranks=ranks) for r in range(ranks)]
    assert [b[0].members for b in few] == [[0]] + [[]] * (ranks - 1)


# ------------------------------------------------------------------------------------------------------------- backends


def over_segments(q, k, v, starts_q, starts_k, scale, left=None):
    """Causal attention of each segment by itself, written out; `left`: keys before its own that a query sees."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = []
    for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:]):
        scores = torch.einsum("qad,kad->aqk", q[a:b], k[c:d]) * scale
        n, m = scores.shape[1:]
        sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        if left is not None:
            sees &= torch.ones(n, m, dtype=torch.bool).triu(m - n - left)
        out.append(torch.einsum("aqk,kad->qad", scores.masked_fill(~sees, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(out)


def fake_flash(monkeypatch, module, seen):
    """A kernel over segments with the public signature of flash-attn's."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **more
    ):
        assert causal and cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
        seen.append(more)
        left = more["window_size"][0] if "window_size" in more else None
        return over_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left)

    fake = types.ModuleType(module)
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, module, fake)
    return flash_attn_varlen_func


def test_a_kernel_over_segments_gets_the_right_segments(model_folder, monkeypatch):
    seen = []
    kernel = fake_flash(monkeypatch, "flash_attn", seen)
    policy = make_policy(model_folder, "amft_packed")
    wanted = gradients(policy, mixed(), 1, False)
    monkeypatch.setattr(attention, "backend", lambda *_: ("flash-attn 2", kernel, ""))
    assert_same(gradients(policy, mixed(), 10**6, True), wanted, SAME)
    assert seen[0]["dropout_p"] == 0.0


def left_of(window_size):
    assert window_size[1] == 0  # causal
    return None if window_size[0] == -1 else window_size[0]


def varlen_of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return over_segments(query, key, value, cu_seq_q, cu_seq_k, scale, left_of(window_size))


def varlen_of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return over_segments(query, key, value, cu_seq_q, cu_seq_k, scale, left_of(window_size))


@pytest.mark.parametrize("kernel", [varlen_of_2_11, varlen_of_2_13], ids=lambda k: k.__name__)
def test_torchs_own_kernel_is_called_by_the_signature_that_this_torch_has(model_folder, monkeypatch, kernel):
    """`enable_gqa` came after torch 2.11, whose kernel takes grouped heads as they are."""
    policy = make_policy(model_folder, "amft_packed")
    wanted = gradients(policy, mixed(), 1, False)
    monkeypatch.setattr(attention, "backend", lambda *_: ("torch varlen", kernel, ""))
    assert_same(gradients(policy, mixed(), 10**6, True), wanted, SAME)


@pytest.mark.parametrize(
    ("capability", "there", "name"),
    [
        ((10, 0), ("flash_attn.cute", "flash_attn"), "flash-attn 4"),
        ((9, 0), ("flash_attn_interface", "flash_attn"), "flash-attn 3"),
        ((8, 0), ("flash_attn_interface", "flash_attn"), "flash-attn 2"),
        ((8, 9), (), "torch varlen"),
        ((7, 5), ("flash_attn",), "sdpa"),
    ],
)
def test_the_choice_goes_by_what_is_there_and_says_why(capability, there, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in ("flash_attn.cute", "flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in there:
        fake_flash(monkeypatch, module, [])
    attention.backend.cache_clear()
    got, kernel, why = attention.backend("cuda", torch.bfloat16)
    attention.backend.cache_clear()
    assert got == name and (kernel is None) == (name == "sdpa")
    if capability == (8, 0):
        assert "flash-attn 3 is not for compute capability 8.0" in why
    assert attention.backend("cuda", torch.float32)[0] == "sdpa"
    attention.backend.cache_clear()


def test_doctor_names_the_attention_and_a_wanted_one_that_cannot_serve_is_an_error(checkpoint_folder):
    assert doctor.attention("cpu") == ("sdpa", "segments as padded rows; kernels over segments need a CUDA GPU")
    with pytest.raises(UserError, match=r"model.attention: flash_attention_2 cannot serve here"):
        load_model(ModelConfig(path=str(checkpoint_folder), attention="flash_attention_2"), torch.device("cpu"))


def test_models_that_mix_tokens_otherwise_are_not_packed():
    linear = types.SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    config = types.SimpleNamespace(get_text_config=lambda: linear)
    assert "linear_attention" in attention.obstacle(config)
    assert attention.choose("auto", config, torch.device("cpu"), torch.float32) == "sdpa"


def test_a_model_that_drops_the_layout_is_an_error(checkpoint_folder, monkeypatch):
    policy = make_policy(checkpoint_folder, "amft_packed")
    monkeypatch.setattr(attention, "inputs", lambda config, layout, *_: {"attention_mask": None, "amft_layout": layout})
    monkeypatch.setattr(
        policy.backbone, "forward", lambda input_ids, **_: types.SimpleNamespace(last_hidden_state=None)
    )
    with pytest.raises(UserError, match="does not hand packed rows on"):
        policy.hidden_rows(collate(mixed(), [0, 1], True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_gradients_on_a_gpu(model_folder):
    """bf16 over the kernel that is there, and fp32 over padded SDPA, against fp32 sequences one by one on the CPU."""
    wanted = gradients(make_policy(model_folder, "sdpa"), mixed(), 1, False)
    exact = gradients(make_policy(model_folder, "amft_packed", "cuda"), mixed(), 10**6, True)
    assert_same({n: g.cpu() for n, g in exact.items()}, wanted, 1e-3)
    half = gradients(make_policy(model_folder, "amft_packed", "cuda", torch.bfloat16), mixed(), 10**6, True)
    assert_same({n: g.cpu() for n, g in half.items()}, wanted, 0.1)

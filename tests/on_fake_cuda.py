"""The step on a fake CUDA device: packed bf16 forward and backward through the real Policy and update engine, probe, guard,
AdamW, old log-probs, weights out; rollouts. Run by `test_fake_cuda.py`.

A device mismatch, a wrong type, an argument that this torch lacks and a wait for the device fail here; the last tests plant
one of each and want it named.
"""

import numpy as np
import pytest
import torch
from amft_kernels import chunks, gradients, linear_logprob, linear_policy_loss
from fake_cuda import HostWaitsError, Waits, fake_cuda
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from amft_fast import objective
from amft_fast.config import ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import TokenSequence, micro_batches
from amft_fast.engine.local import LocalEngine
from amft_fast.interfaces import Request, Sampling
from amft_fast.model import attention, layers
from amft_fast.model.policy import Policy
from amft_fast.rollout import decoder
from amft_fast.rollout import transformers as transformers_engine

LAYERS = 2


def make_engine(tie=False, prepare=None, **policy):
    config = Qwen3Config(
        vocab_size=1024, hidden_size=640, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, max_position_embeddings=256, tie_word_embeddings=tie,
    )  # fmt: skip
    attention.register()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="amft_packed")
    if prepare is not None:
        layers.prepare(model, prepare, torch.device("cuda"))
    objective_cfg = ObjectiveConfig(kl_coef=0.1, entropy_coef=0.01, tis_cap=2.0, dual_clip=3.0)
    return LocalEngine(Policy(model, objective_cfg, **policy), TrainConfig(), value_lr=1e-3)


def sequences(rl: bool, value: bool = False, seed: int = 0) -> list[TokenSequence]:
    """A few families of answers to one prompt each, with every field that training sets."""
    rng, out = np.random.default_rng(seed), []
    for prompt, answers in ((4, [3, 9, 2]), (11, [5, 1]), (3, [12])):
        common = rng.integers(5, 1000, prompt)
        for n in answers:
            ids = np.concatenate([common, rng.integers(5, 1000, n)])
            s = TokenSequence(ids, np.arange(len(ids)) >= prompt)
            if not rl:
                out.append(s)
                continue
            names = ("advantages", "old_logprobs", "behavior_logprobs", "ref_logprobs", "temperature")
            fields = dict.fromkeys(names + (("returns",) if value else ()), -0.5) | {"temperature": 0.8}
            out.append(s.with_fields(**fields))
    count = sum(int(s.trained.sum()) for s in out)
    if not rl:
        return objective.weigh_sft(out, 0.3, count)
    cfg = ObjectiveConfig(entropy_coef=0.01)
    return objective.weigh_rl(out, 0.7, count, cfg, value_coef=0.5 if value else 0.0)


def one_step(engine, value=False):
    """What `Trainer.update` does at the start of a window, the utility gradient included; returns the figures' tensors."""
    halves = []
    for half in range(2):
        for batch in micro_batches(sequences(True, seed=half), 1000, True):
            engine.backward(batch, ObjectiveConfig(entropy_coef=0.0, tis_cap=2.0))
        halves.append(engine.take_gradient())
    sums, maxes = [], []
    for name, work in (("sft", sequences(False)), ("rl", sequences(True, value))):
        for batch in micro_batches(work, 60 if name == "rl" else 1000, True):
            out = engine.backward(batch)
            sums.append(out.sums)
            maxes.append(out.maxes)
        engine.end_sweep(name)
    products, clip = engine.probe(halves)
    norm = engine.step()
    return torch.stack(sums).sum(0), torch.stack(maxes).amax(0), products, clip, norm


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("value", [False, True])
def test_a_probed_step_runs_on_the_device_and_the_host_never_waits(tie, value):
    """With AdamW: torch has no fake form of its fused SGD."""
    with fake_cuda() as launches:
        engine = make_engine(tie, with_value=value)
        one_step(engine, value)  # moments and the like are made once, and may wait
        before = len(launches["policy_parts_kernel"].calls)
        with Waits() as waits:
            figures = one_step(engine, value)
        assert all(t.device.type == "cuda" for t in figures)
        assert {t.dtype for t in figures[:3]} == {torch.float64}
        assert len(launches["policy_parts_kernel"].calls) > before
        assert waits.seen["torch_attn::_varlen_attn"] % LAYERS == 0 and waits.seen["torch_attn::_varlen_attn_backward"]
        assert all(p.dtype == torch.bfloat16 and p.device.type == "cuda" for p in engine.policy.model.parameters())
        assert {(t.device.type, t.dtype) for _, t in engine.named_full_params()} == {("cuda", torch.bfloat16)}


@pytest.mark.parametrize("fused", [0, 640], ids=["logits", "fused"])
def test_old_and_reference_logprobs_never_wait(monkeypatch, fused):
    monkeypatch.setattr(linear_logprob, "FUSED_FORWARD_MAX_HIDDEN", fused)
    with fake_cuda() as launches:
        engine = make_engine(with_value=True)
        reference = make_engine().policy.model
        batches = [b.to("cuda") for b in micro_batches(sequences(True), 60, True)]
        with Waits():
            for batch in batches:
                for out in (
                    engine.logprobs(batch),
                    engine.logprobs(batch, reference),
                    engine.logprobs(batch, None, 1.0),
                ):
                    assert out.logprobs.device.type == "cuda" and out.logprobs.dtype == torch.float32
        assert bool(launches["fused_stats_kernel"].calls) == bool(fused)


def test_logprobs_with_gradients_never_wait():
    """The head for every other loss: forward by chunks, backward by slabs."""
    with fake_cuda() as launches:
        hidden = torch.randn(50, 640, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.randn(5000, 640, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        targets = torch.randint(0, 5000, (50,), device="cuda")
        linear_logprob.linear_logprob(hidden, weight, targets)  # makes the flag of bad targets
        with Waits():
            logprobs, entropy = linear_logprob.linear_logprob(hidden, weight, targets, chunk_bytes=4 * 5056 * 20)
            (logprobs.sum() + entropy.sum()).backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
        assert len(launches["slab_grad_kernel"].calls) > 1 and len(launches["logprob_rows_kernel"].calls) > 1


@pytest.mark.parametrize(("kind", "attentions"), [(False, 1), (True, 2), ("selective", 1)])
def test_selective_recomputation_keeps_attention(kind, attentions):
    """The kernel over segments is dear: it runs once per layer, while full recomputation runs it twice."""
    with fake_cuda():
        engine = make_engine(prepare=ModelConfig(path="unused", gradient_checkpointing=kind))
        (batch,) = micro_batches(sequences(False), 1000, True)
        engine.backward(batch)
        with Waits() as waits:
            engine.backward(batch)
        assert waits.seen["torch_attn::_varlen_attn"] == attentions * LAYERS


def test_the_row_kernels_sweep_launches_every_configuration():
    """`bench head-pieces` on a GPU, as far as a launch can be checked without one."""
    from bench import head_pieces

    with fake_cuda() as launches:
        pieces = list(head_pieces.row_kernels((512, 64, 5000), 1 << 20, "cuda"))
        found = head_pieces.timed(iter(pieces), lambda call: 1.0, lambda found: None)
        twice, parts = launches["policy_rows_kernel"].calls, launches["policy_parts_kernel"].calls
        assert len(found) == len(twice) + len(parts) and not [row for row in found if "red" in row]
        assert {(c["BLOCK"], c["num_warps"]) for c in twice} >= {(4096, 8), (8192, 16), (1024, 4)}
        assert {(c["PARTS"], c["BLOCK"], c["num_warps"]) for c in parts} >= {(2, 4096, 4), (1, 8192, 8)}
        names = [name for name, *_ in head_pieces.products((512, 64, 5000), "cuda", torch.bfloat16, 1 << 20)]
        assert len(names) == len(set(names)) == 9


@pytest.mark.parametrize(("chunk_rows", "groups"), [(300, 1), (150, 2)])
def test_kept_gradients_take_fewer_passes_over_dw(monkeypatch, chunk_rows, groups):
    """∂L/∂x of several chunks in bf16 and one product over them: 300 rows of workspace are two chunks in place, one group."""
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 50)
    products = []
    take = gradients.weight_grad_into
    monkeypatch.setattr(gradients, "weight_grad_into", lambda *a, **k: products.append(a[1].shape[0]) or take(*a, **k))
    with fake_cuda() as launches:
        hidden = torch.randn(400, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.randn(1024, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        targets, on = torch.zeros(400, dtype=torch.int64, device="cuda"), torch.ones(400, device="cuda")
        with Waits():
            out = linear_policy_loss.linear_policy_loss(
                hidden, weight, targets, nll_weight=on, chunk_bytes=4 * 1024 * chunk_rows
            )
            out.loss.backward()
        assert products == [400 // groups] * groups
        kept = [c["grad_ptr"] for c in launches["policy_parts_kernel"].calls]
        assert all(g.dtype == torch.bfloat16 and g.stride() == (1024, 1) for g in kept) and len(kept) > groups


def test_the_guard_and_the_learning_rate_never_wait():
    with fake_cuda():
        engine = make_engine()
        one_step(engine)
        with Waits():
            engine.set_lr(1e-4)
            engine.zero_grad()
            engine.step()
        assert engine.bad_in_row.device.type == engine.bad_total.device.type == "cuda"


# ------------------------------------------------------------------------------------------------- what is planted is found


def test_a_wait_is_found_and_named(monkeypatch):
    surrogate = linear_policy_loss.loss_and_sums

    def waiting(rows, logprobs, entropy, options):
        return surrogate(rows, logprobs * (2.0 if logprobs.sum() > 0 else 1.0), entropy, options)

    monkeypatch.setattr(linear_policy_loss, "loss_and_sums", waiting)
    with fake_cuda():
        engine = make_engine()
        with (
            Waits(),
            pytest.raises(HostWaitsError, match=r"linear_policy_loss.py:\d+ \(linear_policy_loss\): the host reads"),
        ):
            engine.backward(micro_batches(sequences(True), 60, True)[0])


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda t: t.cpu(), "a copy to the host"),
        (lambda t: t.tolist(), "the host reads"),
        (lambda t: t.nonzero(), "the host reads"),
        (lambda t: t[t > 0], "a mask as an index"),
        (lambda t: torch.ones(3).to(t.device), "not from pinned memory"),
        (lambda t: torch.ones(3).to(t.device, non_blocking=True), "not from pinned memory"),
        (lambda t: torch.empty(3, device=t.device).copy_(torch.ones(3)), "not from pinned memory"),
    ],
)
def test_every_kind_of_wait_is_found(act, words):
    with fake_cuda():
        tensor = torch.zeros(4, device="cuda")
        with Waits(), pytest.raises(HostWaitsError, match=words):
            act(tensor)


def test_a_tensor_on_the_wrong_device_is_found(monkeypatch):
    with fake_cuda():
        engine = make_engine()
        (batch,) = micro_batches(sequences(True), 1000, True)
        batch = batch.to("cuda")
        batch.fields["advantages"] = torch.ones(len(batch.targets))
        with pytest.raises(ValueError, match="advantages must be on hidden's device cuda:0, got cpu"):
            engine.policy(batch)
        monkeypatch.setattr(engine, "sft_gradient", [torch.zeros_like(g.grad, device="cpu") for g in engine.groups])
        with pytest.raises(ValueError, match=r"g1\[0\] is on cpu, u1\[0\] on cuda:0"):
            engine.probe([[g.grad for g in engine.groups]] * 2)


def test_a_wrong_type_and_a_missing_argument_at_a_launch_are_found():
    with fake_cuda() as launches:
        (call,) = [make_call(launches)]
        launch = launches["policy_parts_kernel"]
        with pytest.raises(TypeError, match=r"targets_ptr should be torch.int64 on cuda, got torch.int32 on cuda"):
            launch[(1,)](**call | {"targets_ptr": call["targets_ptr"].int()})
        with pytest.raises(TypeError, match=r"old_ptr should be torch.float32 on cuda, got torch.float32 on cpu"):
            launch[(1,)](**call | {"old_ptr": torch.zeros(4)})
        with pytest.raises(TypeError, match=r"arguments missing \['V'\], unknown \['W'\]"):
            launch[(1,)](**{name: value for name, value in call.items() if name != "V"} | {"W": 3})


def make_call(launches):
    engine = make_engine()
    engine.backward(micro_batches(sequences(True), 1000, True)[0])
    return launches["policy_parts_kernel"].calls[-1]


def test_an_argument_that_this_torch_lacks_is_found(monkeypatch):
    monkeypatch.setattr(attention, "_takes", lambda *_: True)
    with fake_cuda():
        engine = make_engine()
        _, kernel, _ = attention.backend("cuda", torch.bfloat16)

        def of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
            return kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

        monkeypatch.setattr(attention, "backend", lambda *_: ("torch varlen", of_2_11, ""))
        with pytest.raises(TypeError, match="enable_gqa"):
            engine.backward(micro_batches(sequences(True), 60, True)[0])


# ------------------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Qwen3Config], ids=lambda family: family.__name__)
def test_rollouts_run_on_the_device(family, monkeypatch):
    """Prefill, decode and sampling; rows join, end and are replaced. Only `read_back` brings anything to the host."""
    read = []

    def read_back(tokens, logprobs, entropy):
        assert all(x.device.type == "cuda" and len(x) == len(tokens) for x in (tokens, logprobs, entropy))
        assert logprobs.dtype == entropy.dtype == torch.float32
        read.append(len(tokens))
        return np.full(len(tokens), 3), *np.zeros((2, len(tokens)), np.float32)

    monkeypatch.setattr(transformers_engine, "read_back", read_back)
    monkeypatch.setattr(decoder, "difference", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(
        torch, "inference_mode", lambda on=True: torch.set_grad_enabled(not on)
    )  # in it fake tensors know fewer operations
    config = family(
        vocab_size=3000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    asked = [Request(tuple(range(3, 6 + i % 5)), i, 2 + i % 3) for i in range(11)]
    with fake_cuda() as launches:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        engine = transformers_engine.TransformersEngine(model, max_batch=4)
        found = engine.generate(asked, Sampling())
        assert engine.explain()[0] == "decoder"
        assert [len(c.token_ids) for c in found] == [r.max_new_tokens for r in asked]
        looked = launches["decode_attention_kernel"].calls
        assert looked and all(c["keys_ptr"].dtype == torch.bfloat16 and c["capacity"] >= 8 for c in looked)
        assert max(read) == 4

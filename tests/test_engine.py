"""The local update engine: one step against plain torch, bf16 with fp32 masters, guards, state."""

import copy

import pytest
import torch
from fakes import make_checkpoint
from rounding import WIDEST, rounding
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from amft_fast import objective
from amft_fast.config import ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import collate
from amft_fast.engine.local import LocalEngine
from amft_fast.model.policy import Policy, load_model

pytestmark = pytest.mark.cpu_isa

CFG = TrainConfig(lr=1e-2, max_grad_norm=0.5, weight_decay=0.1, adam_betas=(0.9, 0.99))


def build(folder, cfg=CFG, dtype=torch.float32, **policy):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return LocalEngine(Policy(model, ObjectiveConfig(), **policy), cfg, value_lr=1e-2)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    seqs = [
        objective.demo_sequence([2, 5, 3], torch.randint(5, 13, (k,), generator=g).tolist() + [1]) for k in (2, 5, 3)
    ]
    return collate(objective.weigh_sft(seqs, 1.0, 13), [0, 1, 2], False)


def plain_steps(folder, batches):
    """The same updates with torch's own AdamW and clipping on separate tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    opt = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    for b in batches:
        hidden = model.model(b.input_ids).last_hidden_state.flatten(0, 1)[b.rows]
        logp = model.lm_head(hidden).log_softmax(-1).gather(-1, b.targets[:, None]).squeeze(-1)
        (-(logp * b.get("nll_weight")).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_steps_equal_plain_torch(tmp_path, tie):
    folder = make_checkpoint(tmp_path, tie=tie)
    engine = build(folder)
    batches = [batch(i) for i in range(3)]
    for b in batches:
        engine.backward(b)
        engine.step()
    # AdamW moves a weight by about lr g/|g| a step, so by lr times the share of g that may be rounding: of a gradient 8 times
    # shorter than the terms of its sum over tokens, 8 times as much.
    tokens = sum(b.input_ids.numel() for b in batches)
    apart = len(batches) * 1e-2 * 8 * rounding(tokens + WIDEST)
    for name, want in plain_steps(folder, batches).items():
        torch.testing.assert_close(
            dict(engine.policy.model.named_parameters())[name], want, atol=apart, rtol=rounding(3)
        )


def test_two_backwards_add_up_and_take_gradient_clears(checkpoint_folder):
    engine = build(checkpoint_folder)
    engine.backward(batch(0))
    one = engine.take_gradient()
    assert all(not g.grad.any() for g in engine.groups)
    engine.backward(batch(0))
    engine.backward(batch(0))
    for a, b in zip(one, engine.take_gradient()):
        torch.testing.assert_close(2 * a, b)


def test_bf16_weights_move_by_their_fp32_masters(checkpoint_folder):
    """A step far below bf16's resolution is not lost: it adds up in the master until the weight moves."""
    cfg = TrainConfig(lr=1e-5, max_grad_norm=1e9)
    engine = build(checkpoint_folder, cfg, torch.bfloat16)
    before = copy.deepcopy(engine.policy.model.state_dict())
    masters = [g.master.clone() for g in engine.groups]
    engine.backward(batch())
    engine.step()
    assert all((g.master != m).float().mean() > 0.1 for g, m in zip(engine.groups, masters))
    moved = sum((p != before[n]).sum().item() for n, p in engine.policy.model.state_dict().items())
    for _ in range(60):
        engine.backward(batch())
        engine.step()
    later = sum((p != before[n]).sum().item() for n, p in engine.policy.model.state_dict().items())
    assert later > 10 * (moved + 1)
    for g in engine.groups:
        for p, m in zip(g.params, g.master_views):
            assert p.dtype == torch.bfloat16 and torch.equal(p, m.bfloat16())


@pytest.mark.parametrize("tie", [True, False])
def test_bf16_gradients_add_up_in_fp32(tmp_path, tie):
    """Every parameter gets its gradient, an untied head (to which autograd brings none) included."""
    folder = make_checkpoint(tmp_path, tie=tie)
    engine, plain = build(folder, dtype=torch.bfloat16), build(folder)
    for e in (engine, plain):
        e.backward(batch(0))
        e.backward(batch(1))
    for mine, want in zip(engine.groups, plain.groups):
        assert mine.names == want.names
        for a, b in zip(mine.grad_views, want.grad_views):
            assert a.dtype == torch.float32 and a.abs().max() > 0
            assert torch.linalg.vector_norm(a - b) < 0.1 * torch.linalg.vector_norm(b)


def test_gradient_checkpointing_recomputes(checkpoint_folder):
    """Every layer runs a second time in the backward pass, also after rollouts, and the gradients stay."""
    from amft_fast.interfaces import Request, Sampling
    from amft_fast.rollout.transformers import TransformersEngine

    engines, calls = [], []
    for checkpointing in (False, True):
        cfg = ModelConfig(path=str(checkpoint_folder), gradient_checkpointing=checkpointing)
        model = load_model(cfg, torch.device("cpu"))
        TransformersEngine(model).generate([Request((2, 5, 3), 0, 3)], Sampling())
        count = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        engines.append(LocalEngine(Policy(model, ObjectiveConfig()), CFG))
        engines[-1].backward(batch())
        calls.append(len(count) / len(model.model.layers))
    assert calls == [1, 2]
    for a, b in zip(*(e.groups for e in engines)):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(checkpoint_folder, poison):
    engine = build(checkpoint_folder)
    engine.backward(batch(0))
    engine.step()
    before = {k: v.clone() for k, v in engine.state_dict().items()}
    for count in (1, 2):
        engine.backward(batch(1))
        engine.groups[0].grad[3] = poison
        engine.step()
        assert engine.bad_in_row.item() == count
    after = engine.state_dict()
    for name, value in before.items():
        if not name.startswith("guard"):
            assert torch.equal(after[name], value), name
    engine.backward(batch(1))
    engine.step()
    assert engine.bad_in_row.item() == 0 and engine.bad_total.item() == 2


def test_the_probe_takes_the_moments_as_they_are(checkpoint_folder):
    """No zeros are made beside moments that exist: at 1.5 B these were 6.2 GB for a moment, at each probe."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    engine = build(checkpoint_folder)
    with Made() as made:
        before = engine._adam_state(torch.ones(()))
    assert made.ops.count("zeros_like") == 2 * len(engine.groups) and not before.exp_avg[0].any()
    engine.backward(batch(0))
    engine.step()
    clip = torch.ones(())
    with Made() as made:
        state = engine._adam_state(clip)
    assert not made.ops
    for group, mean, square in zip(engine.groups, state.exp_avg, state.exp_avg_sq):
        own = engine.optimizer.state[group.master]
        assert mean is own["exp_avg"] and square is own["exp_avg_sq"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_fused_optimizer_takes_more_than_two_billion_elements():
    """One flat master of a model over 2.1 B: offsets beyond 32 bits in the fused AdamW."""
    n = 2**31 + 4096
    if torch.cuda.get_device_properties(0).total_memory < 5 * 4 * n:
        pytest.skip("needs 43 GB")
    master = torch.zeros(n, device="cuda")
    master.grad = torch.zeros(n, device="cuda")
    places = [0, 2**30, 2**31 - 1, 2**31, n - 1]
    for i in places:
        master.grad[i] = 1.0
    torch.optim.AdamW([master], lr=0.5, weight_decay=0.0, fused=True).step()
    assert all(abs(master[i].item() + 0.5) < 1e-4 for i in places)  # the first step is lr · sign(g)
    assert int((master != 0).sum()) == len(places)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_goes_round(checkpoint_folder, optimizer):
    cfg = CFG.model_copy(update={"optimizer": optimizer})
    engine = build(checkpoint_folder, cfg, with_value=True)
    engine.backward(batch(0))
    engine.step()
    state = {k: v.clone() for k, v in engine.state_dict().items()}
    other = build(checkpoint_folder, cfg, with_value=True)
    other.load_state_dict(state)
    for e in (engine, other):
        e.backward(batch(1))
        e.step()
    for a, b in zip(engine.all_groups, other.all_groups):
        assert torch.equal(a.master, b.master)
    del state["param.model.norm.weight"]
    with pytest.raises(ValueError, match=r"model.norm.weight should have shape \[16\], got nothing"):
        other.load_state_dict(state)


def test_named_full_params_are_hf_names_in_layer_order(checkpoint_folder):
    engine = build(checkpoint_folder)
    names = [n for n, _ in engine.named_full_params()]
    assert names == [n for n, _ in engine.policy.model.named_parameters()]
    assert names[0] == "model.embed_tokens.weight" and "lm_head.weight" not in names

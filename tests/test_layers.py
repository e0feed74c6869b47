"""Recomputation, offloading and compiling change memory and speed, never the result; Liger's own functions, never its loss."""

import copy
import sys
import types

import pytest
import torch
from rounding import WIDEST, rounding
from sequences import assert_same, mixed

from amft_fast.config import ModelConfig, ObjectiveConfig
from amft_fast.data.batch import micro_batches
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model import layers
from amft_fast.model.policy import Policy, load_model
from amft_fast.rollout.transformers import TransformersEngine

pytestmark = pytest.mark.cpu_isa

CPU = torch.device("cpu")


def gradients(folder, saving=None, **settings):
    policy = Policy(load_model(ModelConfig(path=str(folder), **settings), CPU), ObjectiveConfig())
    if saving:
        policy.saving = saving(policy.model)
    for batch in micro_batches(mixed(), 60, True):
        policy(batch).loss.backward()
    return {n: p.grad for n, p in policy.named_parameters()}, policy


@pytest.fixture(scope="module")
def wanted(checkpoint_folder):
    return gradients(checkpoint_folder)[0]


@pytest.mark.parametrize("kind", [True, "selective"])
def test_recomputed_layers_give_the_same_gradients(checkpoint_folder, wanted, kind):
    assert_same(gradients(checkpoint_folder, gradient_checkpointing=kind)[0], wanted, 1e-6)


def test_selective_recomputation_keeps_products(checkpoint_folder):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    counts = {}
    for kind in (False, True, "selective"):
        with Products() as products:
            gradients(checkpoint_folder, gradient_checkpointing=kind)
        counts[kind] = products.count
    assert counts["selective"] == counts[False] < counts[True]


@pytest.mark.skipif(__import__("importlib.util").util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("tile", [1, 3, 7, 1000])
def test_tiled_mlps_give_the_same_gradients(checkpoint_folder, wanted, tile, monkeypatch):
    """Micro-batches of up to 60 tokens. A copy of the model tiles its own MLPs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    widest = []
    original = layers._tiled

    def seen(mlp, forward, *args):
        return original(mlp, lambda x: (widest.append(x.numel() // x.shape[-1]), forward(x))[1], *args)

    monkeypatch.setattr(layers, "_tiled", seen)
    policy = Policy(load_model(ModelConfig(path=str(checkpoint_folder)), CPU), ObjectiveConfig())
    layers.tile_mlps(policy.model, tile)
    copied = copy.deepcopy(policy.model)
    for batch in micro_batches(mixed(), 60, True):
        policy(batch).loss.backward()
    got = {n: p.grad for n, p in policy.named_parameters()}
    assert_same(got, wanted, rounding(sum(len(s.ids) for s in mixed()) + WIDEST))
    assert max(widest) <= tile
    mlps = [m.model.layers[0].mlp for m in (policy.model, copied)]
    assert [m.forward.args[0] is m for m in mlps] == [True, True]


def test_models_whose_mlps_cannot_be_tiled(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=r"model.mlp_tile: Linear has no gated MLPs"):
        layers.tile_mlps(torch.nn.Linear(2, 2), 4)


def test_offloaded_activations_give_the_same_gradients(checkpoint_folder, wanted):
    made = []

    def saving(model):
        made.append(layers.Offload(model, smallest=256))
        return made[0]

    assert_same(gradients(checkpoint_folder, saving)[0], wanted, 1e-6)
    assert made[0].moved > 0


def test_compiled_layers_give_the_same_gradients_and_rollouts_run_them_as_they_are(
    checkpoint_folder, wanted, monkeypatch
):
    original, ran = layers.compile_layers, []

    def backend(graph, inputs):
        def compiled(*args):
            ran.append(graph)
            return graph.forward(*args)

        return compiled

    monkeypatch.setattr(layers, "compile_layers", lambda model: original(model, backend=backend))
    got, policy = gradients(checkpoint_folder, compile=True)
    assert_same(got, wanted, rounding(sum(len(s.ids) for s in mixed()) + WIDEST))
    assert ran, "the layers of the training pass are compiled"
    ran.clear()
    asked = [Request((2, 5, 3), seed, 6) for seed in range(4)]
    plain = load_model(ModelConfig(path=str(checkpoint_folder)), CPU)
    tokens = [[c.token_ids for c in TransformersEngine(m).generate(asked, Sampling())] for m in (policy.model, plain)]
    assert tokens[0] == tokens[1] and not ran
    policy(micro_batches(mixed(), 60, True)[0])
    assert ran, "and are so again after rollouts"


def test_liger_is_used_through_its_public_functions_and_never_its_loss(monkeypatch):
    asked = []

    def apply_liger_kernel_to_qwen3(
        rope, rms_norm, swiglu, cross_entropy=False, fused_linear_cross_entropy=True, model=None
    ):
        asked.append((rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy, model))

    fake = types.ModuleType("liger_kernel.transformers")
    fake.apply_liger_kernel_to_qwen3 = apply_liger_kernel_to_qwen3
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="qwen3"))
    layers.apply_liger(model, None, torch.device("cuda"))
    assert asked == [(True, True, True, False, False, model)]
    other = types.SimpleNamespace(config=types.SimpleNamespace(model_type="novel"))
    assert layers.apply_liger(other, None, torch.device("cuda")) == "Liger knows no models of type novel"


def test_where_liger_cannot_run_it_is_left_out_with_a_sentence(checkpoint_folder):
    assert layers.liger("qwen3", "cpu") == (None, "Liger's kernels need a GPU")
    with pytest.raises(UserError, match=r"model.liger: Liger's kernels need a GPU"):
        gradients(checkpoint_folder, liger=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": "selective"}, {"offload_activations": True}])
def test_the_gpu_step_neither_differs_nor_waits(checkpoint_folder, wanted, settings):
    """fp32 on the GPU against the CPU, and no host sync from a micro-batch to the optimizer's step."""
    from amft_fast.config import TrainConfig
    from amft_fast.engine.local import LocalEngine

    cfg = ModelConfig(path=str(checkpoint_folder), dtype="fp32", **settings)
    model = load_model(cfg, torch.device("cuda"))
    policy = Policy(model, ObjectiveConfig())
    if cfg.offload_activations:
        policy.saving = layers.Offload(model, smallest=256)  # the model is tiny: by default nothing of it would move
    engine = LocalEngine(policy, TrainConfig())
    batches = micro_batches(mixed(), 60, True)
    for batch in batches:
        engine.backward(batch)
    assert_same({n: p.grad.cpu() for n, p in policy.named_parameters()}, wanted, 1e-3)
    assert not cfg.offload_activations or policy.saving.moved > 0
    engine.step()
    half = Policy(load_model(cfg.model_copy(update={"dtype": "bf16"}), torch.device("cuda")), ObjectiveConfig())
    if cfg.offload_activations:
        half.saving = layers.Offload(half.model, smallest=256)
    engine = LocalEngine(half, TrainConfig())
    engine.backward(batches[0])  # what is made once may wait
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            engine.backward(batch)
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""doctor --plan: counts against transformers' models, bytes against storages that exist, its advice against itself."""

import gc
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live_memory import LiveMemory
from loss_head_cases import serve
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from amft_fast import objective
from amft_fast.cli import main
from amft_fast.config_file import load
from amft_fast.data.batch import collate
from amft_fast.doctor import memory as plan
from amft_fast.doctor import plan as plan_report
from amft_fast.doctor import shapes as plan_shapes
from amft_fast.doctor.memory import Machine
from amft_fast.engine.local import LocalEngine
from amft_fast.errors import UserError
from amft_fast.interfaces import Request, Sampling
from amft_fast.model.layers import checkpoint_layers, tile_mlps
from amft_fast.model.policy import Policy
from amft_fast.rollout import decoder
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run.build import build
from amft_fast.run.loop import Loop
from amft_fast.run.writers import RunFiles

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "configs" / "plan").glob("*.toml"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
DEMO = dict(zip(FIELDS, (64, 3, 4, 192, 125)))
MIXTURE = {**DEMO, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
MID = dict(zip(FIELDS, (256, 4, 8, 768, 8192)))


def make(kind, sizes, tie=True, **more):
    """A small config of a family, two key-value heads."""
    head_dim = {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]} if "qwen3" in kind else {}
    return AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, tie_word_embeddings=tie, **head_dim, **more)


def settings(**flags):
    given = {"task__general_points__max_turns": 1, "controller__signal": "balanced"} | flags
    return load(None, [f"--{k.replace('__', '.')}={v}" for k, v in given.items()])


def part(parts, name):
    return next(p.bytes for p in parts if p.name == name)


# ------------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    "name,parameters",
    [
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("qwen2.5-7b-instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_parameters_of_known_models(name, parameters):
    """The counts that the published checkpoints have."""
    shape = plan_shapes.find(name)
    assert shape.parameters == parameters and shape.source == "built-in table"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tie", [True, False])
def test_closed_form_of_the_parameters(kind, tie):
    """docs/scale.md: P = V H (1 or 2) + L (2 H Q + 2 H K + 3 H I + norms and biases) + H."""
    shape = plan_shapes.shape_of(make(kind, MID, tie), kind, "test")
    t = shape.text
    extra = {"qwen2": t.q + 2 * t.k, "qwen3": 2 * t.head_dim}.get(kind, 0)
    layer = 2 * t.hidden * (t.q + t.k) + 3 * t.hidden * t.intermediate + 2 * t.hidden + extra
    assert shape.parameters == (1 if tie else 2) * shape.head + t.layers * layer + t.hidden
    assert t.parameters == layer and t.qk_norm == (kind == "qwen3") and t.norms == 2
    assert t.matrix == 2 * t.hidden * (t.q + t.k) + 3 * t.hidden * t.intermediate


def test_parameters_of_a_mixture_of_experts():
    """P as docs/scale.md has it, and what a token meets of it; the published model is called 30B-A3B."""
    config = make("qwen3_moe", MIXTURE)
    shape, experts = plan_shapes.shape_of(config, "x", "test"), 3 * 64 * 48
    t = shape.text
    layer = 2 * 64 * (t.q + t.k) + 64 * 8 + 8 * experts + 2 * 64 + 2 * t.head_dim
    model = AutoModelForCausalLM.from_config(config)
    assert (t.experts, t.chosen, t.intermediate, t.parameters) == (8, 3, 48, layer)
    assert shape.parameters == shape.head + 3 * layer + 64 == sum(p.numel() for p in model.parameters())
    assert shape.active == shape.parameters - 3 * 5 * experts
    assert round(plan_shapes.find("Qwen/Qwen3-30B-A3B").active / 1e9, 1) == 3.4
    dense = plan_shapes.find("Qwen/Qwen2.5-Math-7B")
    assert dense.active == dense.parameters


def test_shape_of_a_folder():
    shape = plan_shapes.find(str(ROOT / "configs" / "demo_base"))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(ROOT / "configs" / "demo_base").parameters())
    assert shape.parameters == weights and shape.source == "folder"


def folder_of(tmp_path, **config):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_shapes_that_are_refused(tmp_path):
    for path, words in (
        ("", "model.path is not set"),
        ("Qwen/Qwen99-1B", "Qwen2.5-Math-7B"),
        (folder_of(tmp_path, model_type="gpt2", n_embd=16, n_head=2, n_layer=1), "gated MLPs"),
        (
            folder_of(tmp_path, model_type="qwen3_moe", num_hidden_layers=2, decoder_sparse_step=2),
            "mixtures of experts",
        ),
        (folder_of(tmp_path, model_type="mixtral", hidden_size=64, num_hidden_layers=1), "mixtures of experts"),
        (folder_of(tmp_path, model_type="bert"), "no causal language model|gated"),
    ):
        plan_shapes.find.cache_clear()
        with pytest.raises(UserError, match=words):
            plan_shapes.find(path)
    (tmp_path / "config.json").write_text("{")
    plan_shapes.find.cache_clear()
    with pytest.raises(UserError, match="could not be read"):
        plan_shapes.find(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- real engines


def engine_of(config, dtype, cfg):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if cfg.model.gradient_checkpointing:
        checkpoint_layers(model)
    return LocalEngine(Policy(model, cfg.objective), cfg.train)


def batch_of(rows, prompt, response, vocab):
    ids = torch.randint(0, vocab, (rows, prompt + response), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [objective.demo_sequence(x[:prompt], x[prompt:]) for x in ids]
    return collate(objective.weigh_sft(sequences, 0.5, rows * response), list(range(rows)), False)


def storages(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def kept_for_backward(model, input_ids, known):
    """Bytes that autograd keeps of a forward pass, parameters aside."""
    mine, kept = {t.untyped_storage()._cdata for t in known}, []

    def pack(t):
        kept.append(t)  # held, so that no storage's address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=input_ids, use_cache=False)
    return storages(t for t in kept if t.untyped_storage()._cdata not in mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tie", [True, False])
def test_states_are_exact(dtype, tie):
    """Weights, masters, gradients, moments and the probe's buffers of a LocalEngine, byte for byte."""
    config = make("qwen3", {**DEMO, "vocab_size": 127}, tie)  # 127: not a multiple of the alignment
    cfg = settings(model__dtype=dtype)
    engine = engine_of(config, DTYPES[dtype], cfg)
    batch = batch_of(2, 3, 5, 127)
    halves = []
    for _ in range(2):
        engine.backward(batch)
        halves += engine.take_gradient()
    engine.backward(batch), engine.end_sweep("sft"), engine.step()
    static = plan.memory(cfg, plan_shapes.shape_of(config, "x", "test"), Machine(1, 1e9, "cpu")).static
    state = engine.optimizer.state
    masters = [g.master for g in engine.groups]
    assert part(static, "weights") == storages(engine.policy.parameters())
    assert part(static, "gradients") == storages(g.grad for g in engine.groups)
    assert part(static, "optimizer moments") == storages(
        state[m][k] for m in masters for k in ("exp_avg", "exp_avg_sq")
    )
    assert part(static, "u, two halves") == storages(halves)
    assert part(static, "gradient of the SFT sweep") == storages(engine.sft_gradient)
    if dtype == "bf16":
        assert part(static, "masters") == storages(masters)
    else:
        assert storages(masters) == part(static, "weights") and "masters" not in [p.name for p in static]


@pytest.mark.cpu_isa
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind,sizes,rows,length,products",
    # The small model's products are too small for oneDNN.
    [
        ("qwen3", DEMO, 20, 48, "mkl"),
        ("qwen3_moe", MIXTURE, 20, 48, "mkl"),
        ("qwen3_moe", {**MIXTURE, "num_experts": 64}, 4, 24, "mkl"),
        ("qwen2", MID, 8, 64, "mkl"),
        ("qwen2", MID, 8, 64, "onednn"),
    ],
)
def test_peak_of_an_update(kind, sizes, rows, length, products, dtype, checkpointing, monkeypatch):
    """Peak of all storages made by forward and backward, within 2 %; and what the backward pass keeps of the layers."""
    serve(products, monkeypatch)
    config = make(kind, sizes)
    prompt = length // 2
    cfg = settings(
        model__dtype=dtype,
        model__gradient_checkpointing=checkpointing,
        train__micro_batch_tokens=rows * length,
        rollout__max_new_tokens=length - prompt,
    )
    engine = engine_of(config, DTYPES[dtype], cfg)
    batch = batch_of(rows, prompt + 1, length - prompt, sizes["vocab_size"])  # the last token is not read
    shape = plan_shapes.shape_of(config, "x", "test")
    machine = Machine(1, 1e9, "cpu", prompt_tokens=prompt)
    update = plan.memory(cfg, shape, machine).phases["update"]
    known = [*engine.policy.parameters(), *engine.policy.buffers()] + [
        t for g in engine.groups for t in (g.master, g.grad)
    ]
    with LiveMemory(known) as live:
        engine.backward(batch)
    assert plan.total(update) == pytest.approx(live.peak, rel=0.02)
    if not checkpointing:
        kept = kept_for_backward(engine.policy.backbone, batch.input_ids, known)
        at = plan.Layout.of(cfg, machine)
        planned = plan.layers_bytes(cfg, shape, at)[0] + plan.final_norm_bytes(shape, at)
        assert planned == pytest.approx(kept, rel=0.01)


def test_eager_attention_keeps_its_probabilities():
    config, cfg = make("qwen2", DEMO), settings(model__attention="eager")
    shape, kept = plan_shapes.shape_of(config, "x", "test"), []
    for layers in (1, 2):
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
        kept.append(kept_for_backward(model.model, torch.zeros(2, 96, dtype=torch.long), list(model.parameters())))
    planned = 2 * 96 * plan.layer_bytes(shape.text, 4, cfg.model.attention, 96)
    assert planned == pytest.approx(kept[1] - kept[0], rel=0.1)


def rollouts(config, batch, prompt, response, same, own_loop=True):
    """(planned, measured) peak of rollouts of the transformers engine."""
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    cfg = settings(
        rollout__max_batch=batch,
        rollout__max_new_tokens=response,
        rollout__num_generations=same,
        advantage__kind="reinforce++",
        train__method="rl",
        train__prompts_per_step=batch // same,
        eval__max_prompts=1,
        eval__num_samples=1,
        eval__schedule_max_prompts=1,
    )
    asked = plan.memory(cfg, plan_shapes.shape_of(config, "x", "test"), Machine(1, 1e9, "cpu", prompt_tokens=prompt))
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 100, (prompt,), generator=generator).tolist()) for _ in range(batch // same)]
    requests = [Request(prompts[i // same], i, response) for i in range(batch)]
    engine = TransformersEngine(model, max_batch=batch)
    assert engine.explain()[0] == ("decoder" if own_loop else "transformers' forward")
    with LiveMemory([*model.parameters(), *model.buffers()]) as live:
        engine.generate(requests, Sampling())
    return plan.total(asked.phases["rollouts"]), live.peak


@pytest.mark.parametrize(
    "sizes,batch,prompt,response,same", [(MID, 16, 2, 40, 1), (DEMO, 32, 8, 60, 8), (MID, 4, 160, 12, 1)]
)
@pytest.mark.parametrize("own_loop", [True, False])
def test_peak_of_rollouts(sizes, batch, prompt, response, same, own_loop, monkeypatch):
    """KV cache and sampling (first two), prefill (last) of the transformers engine, within 10 %: by our loop over the layers,
    and by transformers' forward as other models have it."""
    if not own_loop:
        monkeypatch.setattr(decoder, "FAMILIES", ())
    planned, measured = rollouts(make("qwen2", sizes), batch, prompt, response, same, own_loop)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("batch,prompt,response,same", [(32, 8, 60, 8), (4, 160, 12, 1)])
def test_peak_of_a_mixture_s_rollouts(batch, prompt, response, same):
    planned, measured = rollouts(make("qwen3_moe", MIXTURE), batch, prompt, response, same)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.integration
@pytest.mark.parametrize(
    "flags", [[], ["--model.dtype=bf16", "--model.gradient_checkpointing=true", "--objective.kl_coef=0.1"]]
)
def test_peak_of_a_whole_run(flags, tmp_path):
    """Three probed steps of the trainer: the update's peak, states included, is the planned one; no phase is above its plan."""
    folder, steps = str(ROOT / "configs" / "demo_base"), 3
    sizes = ["train.prompts_per_step=16", "train.demos_per_step=16", "rollout.max_batch=128", "meta.prompts=16"]
    rest = [
        "eval.every=0",
        "eval.max_prompts=8",
        "eval.num_samples=1",
        f"train.steps={steps}",
        "controller.window=2",
        "controller.signal=balanced",
    ]
    own = [f"run.dir={tmp_path}", f"model.path={folder}", "log.to=[]", "run.device=cpu"]
    own += ["train.packing=false", "train.skip_flat=false"]  # the plan is of all rollouts, in padded rows
    cfg = load(ROOT / "configs" / "demo.toml", [f"--{x}" for x in sizes + rest + own] + flags)
    peaks = {}
    with LiveMemory() as live:
        parts = build(cfg, lambda: False)
        files = RunFiles(tmp_path, cfg, steps)
        files.open(0)
        loop = Loop(cfg, parts, files)
        trainer = loop.trainer

        def watched(name, function):
            def call(*args, **kwargs):
                gc.collect()  # cycles left by what ran before are no part of this phase
                live.peak = live.now
                out = function(*args, **kwargs)
                peaks[name] = max(peaks.get(name, 0), live.peak)
                return out

            return call

        trainer.update = watched("update", trainer.update)
        trainer.rollouts.sample = watched("rollouts", trainer.rollouts.sample)
        trainer.utility_gradient._gradient = watched("utility gradient", trainer.utility_gradient._gradient)
        loop.run()
        files.close()
    prompt = max(len(parts.encoder.prompt(parts.task.start(item).messages)) for item in trainer.rollouts.prompts)
    memory = plan.memory(cfg, plan_shapes.find(folder), Machine(1, 1e9, "cpu", prompt_tokens=prompt))
    planned = {name: plan.total(memory.static) + plan.total(phase) for name, phase in memory.phases.items()}
    assert planned["update"] == pytest.approx(peaks["update"], rel=0.1)
    # In so small a model what the rollout engine keeps of its rows, beside keys and values, is 3 % of the whole.
    room = {"rollouts": 1.05}
    over = {n: (peaks[n], planned[n]) for n in planned if not peaks[n] < room.get(n, 1.02) * planned[n]}
    assert not over


# ----------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_against_torchs_counter():
    """torch counts eager attention over the whole square, the plan under the diagonal."""
    config, length = make("qwen2", MID), 64
    shape = plan_shapes.shape_of(config, "x", "test")
    model, t = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), shape.text
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=torch.zeros(3, length, dtype=torch.long), use_cache=False)
    above = 3 * 4 * t.layers * t.q * (length**2 - length * (length + 1) / 2)
    forward = plan.forward_flops(shape, 3, 24, length - 24) + 3 * length * 2 * shape.head
    assert counter.get_total_flops() == pytest.approx(forward + above, rel=1e-4)  # rope's frequencies are a product too
    with FlopCounterMode(display=False) as counter:
        out.logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * (forward + above), rel=1e-4)


def test_flops_of_a_mixture_are_those_of_the_chosen_experts():
    """Against torch's counter, which knows the products of transformers' plain loop alone."""
    config, length = make("qwen3_moe", MIXTURE), 32
    shape = plan_shapes.shape_of(config, "x", "test")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    t = shape.text
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False)
    above = 2 * 4 * t.layers * t.q * (length**2 - length * (length + 1) / 2)
    forward = plan.forward_flops(shape, 2, 20, length - 20) + 2 * length * 2 * shape.head
    assert counter.get_total_flops() == pytest.approx(forward + above, rel=1e-3)


def test_flops_of_rollouts_share_the_prompt():
    shape = plan_shapes.find("Qwen/Qwen2.5-Math-7B")
    one, eight = (plan.rollout_flops(shape, 1, g, 500, 100) for g in (1, 8))
    assert one == plan.forward_flops(shape, 1, 500, 100) + 100 * 2 * shape.head
    assert eight == pytest.approx(8 * one - 7 * plan.forward_flops(shape, 1, 500, 0))


@pytest.mark.parametrize(
    "method,parts",
    [
        ("amft", {"rollouts", "RL", "SFT", "utility gradient"}),
        ("fixed", {"rollouts", "RL", "SFT"}),
        ("sft", {"SFT"}),
        ("rl", {"rollouts", "RL"}),
        ("gac", {"rollouts", "RL", "SFT", "noise of the gradients"}),
        ("hpt", {"rollouts", "RL", "SFT"}),
    ],
)
def test_flops_by_method(method, parts):
    shape = plan_shapes.find("Qwen/Qwen2.5-Math-7B")
    assert set(plan.flops(settings(train__method=method), shape, Machine(1, 1e9))) == parts


def test_a_step_that_explores_imitates_nothing():
    shape, cfg = plan_shapes.find("Qwen/Qwen2.5-Math-7B"), settings(controller__signal="blocks")
    assert set(plan.flops(cfg, shape, Machine(1, 1e9))) == {"rollouts", "RL"}


def test_what_a_block_may_be_taken_back_to_lies_on_the_host():
    """Masters and moments once more, 12 bytes a parameter; on a CPU that is the process's own memory."""
    shape = plan_shapes.find("Qwen/Qwen2.5-Math-7B")
    at = {name: settings(controller__signal=name, checkpoint__background="false") for name in ("blocks", "balanced")}
    gpu, cpu = (
        {n: plan.memory(cfg, shape, m) for n, cfg in at.items()}
        for m in (Machine(1, 1e9), Machine(1, 1e9, device="cpu"))
    )
    assert gpu["blocks"].host == pytest.approx(12 * shape.parameters, rel=1e-3) and gpu["balanced"].host == 0
    assert part(cpu["blocks"].static, "kept weights and moments") == pytest.approx(12 * shape.parameters, rel=1e-3)


def test_copies_for_a_checkpoint_that_is_written_beside_the_steps():
    """Masters and moments, with blocks what is kept too, with windows u; none where steps wait for the disk or nothing is saved
    before the end."""
    shape, p = plan_shapes.find("Qwen/Qwen2.5-Math-7B"), 12
    for signal, bytes_ in (("blocks", 24), ("balanced", 20)):
        cfg = settings(controller__signal=signal)
        cpu, gpu = (plan.memory(cfg, shape, Machine(1, 1e9, device=device)) for device in ("cpu", "cuda"))
        assert part(cpu.static, "copies for a checkpoint") == pytest.approx(bytes_ * shape.parameters, rel=1e-3)
        kept = p * shape.parameters if signal == "blocks" else 0
        assert gpu.host == pytest.approx(kept + bytes_ * shape.parameters, rel=1e-3)
    for off in ({"checkpoint__background": "false"}, {"checkpoint__every": 0, "eval__every": 0}):
        memory = plan.memory(settings(controller__signal="balanced", **off), shape, Machine(1, 1e9, device="cpu"))
        assert all(x.name != "copies for a checkpoint" for x in memory.static)


def test_passes_that_a_loss_of_whole_sequences_takes():
    """None before the first of two updates, so half a pass a step; the entropies of all tokens, a whole one; beside the one for
    old log-probs, which two updates take anyway."""
    shape, machine, name = plan_shapes.find("Qwen/Qwen2.5-Math-7B"), Machine(1, 1e9), "old and reference log-probs"

    def passes(**more):
        return plan.flops(settings(train__method="rl", train__minibatches_per_rollout=2, **more), shape, machine)[name]

    plain = passes()
    assert passes(objective__loss="gspo") == pytest.approx(1.5 * plain)
    assert passes(objective__entropy_share=0.2) == pytest.approx(2 * plain)


def test_gac_holds_two_halves_of_both_gradients():
    shape, machine = plan_shapes.find("Qwen/Qwen2.5-Math-1.5B"), Machine(1, 80e9)
    parts = plan.memory(settings(train__method="gac"), shape, machine).phases["noise of the gradients"]
    assert parts[0].bytes == 4 * 4 * shape.flat


# -------------------------------------------------------------------------------------------------------------- sharding


def test_what_each_stage_shards():
    shape, n = plan_shapes.find("Qwen/Qwen2.5-Math-7B"), 8
    p = shape.parameters
    for stage, weights, transit in ((1, 2 * p, 2 * p / n + 2 * p), (2, 2 * p, 2 * p / n), (3, 2 * p / n, 2 * p / n)):
        cfg = settings(engine__kind="deepspeed", engine__zero_stage=stage)
        static = plan.memory(cfg, shape, Machine(n, 80e9)).static
        assert part(static, "weights") == weights and part(static, "gradients in transit") == transit
        assert part(static, "masters") == part(static, "gradients") == 4 * p / n
        assert part(static, "optimizer moments") == part(static, "u, two halves") == 8 * p / n
        assert part(static, "gradient of the SFT sweep") == 4 * p / n
        # Rollouts need the weights whole: where they are cut, in a copy.
        copy = [x.bytes for x in static if x.name == "weights for rollouts"]
        assert copy == ([2 * p] if stage == 3 else [])
        cfg = settings(
            engine__kind="deepspeed", engine__zero_stage=stage, engine__offload="true", checkpoint__background="false"
        )
        away = plan.memory(cfg, shape, Machine(n, 80e9))
        assert {x.name for x in away.static} <= {"weights", "gradients in transit", "weights for rollouts"}
        assert away.host == n * 28 * p / n


def test_what_vllm_takes():
    """Its share while rollouts are drawn, or all the time when it does not sleep; at least its weights; nothing on servers."""
    shape, whole = plan_shapes.find("Qwen/Qwen2.5-Math-7B"), 80e9
    cfg = settings(engine__kind="deepspeed", rollout__max_new_tokens=3584)
    for mode, sleep, share, tp, rollouts, stays in (
        ("colocate", True, 0.5, 1, 40e9, 0),
        ("colocate", False, 0.5, 1, 0, 40e9),
        ("colocate", True, 0.1, 1, 2 * shape.parameters + 4096 * 2 * 28 * 512 * 2, 0),
        ("colocate", True, 0.1, 4, (2 * shape.parameters + 4096 * 2 * 28 * 512 * 2) / 4, 0),
        ("server", True, 0.9, 8, 0, 0),
    ):
        if rollouts < share * whole and rollouts:
            rollouts = share * whole
        vllm = SimpleNamespace(mode=mode, sleep=sleep, gpu_memory_utilization=share, tensor_parallel_size=tp)
        rollout = cfg.rollout.model_copy(update={"engine": "vllm", "vllm": vllm})
        memory = plan.memory(cfg.model_copy(update={"rollout": rollout}), shape, Machine(8, whole))
        assert plan.total(memory.phases["rollouts"]) == rollouts
        assert sum(x.bytes for x in memory.static if x.name.startswith("vLLM")) == stays
        assert "weights for rollouts" not in {x.name for x in memory.static}


def test_reference_model_and_methods_without_a_probe():
    shape = plan_shapes.find("Qwen/Qwen2.5-Math-7B")
    names = {
        p.name
        for p in plan.memory(settings(train__method="fixed", objective__kl_coef=0.1), shape, Machine(1, 1e9)).static
    }
    assert names == {"weights", "masters", "gradients", "optimizer moments", "reference model"}
    sgd = plan.memory(settings(train__optimizer="sgd"), shape, Machine(1, 1e9))
    assert "optimizer moments" not in {p.name for p in sgd.static}


# -------------------------------------------------------------------------------------------------------- long sequences


def long_rows(*flags, config="7b_64k_8gpu", gpus=8):
    """The memory of a shipped config with these flags, and its shape."""
    cfg = load(ROOT / "configs" / "plan" / f"{config}.toml", list(flags))
    shape = plan_shapes.find(cfg.model.path)
    return plan.memory(cfg, shape, Machine(gpus, 80e9)), shape, plan.Layout.of(cfg, Machine(gpus, 80e9))


def test_ranks_that_share_rows_have_a_share_of_their_activations():
    """64 k tokens and a prompt by four: all of a rank's tokens may have a loss, and states are cut over all ranks as ever."""
    memory, shape, at = long_rows("--train.micro_batch_tokens=16384")
    assert at.tokens * 4 == 512 + 65536 and at.rows == at.tokens and at.longest == 4 * at.tokens
    t = shape.text
    assert part(memory.phases["update"], "activations") == at.tokens * t.layers * 2 * t.hidden
    assert part(memory.static, "masters") == 4 * shape.parameters / 8
    alone, _, whole = long_rows("--engine.sequence_parallel=1")
    assert whole.tokens == 4 * at.tokens
    assert part(alone.phases["update"], "activations") == 4 * part(memory.phases["update"], "activations")


def test_what_a_layer_keeps_where_heads_are_copied():
    """The output twice, and keys and values of one head each on two ranks of eight; ulysses_worker.py measures two and four."""
    t = plan_shapes.find("Qwen/Qwen2.5-7B").text
    kept = [plan.layer_bytes(t, 2, "auto", 100, shared) for shared in (1, 2, 4, 8)]
    assert [x - kept[0] for x in kept] == [0, 2 * t.q, 2 * t.q, 2 * t.q + 4 * t.k]


def test_rows_go_on_to_as_many_groups_as_there_are():
    """Few long sequences for many ranks: a group of them takes no more than its share of a step."""
    few = ("--train.prompts_per_step=1", "--train.demos_per_step=8", "--train.micro_batch_tokens=1000000")
    for size in (1, 2, 4):
        _, _, at = long_rows(*few, f"--engine.sequence_parallel={size}")
        assert at.tokens * size == size * at.longest  # eight sequences for eight / size groups


def test_activations_in_host_memory_leave_those_of_two_layers():
    (memory, shape, _), (away, _, _) = long_rows(), long_rows("--model.offload_activations=true")
    here, there = (part(m.phases["update"], "activations") for m in (memory, away))
    assert there == pytest.approx(here * 2 / shape.text.layers) and away.host == pytest.approx(memory.host + 8 * here)


@pytest.mark.skipif(__import__("importlib.util").util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_an_update_with_tiles(checkpointing, monkeypatch):
    """Within 3 % of all storages, where the MLP is the widest part of a layer and a tile is an eighth of the tokens."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    serve("mkl", monkeypatch)
    config, rows, length = make("qwen2", {**MID, "intermediate_size": 2048, "vocab_size": 512}), 8, 64
    flags = {"model__gradient_checkpointing": checkpointing, "train__micro_batch_tokens": rows * length}
    flags |= {"rollout__max_new_tokens": length // 2}
    shape, machine = plan_shapes.shape_of(config, "x", "test"), Machine(1, 1e9, "cpu", prompt_tokens=length // 2)
    batch = batch_of(rows, length // 2 + 1, length // 2, 512)
    peaks = {}
    for tile in (None, 64):
        cfg = settings(**flags, **({"model__mlp_tile": tile} if tile else {}))
        engine = engine_of(config, torch.float32, cfg)
        if tile:
            tile_mlps(engine.policy.model, tile)
        known = [*engine.policy.parameters(), *engine.policy.buffers()]
        with LiveMemory([*known, *(t for g in engine.groups for t in (g.master, g.grad))]) as live:
            engine.backward(batch)
        peaks[tile] = live.peak
        planned = plan.total(plan.memory(cfg, shape, machine).phases["update"])
        assert planned == pytest.approx(live.peak, rel=0.03), tile
    assert peaks[64] < 0.6 * peaks[None]


# --------------------------------------------------------------------------------------------------------------- command


def command_of(config):
    """The command line that stands in an example's comments."""
    line = next(x for x in config.read_text().splitlines() if "--plan" in x)
    return shlex.split(line[line.index("--plan") :].split("`")[0])


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda p: p.stem)
def test_examples_fit_as_they_say(config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["doctor", *command_of(config)]) == 0
    out = capsys.readouterr().out
    assert "fits, with" in out and "estimate" in out and "by phase: update " in out


def test_there_are_examples():
    names = ["1.5b_1gpu", "30b_a3b_32gpu", "72b_32k_64gpu", "72b_64gpu", "7b_64k_8gpu", "7b_8gpu"]
    assert [p.stem for p in EXAMPLES] == names


@pytest.mark.parametrize(
    "flags,largest",
    [
        (["--engine.kind", "local", "--gpus", "8"], "optimizer moments"),
        (["--gpus", "2", "--gpu-memory", "40"], "optimizer moments"),
        (["--rollout.max_batch", "4096", "--gpus", "8"], "KV cache"),
        (
            ["--model.gradient_checkpointing", "false", "--train.micro_batch_tokens", "100000", "--gpus", "8"],
            "activations",
        ),
        (["--engine.zero_stage", "1", "--gpus", "8", "--controller.signal", "balanced"], "gradients in transit"),
        (["--model.path", "Qwen/Qwen2.5-72B", "--gpus", "64"], "weights for rollouts"),
        (
            ["--rollout.engine", "vllm", "--rollout.vllm.gpu_memory_utilization", "0.9", "--gpus", "8"],
            "vLLM, colocated",
        ),
        (
            ["--rollout.engine", "vllm", "--rollout.vllm.gpu_memory_utilization", "0.5", "--rollout.max_new_tokens"]
            + ["200000", "--model.mlp_tile", "8192", "--gpus", "8"],
            "activations",
        ),
        (
            ["--model.path", "Qwen/Qwen2.5-Math-1.5B", "--gpus", "1", "--gpu-memory", "40"],
            "optimizer moments",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_its_cure_works(flags, largest, capsys):
    """The change that is offered, given as flags, makes the same command succeed."""
    config = str(ROOT / "configs" / "plan" / "7b_8gpu.toml")
    flags = flags if "--gpu-memory" in flags else [*flags, "--gpu-memory", "80"]
    assert main(["doctor", "--plan", config, *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("amft-fast: --plan: the config does not fit: ") and "\n" not in err
    assert any(f"the largest part is {name} (" in err for name in largest.split("|"))
    cure = err.partition("; set ")[2].rpartition(", which needs")[0]
    for change in cure.replace(" and ", ", ").split(", "):
        if " on " in change:
            change, _, gpus = change.partition(" on ")
            flags = [*flags, "--gpus", gpus.split()[0]]
        name, _, value = change.partition(" = ")
        flags = [*flags, f"--{name}={value.strip(chr(34))}"]
    assert main(["doctor", "--plan", config, *flags]) == 0, (err, flags)


def test_no_change_is_offered_where_none_helps(monkeypatch):
    shape, cfg = plan_shapes.find("Qwen/Qwen2.5-72B"), settings()
    machine = Machine(1, 1e9)
    text = plan_report.refusal(cfg, shape, machine, plan.memory(cfg, shape, machine))
    assert "no setting makes it fit" in text


def test_bad_flags(capsys):
    config = str(ROOT / "configs" / "demo.toml")
    mistakes = {
        "--gpus 0": "--gpus must be at least 1, got 0",
        "--mfu -1": "--mfu must be at least 0.001",
        "--mfu 1.5": "--mfu must be at most 1, got 1.5",
        "--image-tokens -1": "--image-tokens must be at least 0",
        "--gpu-memory nan": "--gpu-memory must be at least 0.001, got nan",
        "--gpu-memory inf": "--gpu-memory must be at most",
        "--peak-tflops nan": "--peak-tflops must be at least",
        "--model.path nobody/nothing": "is not known here",
        "--gpus 8 --model.path Qwen/Qwen2.5-7B --engine.kind deepspeed --engine.sequence_parallel 8": "its 28 attention heads",
        "--gpus 6 --engine.kind deepspeed --engine.sequence_parallel 4": "6 of them cannot be groups of 4",
        "--engine.zero_stag 1": "did you mean engine.zero_stage",
    }
    for flags, words in mistakes.items():
        assert main(["doctor", "--plan", config, *flags.split()]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--train.lr", "1"])


def test_on_a_cpu(capsys):
    assert main(["doctor", "--plan", str(ROOT / "configs" / "demo.toml"), "--run.device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "one CPU process" in out and "memory per process" in out and "TFLOP/s" not in out


NO_GPU = plan_report.Here(0)
H200 = plan_report.Here(8, "NVIDIA H200", 141e9)


def planned(monkeypatch, capsys, here, *flags, config="demo.toml"):
    """What `doctor --plan` says where torch sees these GPUs."""
    monkeypatch.setattr(plan_report, "gpus_here", lambda: here)
    assert main(["doctor", "--plan", str(ROOT / "configs" / config), *flags]) == 0
    return capsys.readouterr().out


def test_it_plans_for_what_is_asked_or_for_what_is_here_and_says_which(monkeypatch, capsys):
    out = planned(monkeypatch, capsys, NO_GPU)
    assert "one CPU process" in out and "planned for the CPU of this machine: torch sees no GPU here" in out
    for flags in (["--gpus", "1"], ["--run.device", "cuda"], ["--peak-tflops", "312"]):
        out = planned(monkeypatch, capsys, NO_GPU, *flags)
        assert "1 x 80.0 GB" in out and "no GPU here and no --gpu-memory: planned for 80 GB each" in out
        assert ("an H100's" in out) == ("312" not in flags) and ("of 312 TFLOP/s" in out) == ("312" in flags)
    out = planned(monkeypatch, capsys, NO_GPU, "--gpu-memory", "24")
    assert "1 x 24.0 GB" in out and "planned for 80 GB" not in out
    out = planned(monkeypatch, capsys, H200, config="plan/7b_8gpu.toml")
    assert "8 x 141.0 GB" in out and "planned for 8 x NVIDIA H200, as here" in out and "an H100's" not in out
    out = planned(monkeypatch, capsys, H200, "--run.device", "cpu")
    assert "one CPU process" in out and "run.device is cpu" in out


def test_a_small_model_takes_a_time_that_has_digits(monkeypatch, capsys):
    out = planned(monkeypatch, capsys, NO_GPU, "--gpus", "1")
    assert re.search(r"estimate: [1-9][\d,.]* (ms|µs|s) per step", out), out
    assert "0.00 " not in out
    assert [plan_report.seconds(n) for n in (12.34, 0.0123, 4.5e-5)] == ["12.3 s", "12.3 ms", "45.0 µs"]


def test_vision_tower_counts(capsys):
    config = str(ROOT / "configs" / "plan" / "7b_8gpu.toml")
    flags = ["--gpus", "8", "--gpu-memory", "141", "--model.path", "Qwen/Qwen2.5-VL-7B-Instruct"]
    assert main(["doctor", "--plan", config, *flags]) == 0
    assert "no --image-tokens" in capsys.readouterr().out
    cfg, shape = load(config), plan_shapes.find("Qwen/Qwen2.5-VL-7B-Instruct")
    without, with_images = (plan.memory(cfg, shape, Machine(8, 141e9, image_tokens=n)) for n in (0, 1024))
    assert part(with_images.phases["update"], "activations") > part(without.phases["update"], "activations")
    assert (
        plan.flops(cfg, shape, Machine(8, 1e9, image_tokens=1024))["RL"] > plan.flops(cfg, shape, Machine(8, 1e9))["RL"]
    )

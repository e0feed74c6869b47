"""What the two processes of tests/test_scale.py run: `torchrun ... scale_worker.py FOLDER`; rank 0 writes FOLDER/found.json.

Every engine is held against the local one on the same sequences, and whole runs against runs of one process.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from fakes import CopyTask, make_checkpoint
from PIL import Image
from tiny_vlm import KINDS, make_vlm
from transformers import AutoModelForCausalLM

from amft_fast import config_file, objective
from amft_fast.config import EngineConfig, LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from amft_fast.data.batch import micro_batches
from amft_fast.engine import deepspeed
from amft_fast.engine import world as distributed
from amft_fast.engine.deepspeed import DeepSpeedEngine, zero_config
from amft_fast.engine.local import LocalEngine
from amft_fast.model import lora
from amft_fast.model.policy import Policy, load_model, pick_dtype
from amft_fast.model.vision import load_vision
from amft_fast.multi_tensor import mixing_slope, named_sums
from amft_fast.run import checkpoint, launch

OBJECTIVE = ObjectiveConfig(entropy_coef=0.02, tis_cap=2.0)
SGD = TrainConfig(lr=0.05, optimizer="sgd", max_grad_norm=0.5, weight_decay=0.1)
ADAM = TrainConfig(lr=0.01, max_grad_norm=0.5)
SLOW = TrainConfig(lr=0.002, optimizer="sgd", max_grad_norm=0.5, weight_decay=0.1)  # for models of large weights
MU = 0.3


def sequences(seed, lengths=(2, 5, 3, 7, 1), rl=False, eyes=None):
    """Demonstrations, or recorded rollouts with their log-probs, weighed as in a step at mu. For a model with eyes half of them
    have pictures, one or two."""
    g = np.random.default_rng(seed)
    if eyes is None:
        out = [objective.demo_sequence([2, 5, 3], [*g.integers(5, 13, k).tolist(), 1]) for k in lengths]
    else:
        out = [
            shown(eyes, g, i % 4 // 2 * (1 + i % 2), [*g.integers(8, 16, k).tolist(), 1])
            for i, k in enumerate(lengths, 2)
        ]
    tokens = sum(int(s.trained.sum()) for s in out)
    if not rl:
        return objective.weigh_sft(out, MU, tokens)
    out = [s.with_fields(behavior_logprobs=-2.0 + 0.1 * i, advantages=(-1.0) ** i) for i, s in enumerate(out)]
    return objective.weigh_rl(out, 1 - MU, tokens, OBJECTIVE, value_coef=0.1)


def shown(eyes, g, count, response):
    """A demonstration with so many pictures."""
    pictures = [Image.fromarray(g.integers(0, 256, (8, 8 + 8 * i, 3), np.uint8)) for i in range(count)]
    prompt = [2, *[5, eyes.image_token, 7] * count, 3]
    return objective.demo_sequence(eyes.expand(prompt, pictures), response, images=tuple(pictures))


def give_returns(policy, seqs):
    return [s.with_fields(returns=0.5) for s in seqs] if policy.value_head is not None else seqs


def sweep(engine, seqs, tokens=20, least=1):
    world, shared = engine.world, engine.sequence.size
    loss, ranks = torch.zeros(()), world.size // shared
    tokens //= ranks if shared > 1 else 1  # packed rows are so short that there would be one for each
    mine = micro_batches(seqs, tokens, shared > 1, rank=world.rank // shared, ranks=ranks)
    assert len(mine) >= least, "several micro-batches before each update: one that is dropped must show"
    for b in mine:
        loss = loss + engine.backward(b).loss.float()
    return float(engine.all_reduce(loss))


def steps(engine, utility, shake):
    """Three probed steps: losses, probes, and the gradient of the third before it is applied."""
    losses, probes, eyes = [], [], engine.policy.vision
    for t in range(3):
        losses.append(sweep(engine, sequences(t, eyes=eyes), 10, 2))
        shake(engine.groups)
        engine.end_sweep("sft")
        losses.append(sweep(engine, give_returns(engine.policy, sequences(t + 10, (4, 2, 6), True, eyes)), 10, 2))
        shake(engine.groups)
        engine.end_sweep("rl")
        sums, clip = engine.probe(utility)
        probes.append({k: float(v) for k, v in named_sums(sums.tolist(), MU).items()} | {"clip": float(clip)})
        norm = float(engine.step())
        losses.append(norm)
    return losses, probes


def utility(engine, shake):
    """Two halves of u; of one no group was useful, so no batch reached the engine."""
    eyes = engine.policy.vision
    sweep(engine, sequences(77, (3, 3), eyes=eyes))
    shake(engine.groups)
    half = engine.take_gradient()
    sweep(engine, sequences(78, (6,), eyes=eyes))  # one sequence for two ranks: one of them has nothing
    shake(engine.groups)
    return half, engine.take_gradient()


def whole(engine, flats):
    """A gradient by name, put together from all ranks."""
    mine = [(p.name, p.start, x.clone()) for p, x in engine.by_name(flats)]
    parts = sorted(engine.world.gather(mine), key=lambda x: (x[0], x[1]))
    names = dict.fromkeys(name for name, _, _ in parts)
    return {n: torch.cat([x for name, _, x in parts if name == n]) for n in names}


def signals(probe):
    """What the controller makes of a probe, in units in which 1 is large: cosines, and the slope over its factors' lengths."""
    n, out = probe, {"clip": probe["clip"]}
    for u in ("u1", "u2"):
        for g in ("sft", "rl", "d", "total"):
            out[f"{u}_{g}"] = n[f"{u}_{g}"] / (n[f"{u}_{u}"] * n[f"{g}_{g}"]) ** 0.5
        for diagonal in (None, "plain", "exact"):
            lengths = n["d_d"] if diagonal is None else n[f"{diagonal}_sft_sq"] + n[f"{diagonal}_rl_sq"]
            slope = mixing_slope(n, u, diagonal, n["clip"])
            out[f"{u}_{diagonal}"] = slope / (n[f"{u}_{u}"] * lengths) ** 0.5 if lengths else slope
    return out


def far(a, b):
    """The length of the difference over the length of what is wanted; of several tensors the largest."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(far(a[k], b[k]) for k in a)
    a, b = torch.as_tensor(a, dtype=torch.float64).flatten(), torch.as_tensor(b, dtype=torch.float64).flatten()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def leave(groups):
    """What is done to the gradients of an engine that is measured as it is."""


class Shake:
    """Moves each gradient as far as rounding may, at random: how far an engine then gets from itself is what two engines may
    be apart, with all that AdamW's division and the probe's make of it.

    Two sums of n terms in fp32, taken in different orders, are each within n eps/2 of the sum of the terms' sizes, so within
    n eps of each other. n: the longest sums on the way of a gradient, over the tokens of a sweep (38) and the units of the
    MLP (32). In bf16 sums are taken in fp32 and rounded once, by eps/2 on either side, where a micro-batch's gradient
    is stored, and two engines cut other micro-batches; the activations' own roundings are the same for both, but where
    a sum in another order falls on the other side of a step, which happens to few.
    """

    def __init__(self, dtype):
        self.share = {"fp32": 70 * torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}[dtype]
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, groups):
        for group in groups:
            for piece in group.pieces:
                g = piece.of(group.grad)
                g += self.share * g.abs().max() * (2 * torch.rand(g.shape, generator=self.generator) - 1)


def measure(engine, shake=leave):
    halves = utility(engine, shake)
    u = [whole(engine, h) for h in halves]
    losses, probes = steps(engine, halves, shake)
    masters = whole(engine, [g.master for g in engine.groups])
    dtype = next(engine.policy.model.parameters()).dtype
    full = {name: p.clone() for name, p in engine.named_full_params(max_bytes=2000)}
    factors = {name: p.detach().clone() for name, p in engine.named_factors()}
    assert bool(factors) == lora.adapted(engine.policy.model)
    for name, p in masters.items() if factors else ():
        sent = factors[f"base_model.model.{name.replace('.default', '')}"]
        assert torch.equal(sent.flatten(), p.to(dtype)), f"{name} is sent as its master, rounded"
    if not factors:
        for name, p in full.items():
            if name in masters:  # eyes may be frozen
                assert torch.equal(p.flatten(), masters[name].to(dtype)), f"{name} is not its master, rounded"
    return {"utility": u, "losses": losses, "probes": probes, "weights": masters, "whole": full}


def compare(got, want):
    return {
        "utility": max(far(a, b) for a, b in zip(got["utility"], want["utility"])),
        "losses": far(got["losses"], want["losses"]),
        "probes": max(
            abs(x - signals(b)[k]) for a, b in zip(got["probes"], want["probes"]) for k, x in signals(a).items()
        ),
        "weights": far(got["weights"], want["weights"]),
        "whole": far(got["whole"], want["whole"]),
    }


CASES = {
    **{f"sgd-{s}": (SGD, s, {}) for s in (1, 2, 3)},
    "untied-2": (SGD, 2, {"tie": False}),
    "untied-3": (SGD, 3, {"tie": False}),
    **{f"adam-{s}": (ADAM, s, {"small stay whole": True}) for s in (1, 2, 3)},
    "value-2": (SGD, 2, {"value": True}),
    "value-3": (SGD, 3, {"value": True}),
    "checkpointing-3": (SGD, 3, {"checkpointing": True}),
    **{f"offload-{s}": (ADAM, s, {"offload": True}) for s in (1, 2, 3)},
    "offload-bf16-2": (ADAM, 2, {"offload": True, "dtype": "bf16"}),
    **{f"bf16-{s}": (ADAM, s, {"dtype": "bf16"}) for s in (1, 2, 3)},
    **{f"lora-{s}": (ADAM, s, {"lora": "all-linear"}) for s in (1, 2, 3)},
    "lora-bf16-3": (ADAM, 3, {"lora": "all-linear", "dtype": "bf16", "small stay whole": True}),
    "lora-embedding-3": (SGD, 3, {"lora": "embed_tokens", "tie": False}),
    "lora-offload-2": (ADAM, 2, {"lora": "all-linear", "offload": True}),
}


MIXTURE = {
    **{f"mixture-sgd-{s}": (SGD, s, {"folder": "mixture", "checkpointing": s == 3}) for s in (1, 2, 3)},
    "mixture-bf16-2": (ADAM, 2, {"folder": "mixture", "dtype": "bf16"}),
    "mixture-lora-3": (ADAM, 3, {"folder": "mixture", "lora": "all-linear"}),
}


PICTURES = {
    **{f"qwen2_5-trained-{s}": (SLOW, s, {"folder": "qwen2_5_vl", "vision": "trained"}) for s in (1, 2, 3)},
    "qwen2_5-frozen-3": (SLOW, 3, {"folder": "qwen2_5_vl", "vision": "frozen"}),
    "qwen3-projector-2": (SLOW, 2, {"folder": "qwen3_vl", "vision": "projector"}),
    "qwen3-trained-3": (SLOW, 3, {"folder": "qwen3_vl", "vision": "trained", "checkpointing": True}),
    "qwen3-bf16-3": (SLOW, 3, {"folder": "qwen3_vl", "vision": "trained", "dtype": "bf16"}),
    **{f"mllama-trained-{s}": (SLOW, s, {"folder": "mllama", "vision": "trained"}) for s in (1, 2, 3)},
    "mllama-frozen-2": (SLOW, 2, {"folder": "mllama", "vision": "frozen"}),
    "mllama-frozen-3": (SLOW, 3, {"folder": "mllama", "vision": "frozen"}),
}


def load(cfg):
    """The model; adapters as after some training, no longer zero, and the same on all ranks."""
    model = load_model(cfg, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer in lora.layers(model).values():
        for p in lora.factors(layer).values():
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model


def engines(folder, world, cases=CASES):
    """Each case against the local engine, and that one against itself with its gradients shaken."""
    found, wanted, bounds = {}, {}, {}
    for name, (cfg, stage, options) in cases.items():
        tie, value = options.get("tie", True), options.get("value", False)
        base = options.get("folder", "tied" if tie else "untied")
        model = ModelConfig(
            path=str(folder / base),
            dtype=options.get("dtype", "fp32"),
            gradient_checkpointing=options.get("checkpointing", False),
            lora=LoraConfig(rank=3, targets=[options["lora"]]) if "lora" in options else LoraConfig(),
            vision=options.get("vision", "frozen"),
        )
        eyes = load_vision(model)
        plain = model.model_copy(update={"lora": LoraConfig()})
        key = (cfg.optimizer, base, value, model.dtype, options.get("lora"), model.vision)
        if key not in wanted:
            alone = [LocalEngine(Policy(load(model), OBJECTIVE, value, eyes), cfg, 0.05) for _ in range(2)]
            shake = Shake(model.dtype)
            wanted[key], shaken = measure(alone[0]), measure(alone[1], shake)
            # What is compared is a sum itself (a loss over its tokens, a norm): its own rounding comes on top.
            bounds[key] = {what: spread + shake.share for what, spread in compare(shaken, wanted[key]).items()}
        # DeepSpeed keeps small parameters whole on every rank: here all of them are small, so most cases switch that off.
        threshold = 100_000 if options.get("small stay whole") else 0
        deepspeed.zero_config = lambda *a, t=threshold: with_threshold(zero_config(*a), t)
        settings = EngineConfig(kind="deepspeed", zero_stage=stage, offload=options.get("offload", False))
        with deepspeed.cut_while_loading(settings, pick_dtype(model, torch.device("cpu")), torch.device("cpu")):
            policy = Policy(load(model), OBJECTIVE, value, eyes)
        engine = DeepSpeedEngine(policy, cfg, settings, world, partial(load_model, plain, torch.device("cpu")), 0.05)
        errors = compare(measure(engine), wanted[key])
        found[name] = {what: (error, bounds[key][what]) for what, error in errors.items()}
        if name in ("untied-3", "mixture-sgd-3"):
            found["gathered at once"] = gathered_at_once(engine)
            engine.export(folder / "export")
            found["export"] = exported(engine, folder / "export")
        assert all(g.master.dtype == torch.float32 for g in engine.groups)
        low = {g.low.untyped_storage().data_ptr() for g in engine.groups}
        if settings.offload:
            assert not any(g.master.untyped_storage().data_ptr() in low for g in engine.groups), "masters of their own"
        assert all(b.dtype == torch.float32 for b in policy.model.buffers()), "rotary frequencies must stay fp32"
    deepspeed.zero_config = zero_config
    return found


def with_threshold(config, threshold):
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    return config


def gathered_at_once(engine):
    """Most bytes of whole parameters that are there at any time while they are gathered in groups of 3000 bytes."""
    params = list(engine.policy.model.parameters())
    return max(sum(p.data.numel() * p.element_size() for p in params) for _ in engine.named_full_params(max_bytes=3000))


def exported(engine, folder):
    """How far logits of the exported folder, loaded by transformers, are from those of the engine's own copy."""
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        return far(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, engine.plain_copy()(ids).logits)


RUN = [
    *("--train.steps", "4", "--train.warmup_steps", "1", "--train.lr", "0.01", "--train.method", "amft"),
    *("--controller.signal", "balanced"),
    *("--train.prompts_per_step", "3", "--train.demos_per_step", "3", "--rollout.num_generations", "3"),
    *("--rollout.max_new_tokens", "4", "--log.to", "[]", "--eval.every", "2", "--eval.num_samples", "2"),
    *("--checkpoint.every", "1", "--checkpoint.keep_last", "9", "--log.samples_every", "1", "--run.threads", "1"),
    *("--run.device", "cpu", "--controller.window", "2", "--meta.prompts", "2", "--meta.num_generations", "4"),
]
GAE = [
    *("--train.method", "fixed", "--advantage.kind", "gae", "--train.minibatches_per_rollout", "3"),
    *("--objective.kl_coef", "0.1", "--train.steps", "2", "--advantage.value_lr", "0.01"),
]
LORA = ["--model.lora.rank", "3", "--objective.kl_coef", "0.1"]


def train(folder, model, *flags, resume=False):
    cfg = config_file.load(None, ["--run.dir", str(folder), "--model.path", str(model), *RUN, *flags])
    assert launch.train(cfg, resume, CopyTask()) == 0


def zero(stage):
    return ("--engine.kind", "deepspeed", "--engine.zero_stage", str(stage))


def runs(folder, world):
    """Whole runs at each stage, with two kinds of advantage; one resumed at the same stage, one at another."""
    model = folder / "tied"
    for stage in (1, 2, 3):
        train(folder / f"zero{stage}", model, *zero(stage))
    train(folder / "gae3", model, *zero(3), *GAE)
    train(folder / "lora1", model, *zero(1), *LORA)
    train(folder / "lora3", model, *zero(3), *LORA)
    for name, stage, *flags in (("again", 3), ("from3to2", 2), ("lora3to1", 1, *LORA)):
        train(folder / name, model, *zero(3), *flags)
        if world.main:
            for step in (4, 5):
                (folder / name / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("damaged")
        world.barrier()
        train(folder / name, model, *zero(stage), *flags, resume=True)
    a, b = (checkpoint.load(folder / n / "checkpoints" / "step-000005")[0] for n in ("zero3", "again"))
    return {"resumed exactly": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)}


def long(folder, world, steps, *options):
    """A run to be killed, and resumed."""
    (folder / f"pid{world.rank}").write_text(str(os.getpid()))
    flags = (
        *zero(3),
        "--train.method",
        "fixed",
        "--train.steps",
        steps,
        "--checkpoint.every",
        "3",
        "--eval.every",
        "0",
    )
    train(folder / "long", folder / "tied", *flags, resume="--resume" in options)


# Six steps without evaluations.
MIXED = [
    *(
        "--train.steps",
        "6",
        "--train.warmup_steps",
        "0",
        "--eval.every",
        "0",
        "--eval.splits",
        "[]",
        "--checkpoint.every",
        "0",
    ),
    *("--checkpoint.export", "false", "--mixture.relift_buffer", "2", "--mixture.gac_every", "2"),
]
# Two steps imitate and are taken back.
BLOCKS = [
    *("--train.method", "amft", "--controller.signal", "blocks", "--controller.look_prompts", "2"),
    *("--controller.imitation_share", "0.34", "--controller.confidence", "1e9"),
]
KEPT = ("--checkpoint.every", "1", "--checkpoint.keep_last", "9")
MIXTURES = ("hpt", "luffy", "relift", "prefix_rft", "gac")


def mixtures(folder, world):
    """A run of each method that mixes in a way of its own, at a stage each."""
    for i, method in enumerate(MIXTURES):
        train(folder / method, folder / "tied", *MIXED, "--train.method", method, *zero(1 + i % 3))
    train(folder / "blocks", folder / "tied", *MIXED, *BLOCKS, *zero(3))
    train(folder / "blocks3to2", folder / "tied", *MIXED, *BLOCKS, *KEPT, *zero(3))
    if world.main:  # in the middle of the block that is taken back
        for step in range(2, 7):
            (folder / "blocks3to2" / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("damaged")
    world.barrier()
    train(folder / "blocks3to2", folder / "tied", *MIXED, *BLOCKS, *KEPT, *zero(2), resume=True)


SEEING = [
    *("--train.steps", "3", "--train.method", "fixed", "--controller.mu_init", "0.5", "--model.vision", "trained"),
    *("--train.prompts_per_step", "3", "--train.demos_per_step", "3", "--rollout.num_generations", "3"),
    *("--train.micro_batch_tokens", "200", "--log.to", "[]", "--log.samples_every", "1", "--eval.every", "0"),
    *("--eval.splits", "[]", "--run.device", "cpu", "--checkpoint.keep_best", "false"),
]
BALANCED = ("--model.router_aux_coef", "0.1")


def mixture_of_experts(folder, world):
    """A Qwen3-MoE in each engine, and a whole run at stage 3."""
    if world.main:
        make_checkpoint(folder / "mixture", experts=6)
    world.barrier()
    deepspeed.import_deepspeed(torch.device("cpu"))
    found = {"world": world.size, "engines": engines(folder, world, MIXTURE)}
    train(folder / "mixture3", folder / "mixture", *zero(3), *BALANCED)
    if world.main:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    world.barrier()


def pictures(folder, world, *only):
    """Vision-language models in each engine, and a whole run whose eyes are trained at stage 3."""
    if world.main:
        for kind in KINDS:
            make_vlm(folder / kind, kind)
    world.barrier()
    deepspeed.import_deepspeed(torch.device("cpu"))
    cases = {name: case for name, case in PICTURES.items() if not only or name in only}
    found = {"world": world.size, "engines": engines(folder, world, cases)}
    if not only:
        see(folder / "seeing3", *zero(3))
    if world.main:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    world.barrier()


def see(folder, *flags):
    """Three steps of General Points in pictures, which the policy learns to read."""
    config = Path(__file__).resolve().parent.parent / "configs/demo_gp_vl.toml"
    cfg = config_file.load(config, ["--run.dir", str(folder), *SEEING, *flags])
    assert launch.train(cfg, False) == 0


def main(folder, *what):
    torch.set_num_threads(1)
    world = distributed.join(torch.device("cpu"))
    if world.main:
        make_checkpoint(folder / "tied", tie=True)
        make_checkpoint(folder / "untied", tie=False)
    world.barrier()
    if what:
        work = {"long": long, "mixtures": mixtures, "experts": mixture_of_experts, "pictures": pictures}
        return work[what[0]](folder, world, *what[1:])
    deepspeed.import_deepspeed(torch.device("cpu"))
    found = {"world": world.size, "engines": engines(folder, world)}
    if world.main:
        (folder / "engines.json").write_text(json.dumps(found))
    found["runs"] = runs(folder, world)
    if world.main:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

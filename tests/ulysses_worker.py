"""What the processes of tests/test_ulysses.py run: `torchrun ... ulysses_worker.py FOLDER`; rank 0 writes FOLDER/found.json.

Two or four processes that share packed rows are held against one that has them whole.
"""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import scale_worker as scale
import torch
from fakes import make_checkpoint
from scale_worker import ADAM, OBJECTIVE, SGD, far
from transformers import AutoConfig, AutoModelForCausalLM

from amft_fast import config_file, objective
from amft_fast.config import EngineConfig, LoraConfig, ModelConfig
from amft_fast.data import packing
from amft_fast.data.batch import collate, micro_batches
from amft_fast.doctor import memory as plan
from amft_fast.doctor import shapes
from amft_fast.engine import deepspeed
from amft_fast.engine import world as distributed
from amft_fast.engine.deepspeed import DeepSpeedEngine, zero_config
from amft_fast.engine.local import LocalEngine
from amft_fast.model import attention, layers
from amft_fast.model.policy import Policy, load_model, pick_dtype
from amft_fast.model.ulysses import Ulysses

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------ attention


def attend(layout, q, k, v, grad, window, ulysses=None):
    """The output of our attention function and the gradients of its inputs, of tensors [1, A, T, D]."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, _ = attention.attention(
        torch.nn.Module(), q, k, v, None, sliding_window=window, amft_layout=layout, amft_ulysses=ulysses
    )
    out.backward(grad)
    return [out.detach(), *(x.grad.transpose(1, 2) for x in (q, k, v))]


def attentions(world, size):
    """The largest error of output and gradients, by heads of keys and values: whole rows against this rank's tokens of them."""
    shared = world.neighbours(size)
    ulysses, found = Ulysses(size, shared.group), {}
    for groups in (4, 2, 1):
        errors = []
        for seed, (lengths, prefix, window) in enumerate(
            [((1,), 0, None), ((2, 3), 0, None), ((7, 9, 8), 4, None), ((13, 6, 6), 5, 3), ((40, 33, 20), 0, None)]
        ):
            g = np.random.default_rng(seed)
            ids = [np.concatenate([np.arange(prefix), g.integers(5, 13, n)]) for n in lengths]
            layout = packing.pack(ids, [prefix] * len(ids)).layout
            generator = torch.Generator().manual_seed(seed)
            tokens, part = layout.tokens, -(-layout.tokens // size)
            q, k, v, grad = (torch.randn(1, a, tokens, 8, generator=generator) for a in (4, groups, groups, 4))
            want = attend(layout, q, k, v, grad.transpose(1, 2), window)

            def mine(x, dim, part=part):
                pad = [0, 0] * (x.dim() - 1 - dim) + [0, part * size - x.shape[dim]]
                return torch.nn.functional.pad(x, pad).narrow(dim, shared.rank * part, part)

            got = attend(layout, *(mine(x, 2) for x in (q, k, v)), mine(grad.transpose(1, 2), 1), window, ulysses)
            errors += [float((a - mine(b, 1)).abs().max()) for a, b in zip(got, want)]
        found[f"{groups} by {size}"] = max(world.gather([max(errors)]))
    return found


# -------------------------------------------------------------------------------------------------------------- engines

# Optimizer, ZeRO stage, how many share a row, and what else is asked for.
CASES = {
    **{f"adam-{s}-by-{size}": (ADAM, s, size, {}) for s in (1, 2, 3) for size in (2, 4)},
    "untied-value-3": (SGD, 3, 4, {"tie": False, "value": True}),
    "selective-2": (ADAM, 2, 2, {"checkpointing": "selective"}),
    "offload-2": (ADAM, 2, 4, {"offload": True}),
    "lora-3": (ADAM, 3, 2, {"lora": "all-linear"}),
    "tiles-2": (ADAM, 2, 2, {"tile": 2}),
    "tiles-checkpointed-away-3": (ADAM, 3, 2, {"tile": 2, "checkpointing": True, "away": True}),
}


def model_of(folder, options):
    return ModelConfig(
        path=str(folder / ("tied" if options.get("tie", True) else "untied")),
        gradient_checkpointing=options.get("checkpointing", False),
        lora=LoraConfig(rank=3, targets=[options["lora"]]) if "lora" in options else LoraConfig(),
    )


def make_engine(folder, world, size, cfg, stage, options):
    """A DeepSpeed engine whose ranks share rows by `size`."""
    deepspeed.zero_config = lambda *a: scale.with_threshold(zero_config(*a), 0)
    settings = EngineConfig(
        kind="deepspeed", zero_stage=stage, offload=options.get("offload", False), sequence_parallel=size
    )
    model = model_of(folder, options)
    with deepspeed.cut_while_loading(settings, pick_dtype(model, CPU), CPU):
        policy = Policy(scale.load(model), OBJECTIVE, with_value=options.get("value", False))
    if "tile" in options:
        layers.tile_mlps(policy.model, options["tile"])
    if "away" in options:
        policy.saving = layers.Offload(policy.model, smallest=1)
    plain = model.model_copy(update={"lora": LoraConfig()})
    return DeepSpeedEngine(policy, cfg, settings, world, partial(load_model, plain, CPU), 0.05)


def local_engine(folder, cfg, options):
    policy = Policy(scale.load(model_of(folder, options)), OBJECTIVE, with_value=options.get("value", False))
    return LocalEngine(policy, cfg, 0.05)


def engines(folder, world, names):
    """Each case against the local engine, and that one against itself with its gradients shaken."""
    found, wanted, bounds = {}, {}, {}
    for name in names:
        cfg, stage, size, options = CASES[name]
        key = (cfg.optimizer, options.get("tie", True), options.get("value", False), options.get("lora"))
        if key not in wanted:
            shake = scale.Shake("fp32")
            wanted[key], shaken = (scale.measure(local_engine(folder, cfg, options), x) for x in (scale.leave, shake))
            bounds[key] = {w: spread + shake.share for w, spread in scale.compare(shaken, wanted[key]).items()}
        engine = make_engine(folder, world, size, cfg, stage, options)
        errors = scale.compare(scale.measure(engine), wanted[key])
        assert "away" not in options or engine.policy.saving.moved > 0
        found[name] = {what: (error, bounds[key][what]) for what, error in errors.items()}
    return found


def lengths(folder, world, sizes):
    """Gradients, log-probs and values of a lone sequence of each length, and of groups that share a prompt."""
    found = {}
    for size in sizes:
        options = {"value": True}
        engine, alone = make_engine(folder, world, size, SGD, 3, options), local_engine(folder, SGD, options)
        for seqs in [scale.sequences(k, (k,), rl=True) for k in range(1, 14)] + [
            scale.sequences(9, (5, 4, 3), rl=True)
        ]:
            seqs = scale.give_returns(engine.policy, seqs)
            batch = micro_batches(seqs, 1000, True)[0]  # the same on all ranks: shared by some, or weighed once by all
            loss = alone.backward(batch).loss
            share = engine.world.size // size
            got = float(engine.all_reduce(engine.backward(batch).loss)) / share
            errors = [far(got, loss)]
            got, want = (scale.whole(e, e.take_gradient()) for e in (engine, alone))
            errors.append(far(torch.cat([got[n] / share for n in want]), torch.cat([*want.values()])))
            ours, theirs = engine.logprobs(batch), alone.logprobs(batch)
            errors += [far(getattr(ours, n), getattr(theirs, n)) for n in ("logprobs", "entropy")]
            errors.append(far(engine.logprobs(batch, engine.plain_copy()).logprobs, theirs.logprobs))
            found[f"{len(seqs)} of {len(seqs[0].ids)} by {size}"] = max(world.gather([max(errors)]))
    return found


# --------------------------------------------------------------------------------------------------------------- memory

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def kept(world, sizes):
    """(bytes that a forward pass keeps for the backward pass on this rank, what `doctor --plan` says), by ranks that share."""
    found = {}
    for size in sizes:
        shared = world.neighbours(size)
        config = AutoConfig.for_model("qwen2", **SMALL)
        attention.register()
        policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="amft_packed"), OBJECTIVE)
        policy.ulysses = Ulysses(size, shared.group)
        cfg = config_file.load(
            None,
            [
                *shared_rows(3, size),
                *("--rollout.max_new_tokens", "224", "--train.micro_batch_tokens", "16", "--train.method", "sft"),
                *("--train.demos_per_step", str(world.size // size), "--task.general_points.max_turns", "1"),
            ],
        )
        demo = objective.demo_sequence([1] * 32, [2] * 225)  # the last token is not read
        batch = collate(objective.weigh_sft([demo], 1.0, 225), [0], True).part(shared.rank, size)
        known = {p.untyped_storage()._cdata for p in [*policy.parameters(), *policy.buffers()]}
        held = []

        def pack(t, held=held):
            held.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            policy.hidden_rows(batch)
        stores = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        machine = plan.Machine(world.size, 1e9, "cpu", prompt_tokens=32)
        at, shape = plan.Layout.of(cfg, machine), shapes.shape_of(config, "small", "test")
        planned = plan.layers_bytes(cfg, shape, at)[0] + plan.final_norm_bytes(shape, at)
        found[str(size)] = (sum(n for key, n in stores.items() if key not in known), planned)
    return found


# ----------------------------------------------------------------------------------------------------------- whole runs

GAE = [*scale.GAE, *("--model.mlp_tile", "2", "--model.gradient_checkpointing", "true")]


def shared_rows(stage, size):
    return (*scale.zero(stage), "--engine.sequence_parallel", str(size))


def runs(folder, world):
    """Whole runs on rows shared by two and four; one goes on where two shared rows, with four."""
    scale.train(folder / "by2", folder / "tied", *shared_rows(3, 2))
    scale.train(folder / "gae4", folder / "tied", *shared_rows(2, 4), *GAE)
    if world.main:
        shutil.copytree(folder / "by2", folder / "from2to4", symlinks=True)
        for step in (4, 5):
            (folder / "from2to4" / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("damaged")
    world.barrier()
    scale.train(folder / "from2to4", folder / "tied", *shared_rows(1, 4), resume=True)


def main(folder, *what):
    """`what`: the cases to run, in place of everything."""
    torch.set_num_threads(1)
    world = distributed.join(CPU)
    if world.main:
        make_checkpoint(folder / "tied", heads=(4, 2))
        make_checkpoint(folder / "untied", heads=(4, 2), tie=False)
    world.barrier()
    deepspeed.import_deepspeed(CPU).init_distributed(dist_init_required=False)
    sizes = [size for size in (2, 4) if size <= world.size]
    found = {"world": world.size}
    if not what:
        found["attention"] = {k: x for size in sizes for k, x in attentions(world, size).items()}
        found["lengths"] = lengths(folder, world, sizes)
        found["kept"] = kept(world, sizes)
    found["engines"] = engines(folder, world, what or CASES)
    if world.main:
        (folder / "found.json").write_text(json.dumps(found, indent=1))
    if not what:
        runs(folder, world)
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

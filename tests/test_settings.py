"""Every setting is named in some test; and here are those that no other test sets."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import CopyTask
from tiny_vlm import make_vlm
from transformers import AutoTokenizer

from amft_fast import cli, config_file, controller, objective
from amft_fast.advantages import turn_advantages
from amft_fast.config import (
    AdvantageConfig,
    Config,
    EngineConfig,
    LoraConfig,
    MathConfig,
    MetaConfig,
    ModelConfig,
    VirlConfig,
)
from amft_fast.data.batch import micro_batches
from amft_fast.data.loader import Loader
from amft_fast.data.stream import Stream
from amft_fast.doctor import memory, shapes
from amft_fast.engine.deepspeed import zero_config
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample, Turn
from amft_fast.meta_gradient import UtilityGradient
from amft_fast.model.vision import load_vision
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.vllm.server import ServerProcess
from amft_fast.tasks.math.task import MathTask
from amft_fast.tasks.virl.task import Virl

ROOT = Path(__file__).parent.parent


def test_every_setting_is_named_in_a_test():
    """By its dotted name, as an argument (`lr=`) or as a key ("lr")."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))

    def named(setting):
        leaf = setting.rpartition(".")[2]
        return re.search(rf'{re.escape(setting)}\b|\b{leaf}\s*=(?!=)|__{leaf}\b|"{leaf}"', text)

    assert [s for s in config_file.setting_names(Config) if not named(s)] == []


# ----------------------------------------------------------------------------------------------------------- a small run


def test_a_small_run_by_settings_that_no_other_run_has(tmp_path, capfd):
    """Learning rates, the schedule of evaluations, the best checkpoint, progress and dynamic sampling, in one run."""
    flags = [
        *("--run.dir", str(tmp_path / "run"), "--run.threads", "1", "--train.method", "fixed", "--train.steps", "4"),
        *("--train.lr", "1e-3", "--train.lr_schedule", "linear", "--train.lr_warmup_steps", "2"),
        *("--train.adam_eps", "1e-6", "--train.data_workers", "1", "--train.prompts_per_step", "2"),
        *("--train.demos_per_step", "2", "--rollout.num_generations", "2", "--rollout.dynamic_sampling", "true"),
        *("--rollout.max_redraws", "1", "--eval.every", "2", "--eval.max_prompts", "2", "--eval.num_samples", "2"),
        *("--eval.schedule_splits", '["ood"]', "--eval.schedule_num_samples", "3", "--eval.schedule_max_prompts", "2"),
        *("--checkpoint.metric", "ood/sampled", "--checkpoint.keep_best", "true", "--checkpoint.export", "false"),
        *("--log.progress", "true", "--log.to", "[]"),
    ]
    assert cli.main(["train", str(ROOT / "configs" / "demo.toml"), *flags]) == 0
    steps, evals = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evals.jsonl")
    )
    # A rise over two steps, on a fall to a tenth at the end of the run.
    assert [s["lr"] for s in steps] == pytest.approx([5e-4, 7.75e-4, 5.5e-4, 3.25e-4])
    assert all({"dynamic/flat", "dynamic/redraws"} <= s.keys() and s["dynamic/redraws"] <= 1 for s in steps)
    whole, scheduled = [e for e in evals if e["full"]], [e for e in evals if not e["full"]]
    assert [e["at"] for e in scheduled] == [2] and len(whole) == 2
    assert scheduled[0].keys() & {"train", "val", "test", "ood"} == {"ood"} and scheduled[0]["ood"]["k"] == 3
    assert all(e["ood"]["k"] == 2 for e in whole)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir(), "the best by checkpoint.metric is kept"
    assert "4/4" in capfd.readouterr().err, "a bar on stderr, though that is no terminal"


def test_imitation_has_a_learning_rate_of_its_own(tmp_path):
    flags = [
        *("--run.dir", str(tmp_path / "run"), "--run.threads", "1", "--train.method", "sft", "--train.steps", "1"),
        *("--train.lr", "1e-3", "--train.sft_lr", "2e-4", "--train.demos_per_step", "2", "--eval.every", "0"),
        *("--train.prompts_per_step", "1", "--rollout.num_generations", "2", "--train.lr_schedule", "constant"),
        *("--eval.max_prompts", "1", "--eval.num_samples", "1", "--checkpoint.export", "false"),
        *("--train.lr_warmup_steps", "0", "--train.warmup_steps", "1", "--log.to", "[]"),
    ]
    assert cli.main(["train", str(ROOT / "configs" / "demo.toml"), *flags]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [2e-4, 2e-4]


# ------------------------------------------------------------------------------------------------------- part by part


@pytest.mark.parametrize("flags", [("--rollout.min_p", "0.1"), ("--rollout.top_k", "5")])
def test_cuts_of_the_distribution_are_refused_in_training(flags):
    with pytest.raises(UserError, match="top_p, top_k and min_p must stay 1, 0 and 0"):
        config_file.load(None, list(flags))


@pytest.mark.parametrize("method", ["linear", "cosine"])
def test_schedules_of_mu_go_from_start_to_end(method):
    flags = ["--train.method", method, "--train.steps", "11"]
    c = controller.make(
        config_file.load(None, [*flags, "--controller.schedule_start", "0.7", "--controller.schedule_end", "0.3"])
    )
    assert [c.mu(t) for t in (0, 5, 10)] == pytest.approx([0.7, 0.5, 0.3])


def test_noise_memory_is_the_decay_of_the_running_variance():
    c = controller.MetaController(config_file.load(None, ["--controller.noise_memory", "0.75"]))
    for half1, half2 in ((0.5, 0.1), (0.3, -0.3)):
        c.sums["half1"], c.sums["half2"], c.probed = half1, half2, 1
        c._meta_part({})
    assert c.variance == pytest.approx(0.75 * 0.2**2 + 0.25 * 0.3**2)


def test_turn_gamma_discounts_the_turns_to_come():
    samples = []
    for group, rewards in ((0, (0.0, 1.0)), (0, (1.0, 0.0))):
        s = Sample([2], [5, 1, 6, 1], [1, 1, 1, 1], [-1.0] * 4, 0, "stop", "p", group)
        s.turns = [Turn(2, rewards[0], "a"), Turn(4, rewards[1], "b")]
        samples.append(s)
    rl = [objective.rollout_sequence(s, 1.0) for s in samples]
    objective.set_advantages(rl, samples, AdvantageConfig(kind="dr_grpo", level="turn", turn_gamma=0.5))
    rewards, states = [np.array([0.0, 1.0]), np.array([1.0, 0.0])], [["a", "b"]] * 2
    want = turn_advantages(rewards, states, np.array([0, 0]), "dr_grpo", gamma=0.5)
    assert [s.fields["advantages"][[1, 3]].tolist() for s in rl] == [pytest.approx(w.tolist()) for w in want]
    assert want[0].tolist() == pytest.approx([-0.25, 0.5]), "0 + 0.5 · 1 against 1 + 0.5 · 0"


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_demo_weight_scales_demonstrations_in_the_hybrid_utility(checkpoint_folder, weight):
    """Half of the groups fail: each half's demonstrations weigh as their share of the groups, times the setting."""
    task = CopyTask()
    items, demos = task.prompts("train"), {d.id: d for d in task.demos("train")}
    cfg = MetaConfig(utility="hybrid", prompts=4, num_generations=2, memory=0.0, demo_weight=weight)
    encoder = Encoder(AutoTokenizer.from_pretrained(checkpoint_folder))
    utility = UtilityGradient(cfg, items, demos, encoder, None, lambda s: micro_batches(s, 100, False), 1.0)

    def draw(asked, step):
        out = []
        for g, item in enumerate(asked):
            for reward in (float(item.data in "ab"), 0.0):
                s = Sample([2, 5, 3], [5], [1], [-1.0], step, "stop", item.id, g)
                s.reward, s.success = reward, reward > 0
                out.append(s)
        return out

    utility.cache.refresh(0, draw)
    sequences = utility._sequences([0, 1, 2, 3], {"useful_groups": 0, "demo_groups": 0})
    weights = [s.fields["nll_weight"][s.trained].sum() for s in sequences if "nll_weight" in s.fields]
    assert len(weights) == 2 and sum(weights) == pytest.approx(weight * 2 / 4)


def test_points_of_generated_routes_lie_as_far_apart_as_spacing_says():
    dense, sparse = (
        Virl(VirlConfig(num_train=8, num_val=1, num_test=1, cities=1, spacing=s)).prompts("train") for s in (20.0, 60.0)
    )
    many, few = (sum(len(i.data.points) for i in items) for items in (dense, sparse))
    assert many > 1.5 * few


def test_alpha_scales_the_product_of_the_factors(checkpoint_folder):
    pytest.importorskip("peft")
    from amft_fast.model import lora
    from amft_fast.model.policy import load_model

    scales = []
    for alpha in (None, 2.0):
        cfg = ModelConfig(path=str(checkpoint_folder), lora=LoraConfig(rank=4, alpha=alpha))
        layer = next(iter(lora.layers(load_model(cfg, torch.device("cpu"))).values()))
        scales.append(layer.scaling["default"])
    assert scales == [2.0, 0.5]


def test_larger_pictures_than_max_pixels_become_fewer_tokens(tmp_path):
    from PIL import Image

    folder = make_vlm(tmp_path, "qwen3_vl")
    counts = []
    for limit in (None, 256):
        vision = load_vision(ModelConfig(path=str(folder), max_pixels=limit))
        ids = vision.expand([vision.image_token], [Image.new("RGB", (64, 64))])
        counts.append(sum(i == vision.image_token for i in ids))
    assert counts[0] > counts[1] == 256 // 8**2


def test_reduce_dtype_is_deepspeeds_communication_type_and_is_planned_for():
    cfg = EngineConfig(kind="deepspeed", reduce_dtype="bf16")
    assert zero_config(cfg, torch.bfloat16, torch.device("cpu"))["communication_data_type"] == "bf16"
    machine, shape = memory.Machine(8, 80e9), shapes.find("Qwen/Qwen2.5-Math-1.5B")
    bytes_of = {}
    for dtype in ("fp32", "bf16"):
        flags = ["--engine.kind", "deepspeed", "--engine.reduce_dtype", dtype, "--task.general_points.max_turns", "1"]
        parts = memory.memory(config_file.load(None, flags), shape, machine).phases["update"]
        bytes_of[dtype] = next(p.bytes for p in parts if p.name == "communication")
    assert bytes_of["bf16"] < bytes_of["fp32"]


def test_a_server_starts_under_the_python_that_is_set(tmp_path):
    """rollout.vllm.python; without it the trainer's own."""
    made = {"host": "127.0.0.1", "log": tmp_path / "log", "api_key": None}
    assert ServerProcess({}, **made).python == sys.executable
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$0 $@" > {tmp_path}/asked\n')
    python.chmod(0o755)
    server = ServerProcess({}, python=str(python), **made)
    server.start()
    assert server.process.wait(60) == 0
    server.stop()
    assert (tmp_path / "asked").read_text().startswith(f"{python} -m amft_fast.rollout.vllm.server")


@pytest.mark.parametrize("limits", [{"max_prompt_tokens": 4}, {"max_demo_tokens": 2}], ids=str)
def test_longer_problems_and_demonstrations_are_left_out(tmp_path, limits):
    """max_prompt_tokens: the problem goes; max_demo_tokens: its demonstration alone."""
    rows = [
        {"problem": "What is 1 + 1?", "answer": "2", "solution": "It is \\boxed{2}."},
        {
            "problem": "What is " + " + ".join("1" * 40) + " in all?",
            "answer": "40",
            "solution": "Sum " * 40 + "\\boxed{40}",
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = MathTask(MathConfig(train=[str(path)], val_share=0, **limits))
    task.prepare()
    free = MathTask(MathConfig(train=[str(path)], val_share=0))
    free.prepare()
    assert (len(free.prompts("train")), len(free.demos("train"))) == (2, 2)
    assert len(task.demos("train")) < 2
    assert len(task.prompts("train")) == (2 if "max_demo_tokens" in limits else len(task.demos("train")))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_workers_change_nothing_but_who_reads(workers):
    loader = Loader(Stream(10, 0, "demos"), lambda i: i * i, workers)
    alone = Stream(10, 0, "demos")
    taken = [loader.take(4) for _ in range(3)]
    loader.close()
    assert taken == [[i * i for i in alone.take(4)] for _ in range(3)]

"""The V-IRL demo: its base checkpoint is what its recipe says, and the shipped config runs."""

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny_vlm import make_vlm
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast import config_file
from amft_fast.interfaces import Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import launch
from amft_fast.run.build import make_task
from amft_fast.tasks.virl.pretrain import Recipe, build_tokenizer

CONFIG = Path(__file__).parent.parent / "configs" / "demo_virl.toml"
SHIPPED = CONFIG.parent / "demo_virl_base"


def test_the_shipped_checkpoint_is_what_its_recipe_says():
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    assert recipe["model_sha256"] == sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    assert Recipe(**recipe["arguments"]) == Recipe()
    assert AutoTokenizer.from_pretrained(SHIPPED).get_vocab() == build_tokenizer().get_vocab()
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_000_000


@pytest.mark.parametrize("split", ["test", "ood"])
def test_the_shipped_checkpoint_walks_and_still_loses_its_way(split):
    task = make_task(config_file.load(CONFIG).task)
    encoder = Encoder(AutoTokenizer.from_pretrained(SHIPPED))
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32))
    samples = episodes.run(
        engine,
        task,
        task.prompts(split)[:40],
        encoder,
        Sampling(1.0, stop_token_ids=encoder.stop_token_ids),
        num_generations=2,
        max_new_tokens=8,
        seed_parts=(0,),
    )
    assert 0.3 < sum(s.info["step_accuracy"] for s in samples) / len(samples) < 0.95
    assert 0 < sum(s.success for s in samples) / len(samples) < 0.7


def test_the_demo_runs_a_few_steps_and_shows_its_walks(tmp_path, monkeypatch):
    flags = [
        *(
            "--run.dir",
            str(tmp_path),
            "--train.steps",
            "3",
            "--train.prompts_per_step",
            "4",
            "--train.demos_per_step",
            "4",
        ),
        *(
            "--rollout.num_generations",
            "3",
            "--train.method",
            "fixed",
        ),
        *("--eval.every", "0", "--eval.max_prompts", "4", "--eval.num_samples", "1", "--task.virl.num_train", "40"),
        *("--checkpoint.export", "false", "--log.to", "[]"),
    ]
    assert launch.train(config_file.load(CONFIG, flags)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["end"].keys() == {"train", "val", "test", "ood"}
    assert 0 < summary["end"]["test"]["step_accuracy"] <= 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(r["turns"] > 5 and r["sft_loss"] > 0 and "task/first_try" in r for r in records)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', page)) >= 2


def test_a_vision_language_policy_walks_with_views_in_its_own_and_in_other_cities(tmp_path):
    """Two steps of a tiny random Qwen3-VL, and an evaluation in distribution, under the other rule and in other looks."""
    model = make_vlm(tmp_path / "model", "qwen3_vl")
    flags = (
        "--train.steps 2 --train.prompts_per_step 2 --train.demos_per_step 2 --rollout.num_generations 2 --meta.prompts 2 "
        "--meta.num_generations 2 --rollout.max_new_tokens 4 --eval.every 0 --eval.max_prompts 2 --eval.num_samples 1 "
        "--task.virl.views true --task.virl.view_size 16 --task.virl.num_train 4 --task.virl.num_val 2 --task.virl.num_test 2 "
        "--task.virl.verify_turns 1 --log.to [] --checkpoint.export false"
    )
    legs = ["--task.virl.legs", "[1, 1]"]
    paths = ["--run.dir", str(tmp_path / "run"), "--model.path", str(model)]
    assert launch.train(config_file.load(CONFIG, [*paths, *legs, *flags.split()])) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for split in ("test", "ood", "visual_ood"):
        assert 0 <= summary["end"][split]["step_accuracy"] <= 1
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(r["grad_norm"] > 0 for r in steps)

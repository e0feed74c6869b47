"""The V-IRL demo: its base checkpoint is what its recipe says, and the shipped config runs."""

import json
import re
import signal
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast import config_file, run
from amft_fast.interfaces import Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.tasks.virl_pretrain import Recipe, build_tokenizer

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
    task = run.make_task(config_file.load(CONFIG).task)
    encoder = episodes.Encoder(AutoTokenizer.from_pretrained(SHIPPED))
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
            "--meta.prompts",
            "4",
            "--meta.num_generations",
            "2",
            "--controller.window",
            "2",
        ),
        *("--eval.every", "0", "--eval.max_prompts", "4", "--eval.num_samples", "1", "--task.virl.num_train", "40"),
        *("--checkpoint.export", "false", "--log.tensorboard", "false"),
    ]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert run.train(config_file.load(CONFIG, flags)) == 0
    finally:
        for s, h in handlers.items():
            signal.signal(s, h)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["end"].keys() == {"train", "val", "test", "ood"}
    assert 0 < summary["end"]["test"]["step_accuracy"] <= 1
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(r["turns"] > 5 and r["sft_loss"] > 0 and "task/first_try" in r for r in records)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', page)) >= 2

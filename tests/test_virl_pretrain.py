"""The base checkpoint of the V-IRL demo: its tokenizer, and the walks it is shown."""

import json
import random
from hashlib import sha256

import pytest
from transformers import AutoModelForCausalLM

from amft_fast.config import VirlConfig
from amft_fast.interfaces import Item
from amft_fast.rollout.encoder import Encoder
from amft_fast.tasks.tiny_base import ASSISTANT, USER, encode_turns
from amft_fast.tasks.virl.pretrain import Examples, Recipe, base_routes, build_tokenizer, main
from amft_fast.tasks.virl.task import Problem, Virl

SMALL = Recipe(cities=2, routes=20, wrong=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def task():
    return Virl(VirlConfig(answer_format="compact", num_train=60, num_val=10, num_test=20, cities=2))


def test_every_text_of_an_episode_has_tokens_of_its_own(tokenizer, task):
    texts = []
    for split in task.splits:
        for item in task.prompts(split):
            episode = task.start(item)
            texts.append(episode.messages[0].content)
            for answer in ("street 1 stop", "cross 2 stop", "x", "street 9 forward") * len(item.data.points):
                result = episode.step(answer)
                if result.done:
                    break
                texts.append(result.message.content)
        texts += [text for d in task.demos(split) for text in (d.response, *(answer for _, answer in d.more))]
    texts = list(dict.fromkeys(texts))
    for ids, text in zip(tokenizer(texts, add_special_tokens=False).input_ids, texts):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_sequences_are_what_an_episode_would_be(tokenizer, task):
    """The trained answers are right, the others wrong, and what is said between them is what the verifier says."""
    examples, rng, wrong = Examples(SMALL, tokenizer), random.Random(1), 0
    problems = [Problem(route, space, "base") for route in examples.routes for space in ("absolute", "relative")]
    by_opening = {task.start(Item("x", p)).messages[0].content: p for p in problems}
    for _ in range(40):
        ids, trained = examples.draw(rng)
        words = tokenizer.decode(ids).removeprefix("<bos> ").split(f"{USER} ")[1:]
        turns = [text.split(f"{ASSISTANT} ") for text in words]
        problem = by_opening[turns[0][0].strip()]
        episode = task.start(Item("x", problem))
        for i, (_, answer) in enumerate(turns):
            result = episode.step(answer.replace("<eos>", "").strip())
            wrong += result.info["kind"] != "correct"
            if i + 1 < len(turns):
                assert result.message.content == turns[i + 1][0].strip()
        assert result.info["success"]
        answers = [on for token, on in zip(ids, trained) if token == tokenizer.eos_token_id]
        assert len(answers) == len(turns) and answers.count(True) == len(problem.points)
        assert not trained[ids.index(tokenizer.convert_tokens_to_ids(ASSISTANT))]
    assert wrong > 40


def test_the_chat_template_writes_what_the_base_was_shown(tokenizer, task):
    encoder = Encoder(tokenizer)
    demo = task.demos("train")[0]
    prompt, response, mask, _ = encoder.demo(demo)
    turns = [(USER, demo.messages[0].content, False), (ASSISTANT, demo.response, True)]
    for message, answer in demo.more:
        turns += [(USER, message.content, False), (ASSISTANT, answer, True)]
    ids, trained = encode_turns(turns, tokenizer.get_vocab())
    assert prompt + response == ids and [bool(m) for m in mask] == trained[len(prompt) :]


def test_the_base_walks_in_cities_of_its_own():
    other = {i.data.route for i in Virl(VirlConfig(num_train=200, num_val=10, num_test=20)).prompts("train")}
    routes = base_routes(SMALL)
    assert len(routes) == 2 * 20 * SMALL.most_legs and not other & set(routes)
    assert sorted({len(r.legs) for r in routes}) == [1, 2]


def test_the_command_makes_a_folder_that_loads(tmp_path, capsys):
    main(
        [
            "--out",
            str(tmp_path),
            "--stop",
            "2",
            "--batch-size",
            "4",
            "--hidden-size",
            "32",
            "--num-layers",
            "1",
            "--cities",
            "1",
        ]
    )
    assert "step 2/2" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["arguments"]["stop"] == 2
    assert recipe["model_sha256"] == sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == recipe["parameters"]

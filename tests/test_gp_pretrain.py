"""The demo's base checkpoint: its tokenizer, the data it may see, and the shipped folder against its own recipe."""

import json
import random
from collections import Counter
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from amft_fast.config import GeneralPointsConfig
from amft_fast.tasks.general_points.bases import allowed_hands
from amft_fast.tasks.general_points.hands import RULES
from amft_fast.tasks.general_points.pretrain import (
    Examples,
    Recipe,
    all_expressions,
    build_tokenizer,
    main,
)
from amft_fast.tasks.general_points.task import GeneralPoints, Verdict, feedback_text, verify_formula

SHIPPED = Path(__file__).parent.parent / "configs" / "demo_base"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def task():
    return GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40), answer_format="formula"))


@pytest.fixture(scope="module")
def examples(tokenizer):
    return Examples(Recipe(), tokenizer)


def ids_of(tokenizer, conversation, **options):
    messages = [{"role": role, "content": content} for role, content in conversation]
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


# --------------------------------------------------------------------------------------------------------- tokenizer


@given(st.text("0123456789+-*/()= ", max_size=40))
@settings(deadline=None)
def test_a_decoded_formula_is_judged_as_the_text_was(text):
    tokenizer = build_tokenizer()
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.unk_token not in decoded:
        numbers = [4, 3, 2]
        assert verify_formula(decoded, numbers, 14).kind == verify_formula(text, numbers, 14).kind


def test_every_prompt_demo_and_feedback_has_tokens_of_its_own(tokenizer, task):
    texts = [demo.messages[0].content for split in task.splits for demo in task.demos(split)]
    texts += [demo.response for split in task.splits for demo in task.demos(split)]
    problem = task.prompts("train")[0].data
    for kind, value in [("illegal", None), ("wrong_number", 3), ("partial", 3), ("no_solution", Fraction(-7, 3))]:
        texts.append(feedback_text(problem, Verdict(kind, value), "formula"))
    for ids, text in zip(tokenizer(texts, add_special_tokens=False).input_ids, texts):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.split())


def test_the_chat_template_grows_turn_by_turn(tokenizer):
    turns = [("user", "J 4 7 faces 10 target 42"), ("assistant", "( 10 - 4 ) = 42"), ("user", "wrong numbers again")]
    first = ids_of(tokenizer, turns[:1], add_generation_prompt=True)
    assert tokenizer.decode(first) == "<bos> <user> J 4 7 faces 10 target 42 <assistant>"
    answer = tokenizer.encode(turns[1][1], add_special_tokens=False)
    second = ids_of(tokenizer, turns[:2])
    assert second == [*first, *answer, tokenizer.eos_token_id]
    third = ids_of(tokenizer, turns, add_generation_prompt=True)
    assert third[: len(second)] == second
    assert tokenizer.decode(third[len(second) :]) == "<user> wrong numbers again <assistant>"


def test_the_largest_number_is_one_token_and_a_larger_one_is_unknown(tokenizer):
    assert len(tokenizer.encode("99", add_special_tokens=False)) == 1
    assert tokenizer.encode("100", add_special_tokens=False) == [tokenizer.unk_token_id]


# -------------------------------------------------------------------------------------------------------------- data


def test_no_held_out_hand_is_shown(examples, tokenizer, task):
    held_out = {tuple(sorted(i.data.values)) for split in ("val", "test", "ood") for i in task.prompts(split)}
    seen, rules, turns = set(), Counter(), Counter()
    rng = random.Random(1)
    for _ in range(4000):
        words = tokenizer.decode(examples.draw(rng)[0]).split()
        cards, rule = words[2:5], "10" if words[6] == "10" else "11-12-13"
        counts = {"A": 1, **dict(zip("JQK", RULES[rule]))}
        seen.add(tuple(sorted(counts.get(card) or int(card) for card in cards)))
        rules[rule] += 1
        turns[words.count("<user>")] += 1
    assert not seen & held_out
    assert len(seen) > 250
    assert min(rules.values()) > 1500 and turns.keys() == {1, 2} and turns[2] > 100


def test_allowed_hands_are_training_hands_alone():
    for cards, targets in [(3, (1, 40)), (4, (24, 24))]:
        task = GeneralPoints(GeneralPointsConfig(num_cards=cards, targets=targets))
        splits = {task.assign_split(hand) for pool in allowed_hands(cards, 0).values() for hand in pool}
        assert splits == {"train", "ood_train"}


def test_labels_are_right_answers_and_prompts_are_not_trained_on(examples, tokenizer):
    rng = random.Random(2)
    for _ in range(300):
        ids, trained = examples.draw(rng)
        last_answer = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<assistant>"))
        assert trained == [False] * (last_answer + 1) + [True] * (len(ids) - last_answer - 1)
        assert ids[-1] == tokenizer.eos_token_id
        words = tokenizer.decode(ids[: ids.index(tokenizer.convert_tokens_to_ids("<assistant>"))]).split()
        counts = {"A": 1, **dict(zip("JQK", RULES["10" if words[6] == "10" else "11-12-13"]))}
        numbers = [counts.get(card) or int(card) for card in words[2:5]]
        answer = tokenizer.decode(ids[last_answer + 1 : -1])
        assert verify_formula(answer, numbers, int(words[-1])).kind == "correct"


def test_expressions_have_the_value_they_are_labelled_with():
    found = list(all_expressions((2, 7, 5)))
    assert all(verify_formula(text, [2, 5, 7], 1).value == value for text, value, _ in found)
    assert {"2-(7-5)", "2/(7*5)", "2*7-5", "(2-7)*5", "2-7*5"} <= {text for text, _, _ in found}


def test_batches_pad_on_the_right(examples, tokenizer):
    ids, labels = examples.batch(random.Random(3))
    assert ids.shape == labels.shape and ids.shape[0] == Recipe().batch_size
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    assert (labels[ids == tokenizer.pad_token_id] == -100).all()


# ----------------------------------------------------------------------------------------------------- the checkpoints


def test_the_command_makes_a_folder_that_loads(tmp_path, capsys):
    main(["--out", str(tmp_path), "--steps", "3", "--batch-size", "8", "--hidden-size", "32", "--num-layers", "1"])
    assert "step 3/3" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["arguments"]["steps"] == 3
    assert recipe["model_sha256"] == sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == recipe["parameters"]


def test_the_shipped_checkpoint_is_what_its_recipe_says():
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    assert recipe["model_sha256"] == sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    arguments = {**recipe["arguments"], "targets": tuple(recipe["arguments"]["targets"])}
    assert Recipe(**arguments) == Recipe()
    allowed = sorted({hand for pool in allowed_hands(3, 0).values() for hand in pool})
    assert recipe["data"]["hands_sha256"] == sha256(json.dumps(allowed).encode()).hexdigest()
    assert AutoTokenizer.from_pretrained(SHIPPED).get_vocab() == build_tokenizer().get_vocab()
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 5_000_000


@pytest.mark.parametrize("split", ["test", "ood"])
def test_the_shipped_checkpoint_can_play_and_can_still_learn(split, task):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    items = task.prompts(split)[:200]
    prompts = [
        ids_of(tokenizer, [("user", task.start(i).messages[0].content)], add_generation_prompt=True) for i in items
    ]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=14, num_return_sequences=8)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    tries = [(item, answer) for item, eight in zip(items, zip(*[iter(answers)] * 8)) for answer in eight]
    success = sum(task.start(item).step(answer).info["success"] for item, answer in tries) / len(tries)
    assert 0.12 < success < 0.45


def test_a_base_that_has_seen_held_out_hands_is_named():
    base = str(Path(__file__).parents[1] / "configs" / "demo_base")
    assert GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40))).warn_of_base(base) is None
    four = GeneralPointsConfig(num_cards=4, targets=(1, 40), max_train=10, max_val=10, max_test=10, max_ood=10)
    assert GeneralPoints(four).warn_of_base(base) is None
    assert GeneralPoints(GeneralPointsConfig(num_cards=3)).warn_of_base("no/such/base") is None
    moved = GeneralPoints(GeneralPointsConfig(num_cards=3, targets=(1, 40), seed=1))
    seen = {hand for pool in allowed_hands(3, 0).values() for hand in pool}
    held_out = [hand for hand in seen if moved.assign_split(hand) in ("val", "test", "ood")]
    assert f"pre-trained on {len(held_out)} of the hands" in moved.warn_of_base(base)

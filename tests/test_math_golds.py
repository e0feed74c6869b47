"""Golds and demonstrations as they are loaded, and chat templates that open the thought themselves."""

import json

import pytest

from amft_fast.config import MathConfig
from amft_fast.errors import UserError
from amft_fast.tasks.math.data import Store, load
from amft_fast.tasks.math.golds import agrees, gold_fault, is_gold
from amft_fast.tasks.math.sources import Source
from amft_fast.tasks.math.task import MathTask
from amft_fast.tasks.math.thinking import opened_thought, without_opening


@pytest.mark.parametrize(
    "text", ["", " ", "nan", "NaN", "inf", "None", "proof", "\\text{Proof}", "notfound", "N/A", "$$", "null."]
)
def test_what_is_no_gold(text):
    assert not is_gold(text) and gold_fault(text) == "no gold answer"


@pytest.mark.parametrize(
    "text", ["0", "-1", "\\text{No}", "\\infty", "no solution", "(a, b)", "\\text{none of them}", "A", "$x=5$"]
)
def test_what_is_one(text):
    assert is_gold(text) and gold_fault(text) == ""


def test_a_gold_that_nothing_could_match_is_named():
    for text in ("\\frac{1}{2", "x" * 3000, "5}"):
        assert gold_fault(text) == "gold answer that is not right against itself in a box"


def load_rows(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store()
    return load("rows", [Source(str(path))], lambda key: store), store, path


def test_bad_golds_are_left_out_with_their_rows(tmp_path):
    golds = ["5", "nan", "proof", "\\frac{1}{2", "7"]
    rows = [{"problem": f"problem number {i}", "answer": gold} for i, gold in enumerate(golds)]
    tally, store, path = load_rows(tmp_path, rows)
    assert [p.answer for p in store] == ["5", "7"]
    assert tally.counts == {"no gold answer": 2, "gold answer that is not right against itself in a box": 1}
    assert f"{path}:2" in tally.lines()[1] and f"{path}:4" in tally.lines()[2]
    with pytest.raises(UserError, match="2 no gold answer"):
        load_rows(tmp_path, [{"problem": "a b c", "answer": "nan"}, {"problem": "d e f", "answer": "None"}])


def test_demonstrations_are_checked_by_the_code_of_the_reward(tmp_path):
    """The first three were dropped as demonstrations with another answer."""
    pairs = [("0.\\overline{3}", "\\frac13"), ("(1,4)", "1<x<4"), ("2\\sqrt3", "\\sqrt{12}"), ("5", "6"), ("no", "on")]
    rows = [
        {"problem": f"problem {i} of five", "answer": gold, "response": f"So it is \\boxed{{{answer}}}."}
        for i, (gold, answer) in enumerate(pairs)
    ]
    tally, store, _ = load_rows(tmp_path, rows)
    assert [p.response is not None for p in store] == [True, True, True, False, False]
    assert tally.counts == {"demonstration with another answer (the problem is used without it)": 2}
    assert agrees("so \\boxed{\\dfrac12}", "1/2") and not agrees("so \\boxed{\\dfrac12", "1/2")


class Tokenizer:
    """A chat template that ends a prompt as reasoning models' do."""

    chat_template = "some"

    def __init__(self, ending):
        self.ending = ending

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return f"<user>{chat[0]['content']}<assistant>{self.ending}"

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [text.split() for text in texts]}


class Encoder:
    context = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def prompt(self, messages):
        return [0] * len(messages)


def test_a_template_that_opens_the_thought():
    assert opened_thought(Tokenizer("<think>\n")) == "<think>\n" and opened_thought(Tokenizer("")) == ""
    assert opened_thought(None) == "" and opened_thought(Tokenizer("<think>\n\n</think>\n\n")) == ""
    assert without_opening("<think>\na</think> b", "<think>\n") == "a</think> b"
    assert without_opening("<think>a</think> b", "<think>\n") == "a</think> b"
    assert without_opening("<think>\na</think> b", "") == "<think>\na</think> b"
    assert without_opening("a</think> b", "<think>\n") == "a</think> b"


@pytest.mark.parametrize("ending", ["", "<think>\n"])
def test_demonstrations_and_format_reward_go_on_behind_it(tmp_path, ending):
    path = tmp_path / "demos.jsonl"
    response = "<think>\ntwo and two</think> It is \\boxed{4}."
    path.write_text(json.dumps({"problem": "2 + 2?", "answer": "4", "response": response}) + "\n")
    task = MathTask(MathConfig(train=[str(path)], val_share=0.0, thinking=True, format_weight=0.5))
    task.prepare(Encoder(Tokenizer(ending)))
    (demo,), (item,) = task.demos("train"), task.prompts("train")
    assert demo.response == response.removeprefix(ending)
    assert task.start(item).step(demo.response).reward == 1.5
    other = response if ending else response.removeprefix("<think>\n")
    assert task.start(item).step(other).reward == 1.0

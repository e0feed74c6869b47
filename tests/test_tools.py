"""Tools: offered through the chat template, called in text, answered as a message; and no token is tokenised twice."""

import json
import re
from pathlib import Path

import pytest
from fakes import ScriptedEngine
from transformers import AutoTokenizer

from amft_fast.errors import UserError
from amft_fast.interfaces import Item, Message, Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder
from amft_fast.tasks.tools import Call, calls, schema

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tasks.md").read_text()
SAYS_TOOLS = (
    "{% if tools %}<|user|>Tools: {% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|>[result] {{ m.content }}{% else %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encoder_with(template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "math_base")
    tokenizer.chat_template = template
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def example():
    """The example of docs/tasks.md, as it stands there."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "calls(text)" in c)
    names = {}
    exec(compile(code, "docs/tasks.md", "exec"), names)
    return names


class Sums:
    splits, max_turns = ("train", "val", "test"), 3

    def __init__(self, episode):
        self.episode = episode

    def start(self, item):
        return self.episode(item.data)


def call(**arguments):
    return f"<tool_call>{json.dumps({'name': 'add', 'arguments': arguments})}</tool_call>"


def test_an_episode_hands_tools_and_gets_calls_and_no_token_is_tokenised_twice(example):
    encoder = encoder_with(SAYS_TOOLS)
    end = encoder.stop_token_ids[0]
    # A byte that is no UTF-8 becomes another one by way of text: were answers tokenised anew, it would show.
    odd = encoder.tokenizer.convert_tokens_to_ids("ÿ")
    plain = encoder.tokenizer(call(a=2, b=3), add_special_tokens=False)["input_ids"]
    turns = [[odd, *plain, end], [*encoder.tokenizer("5", add_special_tokens=False)["input_ids"], end]]
    engine = ScriptedEngine(turns)
    (sample,) = episodes.run(
        engine,
        Sums(example["Episode"]),
        [Item("sum", [2, 3])],
        encoder,
        Sampling(stop_token_ids=encoder.stop_token_ids),
        num_generations=1,
        max_new_tokens=200,
        seed_parts=(0,),
    )
    said = encoder.tokenizer.decode(sample.prompt_ids)
    assert '"name": "add"' in said and '"the one"' in said and "What is the sum of [2, 3]?" in said
    first, second = turns
    between = sample.response_ids[len(first) : -len(second)]
    assert sample.response_ids == first + between + second
    assert sample.loss_mask == [1] * len(first) + [0] * len(between) + [1] * len(second)
    assert encoder.tokenizer.decode(between) == "<|user|>[result] 5<|assistant|>"
    assert sample.success and sample.reward == 1 and len(sample.turns) == 2


def test_the_example_minds_what_it_is_called_with(example):
    for text in (
        call(a=1),
        call(a="1", b=2),
        call(a=1, b=2, c=3),
        "<tool_call>{",
        '<tool_call>{"name": "rm"}</tool_call>',
    ):
        result = example["Episode"]([1, 2]).step(text)
        assert (result.message, result.done) == (Message("tool", "no such call"), False)
    assert example["Episode"]([1, 2]).step(" 3 ").reward == 1


def test_a_tools_schema_comes_from_its_docstring(example):
    function = schema(example["add"])["function"]
    assert function["name"] == "add" and function["parameters"]["required"] == ["a", "b"]
    assert function["parameters"]["properties"]["a"] == {"type": "integer", "description": "the one"}


READ = {
    "no call": [],
    "": [],
    '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>': [Call("f", {"x": 1})],
    'so <tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g", "arguments": {}}': [
        Call("f", {}),
        Call("g", {}),
    ],
    '{"name": "f", "parameters": {"x": [1]}}': [Call("f", {"x": [1]})],
    '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>': [Call("f", {"x": 1})],
    '{"answer": 3}': [],
    "{not json}": [],
}
PROBLEMS = {
    "<tool_call>{": "the call is no JSON",
    "<tool_call>" + "[" * 50_000: "the call is no JSON",
    "<tool_call>" + " " * 200_000: "a call of more than 100000 characters",
    "<tool_call>[1]</tool_call>": "a call must be an object with a name and arguments",
    '<tool_call>{"name": 3}</tool_call>': "a call must be an object with a name and arguments",
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': "the arguments of 'f' must be an object",
    '<tool_call>{"name": "f", "arguments": "{"}</tool_call>': "the arguments of 'f' must be an object",
}


@pytest.mark.parametrize("text", READ)
def test_calls_are_read(text):
    assert calls(text) == READ[text]


@pytest.mark.parametrize("text", PROBLEMS, ids=lambda t: t[:40])
def test_a_call_that_cannot_be_read_says_why(text):
    (found,) = calls(text)
    assert PROBLEMS[text] in found.problem and found.name == ""


def test_prompts_with_and_without_tools_are_kept_apart(example):
    encoder = encoder_with(SAYS_TOOLS)
    offered = schema(example["add"])
    bare, with_tools = Message("user", "x"), Message("user", "x", tools=(offered,))
    assert encoder.prompt([bare]) != encoder.prompt([with_tools]) == encoder.prompt([with_tools])


def test_a_model_that_cannot_be_told_of_tools_is_refused(example):
    message = Message("user", "x", tools=(schema(example["add"]),))
    dropped = SAYS_TOOLS.partition("{% endif %}")[2]
    with pytest.raises(UserError, match="offers the tool 'add', which the model's chat template leaves out"):
        encoder_with(dropped).prompt([message])
    with pytest.raises(UserError, match="the tokenizer has no chat template to say them with"):
        encoder_with(None).prompt([message])


def test_a_result_goes_as_the_users_where_a_template_knows_no_tools():
    refuses = SAYS_TOOLS.replace("{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}{{ raise_exception('no') }}")
    drops = SAYS_TOOLS.replace("<|user|>[result] {{ m.content }}", "")
    for template in (refuses, drops):
        encoder = encoder_with(template)
        said = encoder.tokenizer.decode(encoder.feedback(Message("tool", "5"), stopped=True))
        assert said == "<|user|>5<|assistant|>"

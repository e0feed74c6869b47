"""What does not fit into the model's context: refused or cut, with a sentence, and never trained on past the last position."""

import json
from pathlib import Path

import pytest
import torch
from fakes import CopyTask, ScriptedEngine, make_checkpoint
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from amft_fast import cli
from amft_fast.config import MathConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Item, Message, Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.context import check_demos, check_prompts, check_setting
from amft_fast.rollout.encoder import Encoder
from amft_fast.tasks.math.task import MathTask

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "math_tiny.toml")


@pytest.fixture(scope="module")
def tokenizer(checkpoint_folder):
    return AutoTokenizer.from_pretrained(checkpoint_folder)


class Lines:
    """Prompts of given lengths; what is said does not matter."""

    splits, max_turns = ("train", "val"), 1

    def __init__(self, *lengths, demos=()):
        self.lengths, self._demos = lengths, demos

    def prompts(self, split):
        return [Item(f"{split}/{n}", n) for n in self.lengths]

    def demos(self, split):
        return [Demo(f"d{n}", (Message("user", "a"),), "b " * n) for n in self._demos]

    def start(self, item):
        return type("Episode", (), {"messages": [Message("user", "a " * item.data)]})()


def test_answers_as_long_as_the_context_are_refused():
    check_setting(None, 10**9)
    check_setting(100, 99)
    with pytest.raises(
        UserError, match=r"rollout\.max_new_tokens is 100, which leaves no room .* of 100 tokens: lower it"
    ):
        check_setting(100, 100)


def test_prompts_that_leave_too_little_are_counted_and_too_long_ones_refused(tokenizer):
    encoder = Encoder(tokenizer, context=30)  # a prompt of n words takes n + 2 tokens
    assert check_prompts(encoder, Lines(1, 8, 18), ("train", "val"), 10) == []
    assert check_prompts(encoder, Lines(1, 19, 25, 27), ("val",), 10) == [
        "val: prompts of up to 29 tokens leave 1 of the model's context of 30, fewer than rollout.max_new_tokens = 10: their "
        "answers are cut at what is left"
    ]
    with pytest.raises(UserError, match="the prompt of train/28 takes 30 tokens, and the model's context is 30"):
        check_prompts(encoder, Lines(1, 28), ("train",), 10)
    assert check_prompts(Encoder(tokenizer), Lines(1000), ("train",), 10**9) == []
    # One that is too long is found among many.
    with pytest.raises(UserError, match="the prompt of train/40 takes 42 tokens"):
        check_prompts(encoder, Lines(*[1] * 700, 40, *[2] * 900), ("train",), 10)


def test_a_demonstration_longer_than_the_context_is_named(tokenizer):
    encoder = Encoder(tokenizer, context=30)
    check_demos(encoder, Lines(1, demos=(26,)))
    check_demos(encoder, Lines(1))
    with pytest.raises(UserError, match=r"the demonstration d27 takes 3 \+ 28 tokens, and the model's context is 30"):
        check_demos(encoder, Lines(1, demos=(1, 27)))


def test_an_answer_is_asked_for_no_more_than_its_prompt_leaves(tokenizer):
    encoder, engine = Encoder(tokenizer, context=20), ScriptedEngine([[5, 1]] * 2)
    items = [Item("train/a", "a"), Item("train/b", "b " * 12)]
    task = CopyTask()
    task.start = lambda item: type(
        "Episode", (), {"messages": [Message("user", item.data)], "step": CopyTask().start(items[0]).step}
    )()
    episodes.run(
        engine,
        task,
        items,
        encoder,
        Sampling(stop_token_ids=(1,)),
        num_generations=1,
        max_new_tokens=9,
        seed_parts=(0,),
    )
    assert [r.max_new_tokens for r in engine.asked] == [9, 6]
    with pytest.raises(UserError, match="the prompt of train/c takes 32 tokens"):
        long = [Item("train/c", "a " * 30)]
        episodes.run(engine, task, long, encoder, Sampling(), num_generations=1, max_new_tokens=9, seed_parts=(0,))


def test_a_conversation_ends_where_the_context_does(tokenizer):
    """A prompt of 3, answers of 2 and feedback of 3 tokens: of five turns, three fit into 16, whose last has one to spare."""
    engine = ScriptedEngine([[6, 1]] * 5)
    task = CopyTask(max_turns=5)
    (sample,) = episodes.run(
        engine,
        task,
        task.prompts("train")[:1],
        Encoder(tokenizer, context=16),
        Sampling(stop_token_ids=(1,)),
        num_generations=1,
        max_new_tokens=4,
        seed_parts=(0,),
    )
    assert [r.max_new_tokens for r in engine.asked] == [4, 4, 3]
    assert len(sample.prompt_ids) + len(sample.response_ids) == 15 and sample.finish_reason == "length"
    assert len(sample.turns) == 3 and sample.loss_mask[-2:] == [1, 1]


# -------------------------------------------------------------------------------------------------------------- mathematics


def test_problems_and_demonstrations_that_the_context_cannot_hold_are_left_out(tokenizer, tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "answer": "1"},
        {"prompt": "a " * 60, "response": "b", "answer": "2"},
        {"prompt": "b " * 9, "response": "b " * 90, "answer": "3"},
        {"prompt": "c " * 9, "response": "b " * 90},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = MathTask(MathConfig(train=[str(path)], val_share=0, system_prompt=""))
    said = "\n".join(task.prepare(Encoder(tokenizer, context=100), 40))
    assert [p.data.answer for p in task.prompts("train")] == ["1", "3"] and len(task.demos("train")) == 1
    assert f"problem too long for the model's context: 1 ({path}:2: a problem of 60 tokens leaves 30 of 100" in said
    assert f"demonstration too long for the model's context (the problem is used without it): 1 ({path}:3" in said
    assert f"demonstration too long for the model's context: 1 ({path}:4" in said


def learned_positions(folder, positions):
    """The tiny base's tokenizer with a GPT-2, which has no position past its last."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "math_base")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = ["--train.steps", "1", "--train.warmup_steps", "1", "--train.method", "fixed", "--checkpoint.export", "false"]
SMALL += ["--rollout.dynamic_sampling", "false", "--eval.num_samples", "1"]
SMALL += ["--eval.every", "0", "--eval.splits", '["sample"]']
SMALL += ["--train.prompts_per_step", "4", "--train.demos_per_step", "4", "--eval.max_prompts", "4"]


def test_a_model_with_learned_positions_trains_within_them_and_says_what_that_cut(tmp_path, capsys):
    flags = ["--model.path", learned_positions(tmp_path / "gpt2", 100), "--run.dir", str(tmp_path / "run"), *SMALL]
    assert cli.main(["train", TINY, *flags, "--rollout.max_new_tokens", "60"]) == 0
    out = capsys.readouterr().out
    assert "problem too long for the model's context: " in out
    assert (
        "sample: prompts of up to " in out and "of the model's context of 100, fewer than rollout.max_new_tokens" in out
    )
    assert cli.main(["train", TINY, *flags, "--run.overwrite", "--rollout.max_new_tokens", "100"]) == 2
    assert "rollout.max_new_tokens is 100, which leaves no room" in capsys.readouterr().err


def test_evaluation_alone_names_its_own_flag(tmp_path, capsys):
    model = str(make_checkpoint(tmp_path / "model"))
    command = ["eval", model, "--benchmarks", "sample", "--out", str(tmp_path / "out"), "--limit", "2"]
    assert cli.main([*command, "--max-new-tokens", "8192"]) == 2
    assert (
        "--max-new-tokens is 8192, which leaves no room for a prompt in the model's context of 256"
        in capsys.readouterr().err
    )

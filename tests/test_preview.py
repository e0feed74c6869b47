"""amft-fast data: what is shown is what is trained on."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import make_checkpoint
from transformers import AutoTokenizer

from amft_fast.cli import main
from amft_fast.config_file import load
from amft_fast.rollout.encoder import load_encoder
from amft_fast.run.build import make_task
from amft_fast.run.preview import Painter, pieces

CONFIGS = Path(__file__).parent.parent / "configs"
DEMO = str(CONFIGS / "demo.toml")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def shown(capsys, *flags):
    assert main(["data", *flags]) == 0
    return capsys.readouterr().out


def test_five_prompts_and_demonstrations_with_gold_and_lengths(capsys):
    out = shown(capsys, DEMO)
    cfg = load(DEMO)
    task, encoder = make_task(cfg.task), load_encoder(cfg.model)
    item, demo = task.prompts("train")[0], task.demos("train")[0]
    ids = encoder.prompt(task.start(item).messages)
    assert f"{item.id}, {len(ids)} tokens" in out and f"gold: {task.gold(item)}" in out
    assert "|".join(text for _, text in pieces(encoder.tokenizer, ids)) in out
    prompt, response, mask, _ = encoder.demo(demo)
    assert f"{len(prompt)} + {len(response)} tokens, {sum(mask)} of them imitated" in out
    assert out.count("--- prompt ") == out.count("--- demonstration ") == 5
    for split in task.splits:
        row = next(line for line in out.splitlines() if line.startswith(f"{split} "))
        assert f"{len(task.prompts(split)):,}" in row.split()
    assert "\x1b" not in out, "no colours into a file"


def test_tokens_take_turns_in_shade_and_imitated_ones_are_green(capsys):
    out = shown(capsys, DEMO, "--color", "always", "--examples", "1")
    encoder = load_encoder(load(DEMO).model)
    demo = make_task(load(DEMO).task).demos("train")[0]
    painted = out.split("--- demonstration 1")[1].split("\n", 1)[1]
    prompt, response, mask, _ = encoder.demo(demo)
    assert ANSI.sub("", painted).strip() == "".join(t for _, t in pieces(encoder.tokenizer, prompt + response)).strip()
    greens = re.findall(r"\x1b\[30;48;5;(157|120)m", painted)
    assert len(greens) == sum(mask) and all(a != b for a, b in pairwise(greens))


def test_rows_that_are_dropped_are_named_with_their_reason(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "model")
    rows = [{"problem": f"What is {i}+1?", "answer": str(i + 1), "solution": "a b"} for i in range(6)]
    rows += [rows[0], {"problem": "", "answer": "1"}, {"problem": "no answer"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--task.name", "math", "--task.math.train", json.dumps([str(tmp_path / "a.jsonl")])]
    flags += ["--task.math.val_share", "0", "--model.path", str(model), "--task.math.system_prompt", ""]
    config = tmp_path / "c.toml"
    config.write_text("[rollout]\nmax_new_tokens = 8\n")
    out = shown(capsys, str(config), *flags, "--examples", "2")
    assert "9 rows, 6 problems used" in out and "duplicate: 1" in out and out.count("--- prompt ") == 2
    assert re.search(r"a\.jsonl:8", out) or "line 8" in out, "the place of the empty one"
    assert "gold: " in out


def test_characters_that_several_tokens_make_are_shown_whole():
    """A byte-level tokenizer: the snowman is three tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = tokenizer("a ☃\n\x1b[2J").input_ids
    parts = list(pieces(tokenizer, ids))
    assert "".join(text for _, text in parts) == "a ☃\n\x1b[2J" and (2, "☃") in parts
    encoder = type("E", (), {"tokenizer": tokenizer, "stop_token_ids": ()})()
    assert "\x1b" not in Painter(encoder, False).text(ids, [0] * len(ids)), "a terminal must not obey the data"
    assert "☃" in Painter(encoder, False).text(ids, [0] * len(ids))


@pytest.mark.parametrize("name", ["demo_virl.toml", "math_tiny.toml"])
def test_the_other_tasks_are_shown_too(name, capsys):
    out = shown(capsys, str(CONFIGS / name), "--examples", "1")
    assert out.count("--- prompt ") == 1 and "gold: " in out and "imitated" in out


def test_a_split_that_is_not_there_is_a_sentence(capsys):
    assert main(["data", DEMO, "--split", "dev"]) == 2
    assert "--split: 'dev' is not a split of this task" in capsys.readouterr().err


def test_long_texts_lose_their_middle(checkpoint_folder):
    encoder = type("E", (), {"tokenizer": AutoTokenizer.from_pretrained(checkpoint_folder), "stop_token_ids": ()})()
    text = Painter(encoder, False).text([5] * 1000, [0] * 1000)
    assert "[... 400 tokens ...]" in text and text.count("|") == 600

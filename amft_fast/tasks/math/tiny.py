"""Make what configs/math_tiny.toml runs on: `python -m amft_fast.tasks.math.tiny --out configs`.

`math_sample/`: small problems of our own making with worked answers, in several of the layouts that math_sources.py knows.
`math_base/`: a Qwen2 of 0.1 M random parameters with a tokenizer of bytes: the whole way from data to evaluation then runs on
a CPU in seconds. It knows nothing; what it learns in a few steps is the form of an answer, and now and then a sum.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "pens", "shells", "cards")
TRAIN, EVAL = 360, 40


def problems(n: int, seed: int) -> list[dict[str, str]]:
    """`n` different problems with `problem`, `answer`, `response`."""
    rng, out = random.Random(seed), {}
    while len(out) < n:
        row = rng.choice((_sum, _story, _fraction, _roots))(rng)
        out.setdefault(row["problem"], row)
    return list(out.values())


def _row(problem: str, steps: str, answer: object) -> dict[str, str]:
    return {"problem": problem, "answer": str(answer), "response": f"{steps} \\boxed{{{answer}}}"}


def _sum(rng: random.Random) -> dict[str, str]:
    a, b = rng.randint(1, 60), rng.randint(1, 39)
    sign, value = rng.choice((("+", a + b), ("-", a - b)))
    return _row(f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {value}.", value)


def _story(rng: random.Random) -> dict[str, str]:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 9)
    problem = f"{name} has {a} bags of {b} {thing}. How many {thing} are there?"
    return _row(problem, f"{a} * {b} = {a * b}.", a * b)


def _fraction(rng: random.Random) -> dict[str, str]:
    a, b = Fraction(1, rng.randint(2, 9)), Fraction(rng.randint(1, 4), rng.randint(5, 9))
    value = a + b
    text = str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return _row(f"Add {a} and {b}.", f"{a} + {b} = {value}.", text)


def _roots(rng: random.Random) -> dict[str, str]:
    a, b = sorted(rng.sample(range(1, 10), 2))
    problem = f"Solve x^2 - {a + b}x + {a * b} = 0."
    return _row(problem, f"(x - {a})(x - {b}) = 0.", f"{a}, {b}")


def write_sample(folder: Path) -> None:
    """train.jsonl, in three layouts, and eval.jsonl, which shares no problem with it."""
    rows = problems(TRAIN + EVAL, 0)
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_in_layout(row, rng) for row in rows[:TRAIN]]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"problem": row["problem"], "answer": row["answer"]} for row in rows[TRAIN:]]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _in_layout(row: dict[str, str], rng: random.Random) -> dict:
    layout = rng.choice(("plain", "math", "verl"))
    if layout == "plain":
        return {"prompt": row["problem"], "response": row["response"], "answer": row["answer"]}
    if layout == "math":
        return {"problem": row["problem"], "solution": row["response"]}
    return {
        "prompt": [{"role": "user", "content": row["problem"]}],
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "target": [{"role": "assistant", "content": row["response"]}],
    }


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    """One token a byte, and the marks of the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=marks[0],
        eos_token=marks[1],
        additional_special_tokens=marks[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write_base(folder: Path, seed: int = 0) -> None:
    """The tokenizer and the random model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m amft_fast.tasks.math.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write math_sample and math_base to")
    out = parser.parse_args(arguments).out
    write_sample(out / "math_sample")
    write_base(out / "math_base")
    print(f"wrote {out / 'math_sample'} and {out / 'math_base'}", file=sys.stderr)


if __name__ == "__main__":
    main()

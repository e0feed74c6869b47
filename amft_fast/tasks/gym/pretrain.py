"""Make the bases of the demos of reasoning-gym: `python -m amft_fast.tasks.gym.pretrain --task chain_sum --out FOLDER`.

A Qwen3 of 0.15 M parameters learns to answer easier problems of the task than the demo's, made by the package's own generator:
fewer terms of a sum, fewer numbers to sort, shorter words, smaller numbers. One token is a digit, a letter, a sign, or a phrase
that every question of the task has, so that a question is short and what is decoded is the text that the verifier reads.

Sequences: `<bos><user>` question `<assistant>` answer `<eos>`. Only answers are trained on. No question of the demo's `val` or
`test` occurs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from amft_fast.errors import UserError
from amft_fast.tasks import tiny_base
from amft_fast.tasks.gym.generate import dataset
from amft_fast.tasks.gym.task import generate
from amft_fast.tasks.tiny_base import (
    ASSISTANT,
    USER,
    command_line,
    encode_turns,
    fit,
    make,
    piece_tokenizer,
    split_pieces,
    tiny_model,
)

DIGITS = tuple("0123456789")
FIRST_SEED = 1_000_000_000  # of the examples: far from those of any task's problems
SORTING_RULES = """
Please follow the instruction below:
## 1. Let all your answers be a list of numbers. Instead of reporting your answer as -69, -13, 1, 7, 11, 43, 59, 61, use ['-69', '-13', '1', '7', '11', '43', '59', '61'] instead
## 2. Convert all numbers in the square brackets as strings. For example, ['-69', '-13', '1', '7', '11', '43', '59', '61']
"""  # noqa: E501


@dataclass(frozen=True)
class Demo:
    """A task of the package: the demo's options and the easier ones of its base; the pieces of text that are tokens; and how
    long its base is trained."""

    options: dict[str, Any]
    easier: dict[str, Any]
    pieces: tuple[str, ...]
    steps: int


DEMOS = {
    "chain_sum": Demo(
        {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        ("State the final answer to the following arithmetic problem: ", " + ", " - ", " =", "-", *DIGITS),
        600,
    ),
    "number_sorting": Demo(
        {"min_numbers": 5, "max_numbers": 5, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
        {"min_numbers": 2, "max_numbers": 4, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
        (
            *(f"Sort these numbers in {way} order: " for way in ("ascending", "descending")),
            *(SORTING_RULES, ", ", "['", "', '", "']", ".0", *DIGITS),
        ),
        600,
    ),
    # The two that were kept back: chosen, with their options, when the controller was finished (docs/study.md).
    "spell_backward": Demo(
        {"min_word_len": 4, "max_word_len": 7},
        {"min_word_len": 3, "max_word_len": 5},
        ("Spell this word backward (example: sun -> nus): ", *ascii_letters),
        600,
    ),
    "gcd": Demo(
        {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 100},
        {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 50},
        (
            *("Find the Greatest Common Divisor (GCD) of these numbers: ", ", "),
            *(". Give only the GCD as your final answer.", *DIGITS),
        ),
        600,
    ),
}


@dataclass(frozen=True)
class Recipe(tiny_base.WordRecipe):
    """What a base checkpoint is made from; `steps` 0: the task's own."""

    task: str = "chain_sum"
    steps: int = 0

    def __post_init__(self) -> None:
        if self.task not in DEMOS:
            raise UserError(f"--task: {self.task!r} is none of {', '.join(DEMOS)}")
        if not self.steps:
            object.__setattr__(self, "steps", DEMOS[self.task].steps)


HELD_OUT = {"test": 500, "val": 200}
"""Problems of these splits in the demos' configs, whose first seed is 0."""


def held_out(task: str) -> set[str]:
    """The questions of the demo's val and test."""
    made = generate(task, DEMOS[task].options, 0, {"train": 0, **HELD_OUT})
    return {question for split in HELD_OUT for _, question, *_ in made[split]}


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    return piece_tokenizer(DEMOS[task].pieces)


class Examples(tiny_base.Examples):
    """Easier problems of a task and their answers, none twice, and none whose question `val` or `test` of the demo has."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(recipe, tokenizer)
        demo = DEMOS[recipe.task]
        self.held_out = held_out(recipe.task)
        self.split = split_pieces(demo.pieces)
        self.made = self._problems(dataset(recipe.task, demo.easier, FIRST_SEED, 10**9))

    def _problems(self, source: Any) -> Iterator[tuple[str, str]]:
        for i in range(len(source)):
            entry = source[i]
            if entry["question"] not in self.held_out:
                yield entry["question"], entry["answer"]

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """The next problem; `rng` is not used, as each has a seed of its own."""
        question, answer = next(self.made)
        return encode_turns([(USER, question, False), (ASSISTANT, answer, True)], self.vocabulary, self.split)


def train(recipe: Recipe, report: Callable[[int, float, Qwen3ForCausalLM], None]) -> Qwen3ForCausalLM:
    """Train from nothing; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer(recipe.task)
    examples = Examples(recipe, tokenizer)
    model = tiny_model(tokenizer, recipe.hidden_size, recipe.num_layers)
    return fit(model, recipe, lambda: examples.batch(rng), report)


def save(model: Qwen3ForCausalLM, recipe: Recipe, losses: Sequence[float], folder: Path) -> None:
    """Writes the folder, with what its data were."""
    demo = DEMOS[recipe.task]
    listed = "\n".join(sorted(held_out(recipe.task)))
    data = {
        "what": f"problems of reasoning-gym's {recipe.task} and their answers",
        "options": demo.easier,
        "excluded": f"the questions of val and test with {demo.options}",
        "excluded_sha256": sha256(listed.encode()).hexdigest(),
    }
    module = f"gym.pretrain --task {recipe.task}"
    tiny_base.save(folder, module, recipe, model, [build_tokenizer(recipe.task)], losses, data)


def main(arguments: Sequence[str] | None = None) -> None:
    names = ("task", "seed", "steps", "batch_size", "lr", "hidden_size", "num_layers")
    given = vars(command_line("gym.pretrain", __doc__, Recipe, names).parse_args(arguments))
    make(given, Recipe, train, save)


if __name__ == "__main__":
    main()

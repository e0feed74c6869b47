"""Make the demo's base checkpoint: `python -m amft_fast.tasks.general_points.pretrain --out configs/demo_base`.

A Qwen3 of 0.15 M parameters with a tokenizer of its own (one token a word, a number or a sign) learns to answer General
Points prompts in the format "formula". It is not shown solutions of problems: a random legal expression over a hand is
labelled with its own value as the target. So it learns to write legal formulas that use the hand, and only roughly to
hit a target, which leaves reinforcement learning something to do.

Hands come from the splits `train` and `ood_train` alone, under both rules for face cards: no multiset of values that a
task with the same seed and shares holds in `val`, `test` or `ood` occurs, in any order or with any target.

Sequences, lengths in tokens: `<bos><user>` hand, rule and target (8-10) `<assistant>` formula (5-11) `= target <eos>`.
Only answers are trained on. Some sequences have two turns, a wrong answer (not trained on) and the verifier's feedback
coming first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import permutations, product
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from amft_fast.tasks import tiny_base
from amft_fast.tasks.general_points.bases import allowed_hands
from amft_fast.tasks.general_points.hands import ID_RULE, OOD_RULE, Problem, shuffled_deal
from amft_fast.tasks.general_points.task import (
    PROMPT_WORDS,
    Verdict,
    answer_text,
    feedback_text,
    prompt_text,
)
from amft_fast.tasks.tiny_base import (
    ASSISTANT,
    USER,
    command_line,
    encode_turns,
    fit,
    make,
    tiny_model,
    word_tokenizer,
)

SIGNS = ("+", "-", "*", "/", "(", ")", "=")
LARGEST_NUMBER = 99


@dataclass(frozen=True)
class Recipe(tiny_base.WordRecipe):
    """What a base checkpoint is made from. `two_turns` is the share of sequences with a wrong answer first."""

    num_cards: int = 3
    targets: tuple[int, int] = (1, 40)
    two_turns: float = 0.1


# ----------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a prompt, each number to 99 and each sign."""
    return word_tokenizer((*SIGNS, *PROMPT_WORDS, *map(str, range(LARGEST_NUMBER + 1))))


# ---------------------------------------------------------------------------------------------------------------- data


def all_expressions(numbers: Sequence[int]) -> Iterator[tuple[str, Fraction, int]]:
    """Every expression over the numbers in this order, without superfluous brackets: (text, value, precedence).

    Precedence is 1 for a sum, 2 for a product, 3 for a number.
    """
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0]), 3
    for cut in range(1, len(numbers)):
        for (a, x, p), (b, y, q) in product(all_expressions(numbers[:cut]), all_expressions(numbers[cut:])):
            yield f"{a}+{_wrap(b, q, 1)}", x + y, 1
            yield f"{a}-{_wrap(b, q, 2)}", x - y, 1
            yield f"{_wrap(a, p, 2)}*{_wrap(b, q, 2)}", x * y, 2
            if y:
                yield f"{_wrap(a, p, 2)}/{_wrap(b, q, 3)}", x / y, 2


def _wrap(text: str, precedence: int, needed: int) -> str:
    return text if precedence >= needed else f"({text})"


class Examples(tiny_base.Examples):
    """Hands, expressions over them, and their values as targets."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
        super().__init__(recipe, tokenizer)
        self.hands = allowed_hands(recipe.num_cards, recipe.seed)
        self.labelled = {hand: labelled(hand, recipe.targets) for pool in self.hands.values() for hand in pool}
        self.hands = {rule: [hand for hand in pool if self.labelled[hand]] for rule, pool in self.hands.items()}

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """One sequence: a rule, a hand of it, an expression over it, and the cards in any order."""
        rule = rng.choice((ID_RULE, OOD_RULE))
        hand = rng.choice(self.hands[rule])
        formula, target = rng.choice(self.labelled[hand])
        problem = shuffled_deal(hand, target, rule, rng)
        turns = [(USER, prompt_text(problem, "formula"), False)]
        if rng.random() < self.recipe.two_turns:
            turns += self._wrong_turn(problem, rng)
        turns.append((ASSISTANT, answer_text(problem, formula, "formula"), True))
        return encode_turns(turns, self.vocabulary)

    def _wrong_turn(self, problem: Problem, rng: random.Random) -> list[tuple[str, str, bool]]:
        formula, value = rng.choice(self.labelled[tuple(sorted(problem.values))])
        if value == problem.target:
            return []
        feedback = feedback_text(problem, Verdict("no_solution", Fraction(value)), "formula")
        return [(ASSISTANT, answer_text(problem, formula, "formula"), False), (USER, feedback, False)]


def labelled(hand: tuple[int, ...], targets: tuple[int, int]) -> list[tuple[str, int]]:
    """Every expression over every order of the hand whose value may be a target, with that value."""
    return [
        (text, int(value))
        for order in sorted(set(permutations(hand)))
        for text, value, _ in all_expressions(order)
        if value.denominator == 1 and targets[0] <= value <= targets[1]
    ]


# ------------------------------------------------------------------------------------------------------------ training


def train(recipe: Recipe, report: Callable[[int, float, Qwen3ForCausalLM], None]) -> Qwen3ForCausalLM:
    """Train from nothing; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    examples = Examples(recipe, tokenizer)
    model = tiny_model(tokenizer, recipe.hidden_size, recipe.num_layers)
    return fit(model, recipe, lambda: examples.batch(rng), report)


def save(model: Qwen3ForCausalLM, recipe: Recipe, losses: Sequence[float], folder: Path) -> None:
    """Writes the folder, with what was left out of its data."""
    allowed = allowed_hands(recipe.num_cards, recipe.seed)
    listed = sorted({hand for pool in allowed.values() for hand in pool})
    data = {
        "what": "random legal expressions over a hand, labelled with their own value as the target",
        "hands": {rule: len(pool) for rule, pool in allowed.items()},
        "hands_sha256": sha256(json.dumps(listed).encode()).hexdigest(),
        "excluded": "every multiset of values in val, test or ood, in any order, under any rule, with any target",
    }
    tiny_base.save(folder, "general_points.pretrain", recipe, model, [build_tokenizer()], losses, data)


def main(arguments: Sequence[str] | None = None) -> None:
    names = ("seed", "steps", "batch_size", "lr", "hidden_size", "num_layers")
    given = vars(command_line("general_points.pretrain", __doc__, Recipe, names).parse_args(arguments))
    make(given, Recipe, train, save)


if __name__ == "__main__":
    main()

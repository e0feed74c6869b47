"""Make the base checkpoint of the V-IRL demo: `python -m amft_fast.tasks.virl.pretrain --out configs/demo_virl_base`.

A small Qwen3 with a tokenizer of its own (one token a word) learns the compact format of V-IRL on walks through cities that
no task generates (their names begin with "base"), in both action spaces. The walks are shorter than the demo's and the
training is short, so that it can read an instruction and act on it, but loses its way sooner or later: that is left to the
demo. Before some right answers a wrong one and the verifier's word on it are shown, and not trained on.

A sequence: `<bos><user>` action space, instruction, first observation `<assistant>` answer `<eos><user>` next observation ...
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from amft_fast.tasks.tiny_base import (
    ASSISTANT,
    PAD,
    USER,
    Turn,
    command_line,
    encode_turns,
    fit,
    made_with,
    make,
    pad_rows,
    tiny_model,
    word_tokenizer,
)
from amft_fast.tasks.virl.city import LANDMARKS, build_city, draw_routes
from amft_fast.tasks.virl.routes import ACTION_SPACES, Point, Route
from amft_fast.tasks.virl.task import Problem, judge
from amft_fast.tasks.virl.words import COMPACT_WORDS, answer_text, feedback_text, next_text, prompt_text

MAX_LEGS = 20
MAX_LENGTH = 1024  # tokens of a conversation


@dataclass(frozen=True)
class Recipe:
    """What a base checkpoint is made from.

    `stop` ends the training early, for a base that still errs. `wrong` is the share of points with a wrong answer first.
    """

    most_legs: int = 2
    spacing: float = 50.0
    cities: int = 30
    routes: int = 100
    seed: int = 0
    steps: int = 800
    stop: int = 100
    batch_size: int = 48
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    wrong: float = 0.1
    hidden_size: int = 64
    num_layers: int = 3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the compact format, each landmark and each number of a sentence."""
    return word_tokenizer((*COMPACT_WORDS, *LANDMARKS, *map(str, range(1, 2 * MAX_LEGS + 1))), MAX_LENGTH)


def base_routes(recipe: Recipe) -> list[Route]:
    """As many routes of every city for each number of legs; all in cities of their own."""
    out: list[Route] = []
    for i in range(recipe.cities):
        city = build_city(f"base-{recipe.seed}-{i}")
        for legs in range(1, recipe.most_legs + 1):
            out += (
                route
                for route, _ in islice(draw_routes(city, (legs, legs), recipe.seed, recipe.spacing), recipe.routes)
            )
    return out


class Examples:
    """Draws training sequences: token ids, and for each token whether it is trained on."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
        self.recipe, self.vocabulary = recipe, tokenizer.get_vocab()
        self.routes = base_routes(recipe)

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """One walk from the start to the destination."""
        problem = Problem(rng.choice(self.routes), rng.choice(list(ACTION_SPACES)), "base")
        points = problem.points
        turns: list[Turn] = [(USER, prompt_text(problem.route, points[0], problem.space, "compact", False), False)]
        for i, point in enumerate(points):
            if i:
                turns.append((USER, next_text(i + 1, point, False, "compact", False), False))
            if rng.random() < self.recipe.wrong:
                turns += self._wrong_try(problem, point, rng)
            turns.append((ASSISTANT, answer_text(problem.route, point, problem.space, "compact"), True))
        return encode_turns(turns, self.vocabulary)

    def _wrong_try(self, problem: Problem, point: Point, rng: random.Random) -> list[Turn]:
        word = rng.choice(["forward", "stop", *(f"turn {w}" for w in ACTION_SPACES[problem.space])])
        answer = f"{rng.choice(('cross', 'street'))} {rng.randint(1, 2 * len(problem.route.legs))} {word}"
        kind, _ = judge(problem, point, answer, "compact")
        if kind == "correct":
            return []
        return [(ASSISTANT, answer, False), (USER, feedback_text(kind, point, "compact"), False)]

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, both [batch, length], padded on the right; labels are -100 where not trained on."""
        return pad_rows([self.draw(rng) for _ in range(self.recipe.batch_size)], self.vocabulary[PAD])


def train(recipe: Recipe, report: Callable[[int, float, Qwen3ForCausalLM], None]) -> Qwen3ForCausalLM:
    """Train from nothing; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    examples = Examples(recipe, tokenizer)
    model = tiny_model(tokenizer, recipe.hidden_size, recipe.num_layers, MAX_LENGTH)
    return fit(model, recipe, lambda: examples.batch(rng), report, stop=recipe.stop)


def save(model: Qwen3ForCausalLM, recipe: Recipe, losses: Sequence[float], folder: Path) -> None:
    """Write the Hugging Face folder and `recipe.json`: how it was made, what was left out, and the weights' hash."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    last = losses[-50:]
    record = {
        "command": "python -m amft_fast.tasks.virl.pretrain",
        "arguments": asdict(recipe),
        "parameters": model.num_parameters(),
        "final_loss": round(sum(last) / len(last), 4),
        "data": {
            "what": f"walks of 1 to {recipe.most_legs} legs in both action spaces, right answers trained on",
            "excluded": "every city that the task generates, under any seed",
        },
        **made_with(folder),
    }
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    names = [field.name for field in fields(Recipe)]
    given = vars(command_line("virl.pretrain", __doc__, Recipe, names).parse_args(arguments))
    folder = given.pop("out")
    recipe = Recipe(**given)
    make(folder, partial(train, recipe), lambda model, losses: save(model, recipe, losses, folder), recipe.stop)


if __name__ == "__main__":
    main()

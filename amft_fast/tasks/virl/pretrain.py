"""Make the base checkpoint of the V-IRL demo: `python -m amft_fast.tasks.virl.pretrain --out configs/demo_virl_base`.

A small Qwen3 with a tokenizer of its own (one token a word) learns the compact format of V-IRL on walks through cities that
no task generates (their names begin with "base"), in both action spaces. The walks are shorter than the demo's and the
training is short, so that it can read an instruction and act on it, but loses its way sooner or later: that is left to the
demo. Before some right answers a wrong one and the verifier's word on it are shown, and not trained on.

A sequence: `<bos><user>` action space, instruction, first observation `<assistant>` answer `<eos><user>` next observation ...
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from amft_fast.tasks import tiny_base
from amft_fast.tasks.tiny_base import ASSISTANT, USER, Turn
from amft_fast.tasks.virl.city import LANDMARKS, build_city, draw_routes
from amft_fast.tasks.virl.routes import ACTION_SPACES, Point, Route
from amft_fast.tasks.virl.task import Problem, judge
from amft_fast.tasks.virl.words import COMPACT_WORDS, answer_text, feedback_text, next_text, prompt_text

MAX_LEGS = 20
MAX_LENGTH = 1024  # tokens of a conversation


@dataclass(frozen=True)
class Recipe(tiny_base.WordRecipe):
    """What a base checkpoint is made from.

    `stop` ends the training early, for a base that still errs. `wrong` is the share of points with a wrong answer first.
    """

    most_legs: int = 2
    """Of a route."""
    spacing: float = 50.0
    cities: int = 30
    routes: int = 100
    """In all cities together."""
    steps: int = 800
    stop: int = 100
    batch_size: int = 48
    wrong: float = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the compact format, each landmark and each number of a sentence."""
    return tiny_base.word_tokenizer((*COMPACT_WORDS, *LANDMARKS, *map(str, range(1, 2 * MAX_LEGS + 1))), MAX_LENGTH)


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


class Examples(tiny_base.Examples):
    """Walks of routes in words."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
        super().__init__(recipe, tokenizer)
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
        return tiny_base.encode_turns(turns, self.vocabulary)

    def _wrong_try(self, problem: Problem, point: Point, rng: random.Random) -> list[Turn]:
        word = rng.choice(["forward", "stop", *(f"turn {w}" for w in ACTION_SPACES[problem.space])])
        answer = f"{rng.choice(('cross', 'street'))} {rng.randint(1, 2 * len(problem.route.legs))} {word}"
        kind, _ = judge(problem, point, answer, "compact")
        if kind == "correct":
            return []
        return [(ASSISTANT, answer, False), (USER, feedback_text(kind, point, "compact"), False)]


def train(recipe: Recipe, report: Callable[[int, float, Qwen3ForCausalLM], None]) -> Qwen3ForCausalLM:
    """Train from nothing; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    examples = Examples(recipe, tokenizer)
    model = tiny_base.tiny_model(tokenizer, recipe.hidden_size, recipe.num_layers, MAX_LENGTH)
    return tiny_base.fit(model, recipe, lambda: examples.batch(rng), report, stop=recipe.stop)


def save(model: Qwen3ForCausalLM, recipe: Recipe, losses: Sequence[float], folder: Path) -> None:
    """Writes the folder, with what was left out of its data."""
    data = {
        "what": f"walks of 1 to {recipe.most_legs} legs in both action spaces, right answers trained on",
        "excluded": "every city that the task generates, under any seed",
    }
    tiny_base.save(folder, "virl.pretrain", recipe, model, [build_tokenizer()], losses, data)


def main(arguments: Sequence[str] | None = None) -> None:
    names = [field.name for field in fields(Recipe)]
    given = vars(tiny_base.command_line("virl.pretrain", __doc__, Recipe, names).parse_args(arguments))
    tiny_base.make(given, Recipe, train, save)


if __name__ == "__main__":
    main()

"""What a base checkpoint of this task was made from, and whether it has seen what a task holds out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amft_fast.tasks.general_points.hands import ID_RULE, OOD_RULE, assign_split, hands


@dataclass(frozen=True)
class Recipe:
    """What a base checkpoint is made from. `two_turns` is the share of sequences with a wrong answer first."""

    num_cards: int = 3
    targets: tuple[int, int] = (1, 40)
    seed: int = 0
    steps: int = 600
    batch_size: int = 256
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    two_turns: float = 0.1
    hidden_size: int = 64
    num_layers: int = 3


def allowed_hands(recipe: Recipe) -> dict[str, list[tuple[int, ...]]]:
    """For each rule, the multisets of values that pre-training may show.

    Hands without a value above 10 are allowed under both rules, as far as they are training hands.
    """
    train = [hand for hand in hands(recipe.num_cards, ID_RULE) if assign_split(hand, seed=recipe.seed) == "train"]
    other = [hand for hand in hands(recipe.num_cards, OOD_RULE) if assign_split(hand, seed=recipe.seed) == "ood_train"]
    return {ID_RULE: train, OOD_RULE: train + other}


def leak(base: str, num_cards: int, seed: int, split_of: Callable[[Sequence[int]], str]) -> str | None:
    """A sentence when the base checkpoint in the folder `base` was pre-trained on hands that a task holds out, whose seed this
    is and whose split of a hand `split_of` tells.

    None where nothing leaks, and for a base that says nothing of how it was made.
    """
    try:
        made = json.loads((Path(base) / "recipe.json").read_text())["arguments"]
        recipe = Recipe(**{k: made[k] for k in ("num_cards", "targets", "seed")})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if num_cards != recipe.num_cards:
        return None
    seen = {hand for pool in allowed_hands(recipe).values() for hand in pool}
    leaked = sorted(hand for hand in seen if split_of(hand) not in ("train", "ood_train"))
    if not leaked:
        return None
    return (
        f"model.path: {base!r} was pre-trained on {len(leaked)} of the hands that task.general_points.seed {seed} and its "
        f"shares hold out: success on val, test and ood says nothing then. Keep seed {recipe.seed} and the default shares, or "
        "make a base of your own with python -m amft_fast.tasks.general_points.pretrain"
    )

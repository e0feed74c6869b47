"""Which hands a base checkpoint of this task may have seen, and whether it has seen what a task holds out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from amft_fast.tasks.general_points.hands import ID_RULE, OOD_RULE, assign_split, hands


def allowed_hands(num_cards: int, seed: int) -> dict[str, list[tuple[int, ...]]]:
    """For each rule, the multisets of values that pre-training may show.

    Hands without a value above 10 are allowed under both rules, as far as they are training hands.
    """
    train = [hand for hand in hands(num_cards, ID_RULE) if assign_split(hand, seed=seed) == "train"]
    other = [hand for hand in hands(num_cards, OOD_RULE) if assign_split(hand, seed=seed) == "ood_train"]
    return {ID_RULE: train, OOD_RULE: train + other}


def leak(base: str, num_cards: int, seed: int, split_of: Callable[[Sequence[int]], str]) -> str | None:
    """A sentence when the base checkpoint in the folder `base` was pre-trained on hands that a task holds out, whose seed this
    is and whose split of a hand `split_of` tells.

    None where nothing leaks, and for a base that says nothing of how it was made.
    """
    try:
        made = json.loads((Path(base) / "recipe.json").read_text())["arguments"]
        cards, made_with = int(made["num_cards"]), int(made["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if cards != num_cards:
        return None
    seen = {hand for pool in allowed_hands(num_cards, made_with).values() for hand in pool}
    leaked = sorted(hand for hand in seen if split_of(hand) not in ("train", "ood_train"))
    if not leaked:
        return None
    return (
        f"model.path: {base!r} was pre-trained on {len(leaked)} of the hands that task.general_points.seed {seed} and its "
        f"shares hold out: success on val, test and ood says nothing then. Keep seed {made_with} and the default shares, or "
        "make a base of your own with python -m amft_fast.tasks.general_points.pretrain"
    )

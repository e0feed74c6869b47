"""Problems of reasoning-gym, made in a process of its own: `python -m amft_fast.tasks.gym.generate`, driven by task.py.

Some of the package's generators go through sets, whose order hangs on the process's hash seed; this one runs with a fixed one,
so that problems are the same at each call and on each machine. It reads {"name", "options", "seed", "counts", "out"} from its
input and writes a pickle there: for each split a list of (seed, question, answer or None, entry), where the answer is one that
the package's own verifier gives 1 and the entry, a pickle again, is what it judges by. A mistake of the user's is one sentence
on its error output and exit code 2.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from typing import Any

from pydantic import BaseModel

from amft_fast.errors import UserError
from amft_fast.tasks import own

SPLITS = ("test", "val", "train")  # in the order of their seeds: more training problems move no other split
OURS = ("seed", "size")


def dataset(name: str, options: dict[str, Any], seed: int, size: int) -> Any:
    """The package's dataset of this name. Raises UserError for a name or parameter that it does not know or take."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as e:
        raise UserError(
            f"task.name reasoning_gym:{name} takes reasoning-gym ({e}): pip install 'amft-fast[gym]'"
        ) from None
    import difflib

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(DATASETS))}"
        raise UserError(f"task.name: reasoning-gym has no task {name!r}; {hint}")
    for ours in OURS:
        if ours in options:
            raise UserError(
                f"task.options.{ours}: the sizes and the seed of generated problems are --task.gym.train_size and the like"
            )
    if name == "composite":
        options = _with_configs(options)
    given = own.typed(DATASETS[name][1], options, f"reasoning_gym:{name}")
    given = dict(given) if isinstance(given, BaseModel) else given
    random.seed(seed)
    try:
        return create_dataset(name, seed=seed, size=size, **given)
    except (AssertionError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"task.options: reasoning_gym:{name} does not take them: {e or type(e).__name__}") from None


def _with_configs(options: dict[str, Any]) -> dict[str, Any]:
    """The parts of a composite need no config of their own here."""
    parts = options.get("datasets")
    try:
        parts = json.loads(parts) if isinstance(parts, str) else parts
    except ValueError as e:
        raise UserError(f"task.options.datasets must be a JSON list of {{name, weight, config}}: {e}") from None
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise UserError(f"task.options.datasets must be a list of {{name, weight, config}}, got {parts!r:.80}")
    return {**options, "datasets": [{"weight": 1.0, "config": {}, **part} for part in parts]}


def generate(name: str, options: dict[str, Any], seed: int, counts: dict[str, int]) -> dict[str, list[tuple]]:
    """The problems of each split. Each seed is in one split alone, and so is each question."""
    made = dataset(name, options, seed, sum(counts.values()))
    out: dict[str, list[tuple]] = {}
    asked: set[str] = set()
    at = 0
    for split in SPLITS:
        out[split], held = [], set(asked)
        for i in range(at, at + counts[split]):
            entry = _entry(made, i, seed)
            if entry is not None and entry["question"] not in held:
                asked.add(entry["question"])
                answer = entry["answer"]
                answer = answer if isinstance(answer, str) and _score(made, answer, entry) == 1 else None
                out[split].append((seed + i, entry["question"], answer, pickle.dumps(entry)))
        at += counts[split]
    return out


def _entry(made: Any, i: int, seed: int) -> dict[str, Any] | None:
    """Problem i; None where the generator finds none for its seed. Draws from the global streams are tied down too."""
    import numpy as np

    random.seed(seed + i)
    np.random.seed((seed + i) % 2**32)
    try:
        entry = made[i]
    except Exception:
        return None
    return entry if isinstance(entry.get("question"), str) else None


def _score(made: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(made.score_answer(answer, entry))
    except Exception:
        return 0.0


def main() -> int:
    asked = json.load(sys.stdin)
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("run this with PYTHONHASHSEED=0")
    try:
        made = generate(asked["name"], asked["options"], asked["seed"], asked["counts"])
    except UserError as e:
        print(str(e).replace("\n", " "), file=sys.stderr)
        return 2
    with open(asked["out"], "wb") as file:
        pickle.dump(made, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many CPU threads torch gets where the config does not say: as many as make the model faster here and now.

torch takes all cores that it sees. On a machine whose cores are taken, or in a container with a quota of them, a thread that
waits for its turn holds up all the others at every operation, and a model of a few layers gains nothing from a second one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from amft_fast.config import Config
from amft_fast.doctor.installed import usable_cores

GAIN = 0.9  # more threads must take at most this share of the time
# Sequences and tokens of the pass that is timed: between decoding, which hardly gains by threads, and an update, which does.
SHAPE = (16, 16)
SECONDS, PASSES = 0.3, 3  # spent on each number of threads, and the least of passes
LONG, BEATEN = 1.0, 3.0  # a number whose first pass took so many seconds, and so many times the fastest's, is out


def choose(cfg: Config, model: nn.Module, resume: bool = False) -> int:
    """Sets torch's threads, and returns how many: run.threads; else those of the run that is resumed, whose sums would come
    out otherwise; else what the environment says (OMP_NUM_THREADS); else by timing."""
    count = cfg.run.threads or (resume and recorded(Path(cfg.run.dir))) or 0
    if not count:
        count = torch.get_num_threads()
        if not os.environ.get("OMP_NUM_THREADS") and next(model.parameters()).device.type == "cpu":
            count = fastest(model, min(count, usable_cores()))
    torch.set_num_threads(count)
    return count


def recorded(folder: Path) -> int | None:
    """The threads of the run in `folder`, where it says."""
    try:
        return int(json.loads((folder / "environment.json").read_text())["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def fastest(model: nn.Module, most: int) -> int:
    """The least number of threads, of 1, 2, 4, ... and `most`, that no larger one beats by a tenth; timed on forward passes
    of a few sequences. The numbers take turns, so that what else the machine does for a moment slows all of them."""
    candidates = sorted({*(2**i for i in range(most.bit_length())), most} - {0})
    if len(candidates) == 1:
        return candidates[0]
    training, ids = model.training, torch.zeros(SHAPE, dtype=torch.long)
    model.eval()
    taken: dict[int, list[float]] = {count: [] for count in candidates}
    until = time.perf_counter() + SECONDS * len(candidates)
    try:
        while len(taken[candidates[0]]) < 1 + PASSES or time.perf_counter() < until:
            for count in candidates:
                torch.set_num_threads(count)
                taken[count].append(_seconds(model, ids))
            least = min(taken[count][0] for count in candidates)
            candidates = [count for count in candidates if taken[count][0] <= max(LONG, BEATEN * least)]
    finally:
        model.train(training)
    seconds = {count: _first_quartile(taken[count][1:]) for count in candidates}  # the first makes room
    best = candidates[0]
    for count in candidates[1:]:
        if seconds[count] < GAIN * seconds[best]:
            best = count
    return best


def _first_quartile(values: list[float]) -> float:
    """The least of three or four: what only slowed some passes is left out."""
    return sorted(values)[len(values) // 4]


def _seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a pass through all but the LM head."""
    begin = time.perf_counter()
    getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)
    return time.perf_counter() - begin

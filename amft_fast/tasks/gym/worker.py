"""The process that judges answers by reasoning-gym's verifiers: `python -m amft_fast.tasks.gym.worker JOB`, of math/pool.py.

Some of the package's verifiers give an answer to sympy or to a parser of their own, which may compute without end or fail: so
they run here, under the limits of math/worker.py. JOB is a file with the name, the options and the entries; `gold` is an
entry's number.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

from amft_fast.tasks.gym.generate import dataset
from amft_fast.tasks.math.worker import serve


def load() -> Callable[[str, str], float]:
    job = pickle.loads(Path(sys.argv[1]).read_bytes())  # written by task.py
    made = dataset(job["name"], job["options"], job["seed"], len(job["entries"]))

    def judge(answer: str, gold: str) -> float:
        score = float(made.score_answer(answer, pickle.loads(job["entries"][int(gold)])))
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    return judge


if __name__ == "__main__":
    serve(load)

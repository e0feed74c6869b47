"""The generated problems of the package reasoning-gym, by name: `--task.name reasoning_gym:countdown`.

`task.options` are the parameters of the package's own generator, `task.gym` sizes, seed and prompt. A problem's reward is the
score that the package's verifier gives its answer, from 0 to 1, and it is solved at 1. Problems are made, and answers judged,
in processes of their own (generate.py, worker.py); this one does not import the package.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from amft_fast.config import GymConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Item, Message, StepResult
from amft_fast.tasks.items import OfItems
from amft_fast.tasks.math.pool import Pool

SYSTEM_PROMPT = (
    "Think the problem through step by step. Write the final answer, and nothing else, between <answer> and </answer>."
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MAX_ANSWER = 20_000
"""Characters; a longer answer is wrong."""


Compare = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


class Problem(NamedTuple):
    """`number` is its place among the entries of the verifier; `answer` is known to be right, or None."""

    number: int
    question: str
    answer: str | None


class GymTask(OfItems):
    """The task `reasoning_gym:NAME`. One turn.

    `made` and `compare` take the place of the two kinds of processes: problems by split as generate.py gives them, and what
    scores (answer, number of the problem) pairs.
    Raises UserError when the package is not there, and for a name or parameters that it does not take.
    """

    splits = ("train", "val", "test")
    max_turns = 1

    def __init__(
        self,
        name: str,
        settings: GymConfig,
        options: dict[str, Any],
        made: dict[str, list[tuple]] | None = None,
        compare: Compare | None = None,
    ) -> None:
        self.settings = s = settings
        self.system = SYSTEM_PROMPT if s.system_prompt is None else s.system_prompt
        if made is None:
            made = generate(name, options, s.seed, {split: getattr(s, f"{split}_size") for split in self.splits})
        entries: list[bytes] = []
        self._items: dict[str, list[Item]] = {}
        for split in self.splits:
            self._items[split] = []
            for seed, question, answer, entry in made[split]:
                self._items[split].append(Item(f"{name}/{seed}", Problem(len(entries), question, answer)))
                entries.append(entry)
        if not self._items["train"]:
            raise UserError(f"task.gym: of {s.train_size} seeds none gave reasoning_gym:{name} a training problem")
        self._compare = compare or self._workers(
            pickle.dumps({"name": name, "options": options, "seed": s.seed, "entries": entries})
        )

    def _workers(self, job: bytes) -> Compare:
        """The package's verifier in a process per core."""
        self.folder = tempfile.TemporaryDirectory(prefix="amft-gym-")
        atexit.register(self.folder.cleanup)
        file = Path(self.folder.name) / "job"
        file.write_bytes(job)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Pool(cores, self.settings.score_seconds, ("amft_fast.tasks.gym.worker", str(file))).compare

    def prepare(self, *_: Any) -> list[str]:
        """How many problems there are, and how many with a demonstration."""
        counts = (f"{len(items)} {split}" for split, items in self._items.items())
        return [f"problems: {', '.join(counts)}; {len(self.demos('train'))} training ones with a demonstration"]

    def demo(self, item: Item) -> Demo | None:
        """The answer to a problem, where it is known."""
        problem = item.data
        return None if problem.answer is None else Demo(item.id, self._messages(problem), self._dressed(problem.answer))

    def start(self, item: Item) -> GymEpisode:
        return GymEpisode(item.data, self._messages(item.data), self)

    def step_all(self, episodes: Sequence[GymEpisode], texts: Sequence[str]) -> list[StepResult]:
        """The results of many answers, judged on all cores."""
        answers = [self._answer(text) for text in texts]
        open_ = [i for i, answer in enumerate(answers) if answer]
        scores = dict(zip(open_, self._compare([(answers[i], str(episodes[i].problem.number)) for i in open_])))
        return [_result(float(scores.get(i, 0.0)), answer) for i, answer in enumerate(answers)]

    def _messages(self, problem: Problem) -> tuple[Message, ...]:
        user = Message("user", problem.question)
        return (Message("system", self.system), user) if self.system else (user,)

    def _dressed(self, answer: str) -> str:
        return f"<answer>{answer}</answer>" if self.settings.answer_tags else answer

    def _answer(self, text: str) -> str:
        """The last one between tags, or the whole response; empty where there is none."""
        if self.settings.answer_tags:
            tagged = _TAGGED.findall(text)
            text = tagged[-1] if tagged else ""
        text = text.strip()
        return text if len(text) <= MAX_ANSWER else ""


class GymEpisode:
    """One answer to one problem."""

    def __init__(self, problem: Problem, messages: tuple[Message, ...], task: GymTask) -> None:
        self.problem, self.messages, self.task = problem, messages, task

    def step(self, text: str) -> StepResult:
        return self.task.step_all([self], [text])[0]


def _result(score: float, answer: str) -> StepResult:
    return StepResult(None, score, True, {"success": score >= 1, "answered": float(bool(answer))})


def generate(name: str, options: dict[str, Any], seed: int, counts: dict[str, int]) -> dict[str, list[tuple]]:
    """Problems by split, as generate.py gives them. Raises UserError with its sentence."""
    paths = [str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "problems"
        asked = {"name": name, "options": options, "seed": seed, "counts": counts, "out": str(out)}
        done = subprocess.run(
            [sys.executable, "-m", "amft_fast.tasks.gym.generate"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)},
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(said if done.returncode == 2 else f"reasoning_gym:{name} could not make problems: {said}")
        return pickle.loads(out.read_bytes())


def dry_run(name: str, settings: GymConfig, options: dict[str, Any]) -> list[str]:
    """Whether the package makes a problem from these options."""
    made = generate(name, options, settings.seed, {"train": 1, "val": 0, "test": 0})
    answer = "with" if made["train"] and made["train"][0][2] is not None else "without"
    return [f"task: reasoning_gym:{name} is there, {answer} demonstrations"]

"""The reward of mathematical answers: 1 when the final answer is as good as the gold answer, else 0.

The answer is found in this process, and compared here too where texts and exact arithmetic settle it (answer.py, compare.py);
what takes numerical evaluation is left to worker processes (pool.py, worker.py). A response that cannot be judged in time is
worth 0 and costs no other response anything.

`reward` and `rewards` may be called from any thread; from asyncio, by `await asyncio.to_thread(rewards, ...)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache

from amft_fast.tasks.math.answer import MAX_RESPONSE, choice, extract, final_answer
from amft_fast.tasks.math.compare import plain_verdict
from amft_fast.tasks.math.pool import Pool


def reward(response: str, ground_truth: str) -> float:
    """1.0 when the final answer of `response` is `ground_truth`, else 0.0. Never raises because of the response.

    The first answer that needs numerical evaluation starts a worker process (a second).
    """
    return rewards([response], [ground_truth])[0]


def rewards(responses: Sequence[str], ground_truths: Sequence[str], pool: Pool | None = None) -> list[float]:
    """`reward` of many, compared at once by worker processes (one per core unless a `pool` is given).

    Raises ValueError when the two lists differ in length or a ground truth is no text.
    """
    if len(responses) != len(ground_truths):
        raise ValueError(f"need one ground truth per response, got {len(responses)} and {len(ground_truths)}")
    out: list[float] = [0.0] * len(responses)
    unsettled: list[tuple[int, tuple[str, str]]] = []
    for i, (response, gold) in enumerate(zip(responses, ground_truths)):
        if not isinstance(gold, str) or not gold.strip():
            raise ValueError(f"ground_truths[{i}] must be a text that is not empty, got {gold!r}")
        answer = final_answer(response) if isinstance(response, str) else None
        verdict = _plain_verdict(answer, gold) if answer is not None else False
        if verdict is None:
            unsettled.append((i, (answer, gold)))
        else:
            out[i] = float(verdict)
    verdicts = (pool or default_pool()).compare([pair for _, pair in unsettled]) if unsettled else []
    for (i, _), verdict in zip(unsettled, verdicts):
        out[i] = float(verdict)
    return out


@lru_cache(16384)  # a policy gives the same answers again and again
def _plain_verdict(answer: str, gold: str) -> bool | None:
    try:
        return plain_verdict(answer, gold)
    except Exception:  # a mistake of ours must cost one item, not the run: the worker that gets it dies alone
        return None


@lru_cache(1)
def default_pool() -> Pool:
    """The process's own pool: a worker per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(cores)


def choice_reward(response: str, ground_truth: str) -> float:
    """1.0 when the final answer of `response` names the letter `ground_truth` (A to J), else 0.0."""
    answer = extract(response)
    return float(answer is not None and choice(answer) == ground_truth.strip().upper())


_THOUGHT = re.compile(r"\s*<think>.*?</think>(.*)", re.DOTALL)


def format_reward(response: str, thinking: bool = False, opened: bool = False) -> float:
    """1.0 when the form is as asked, else 0.0: an answer in \\boxed{}, with `thinking` after one <think> ... </think>.

    `opened`: the prompt ends in the `<think>` that the response closes.
    """
    text = response[-MAX_RESPONSE:]
    if thinking:
        match = _THOUGHT.fullmatch(f"<think>{text}" if opened else text)
        if not match or text.count("<think>") != 1 - opened or text.count("</think>") != 1:
            return 0.0
        text = match[1]
    return float(("\\boxed" in text or "\\fbox" in text) and extract(text) is not None)

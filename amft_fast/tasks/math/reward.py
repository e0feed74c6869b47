"""The reward of mathematical answers: 1 when the final answer is as good as the gold answer, else 0.

The answer is found and put into a normal form in this process (math_answer.py); where text and exact numbers do not settle it,
worker processes do (math_pool.py, math_compare.py), with math-verify when it is installed. A response that cannot be judged in
time is worth 0 and costs no other response anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache

from amft_fast.tasks.math.answer import MAX_RESPONSE, choice, extract, plain_verdict
from amft_fast.tasks.math.pool import Pool


def reward(response: str, ground_truth: str) -> float:
    """1.0 when the final answer of `response` is `ground_truth`, else 0.0. Never raises because of the response.

    The first answer that needs mathematics starts a worker process (a second or two).
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
        answer = extract(response) if isinstance(response, str) else None
        verdict = plain_verdict(answer, gold) if answer is not None else False
        if verdict is None:
            unsettled.append((i, (answer, gold)))
        else:
            out[i] = float(verdict)
    verdicts = (pool or default_pool()).compare([pair for _, pair in unsettled]) if unsettled else []
    for (i, _), verdict in zip(unsettled, verdicts):
        out[i] = float(verdict)
    return out


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


def format_reward(response: str, thinking: bool = False) -> float:
    """1.0 when the form is as asked, else 0.0: an answer in \\boxed{}, with `thinking` after one <think> ... </think>."""
    text = response[-MAX_RESPONSE:]
    if thinking:
        match = _THOUGHT.fullmatch(text)
        if not match or text.count("<think>") != 1 or text.count("</think>") != 1:
            return 0.0
        text = match[1]
    return float("\\boxed" in text and extract(text) is not None)

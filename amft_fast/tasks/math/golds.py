"""What the data may hold as a gold answer, and whether a demonstration ends in it: by the code that makes rewards."""

from __future__ import annotations

from amft_fast.tasks.math.answer import final_answer, unwrapped
from amft_fast.tasks.math.compare import same
from amft_fast.tasks.math.signs import names

_NONE = set(names("nan inf -inf +inf infinity none null nil n/a na proof notfound unknown ? - -- ...")) | {
    "not found", "no answer", "see solution", "see proof",
}  # fmt: skip


def is_gold(answer: str) -> bool:
    """Whether a text can be a gold answer: not empty, and not what data sets write where there is none (nan, None, proof)."""
    words = unwrapped(answer).strip(" \t\n$.*[]()").casefold()
    return bool(words) and words not in _NONE


def gold_fault(answer: str) -> str:
    """Why no answer could be right by this gold; empty where one can."""
    if not is_gold(answer):
        return "no gold answer"
    if not agrees(f"\\boxed{{{answer}}}", answer):
        return "gold answer that is not right against itself in a box"
    return ""


def agrees(response: str, gold: str) -> bool:
    """Whether the final answer of a response that is no policy's is the gold one. Without a time limit, and in this process."""
    found = final_answer(response)
    return found is not None and same(found, gold)

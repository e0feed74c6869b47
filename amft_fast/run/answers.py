"""Answers as they are kept for people: problem and answer in plain text, what is right, what was read, what it earned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from amft_fast.data.pictures import data_uri
from amft_fast.interfaces import Item, Sample, Task


def find(items: Iterable[Item], ids: Iterable[str]) -> dict[str, Item]:
    """The items with these ids; stops at the last of them."""
    wanted, found = set(ids), {}
    for item in items:
        if item.id in wanted:
            found[item.id] = item
            if len(found) == len(wanted):
                break
    return found


def kept(task: Task, item: Item, sample: Sample) -> dict[str, Any]:
    """One answer as a JSON object, its prompt and its text without the tokens of the chat template.

    `gold` where the task has the hook of that name, `answer` where its info holds what was read of the text (None: nothing
    could be), `advantage` (the mean over the policy's tokens) where the answer was trained on, `picture` where the task draws.
    """
    row: dict[str, Any] = {
        "prompt": "\n\n".join(m.content for m in task.start(item).messages),
        "completion": sample.text,
    }
    if hasattr(task, "gold"):
        row["gold"] = task.gold(item)
    if "answer" in sample.info:
        row["answer"] = sample.info["answer"]
    if sample.advantage is not None:
        row["advantage"] = sample.advantage
    row |= {"reward": sample.reward, "success": sample.success}
    if hasattr(task, "picture"):
        row["picture"] = data_uri(task.picture(item, sample))
    return row

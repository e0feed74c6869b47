"""The demonstration of a prompt of the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from amft_fast.data.batch import TokenSequence
from amft_fast.interfaces import Demo, Item, Task


class DemoOfPrompt:
    """The demonstration of a training prompt, by its id, as a sequence; None where it has none."""

    def __init__(self, task: Task, encoded: Callable[[Demo], TokenSequence]) -> None:
        self.task, self.encoded = task, encoded

    @cached_property
    def items(self) -> dict[str, Item]:
        return {item.id: item for item in self.task.prompts("train")}

    @cached_property
    def demos(self) -> dict[str, Demo]:
        """Of a task that gives no `demo`: all of them."""
        return {demo.id: demo for demo in self.task.demos("train")}

    def __call__(self, prompt_id: str) -> TokenSequence | None:
        if hasattr(self.task, "demo"):
            demo = self.task.demo(self.items[prompt_id])
        else:
            demo = self.demos.get(prompt_id)
        return None if demo is None else self.encoded(demo)

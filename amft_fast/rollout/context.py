"""Whether prompts and answers fit into the model's context, looked at before any time is spent.

Past its last position a model with learned positions fails, and one with rotary ones goes on and talks nonsense, which is then
trained on. So an answer is never asked for more tokens than its prompt leaves (`Encoder.room`), and what that cuts is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amft_fast.errors import UserError
from amft_fast.interfaces import Message, Task
from amft_fast.rollout.encoder import Encoder

READ = 2048  # prompts of a split that are read, of which the longest texts are tokenised
LOOKED_AT = 16  # prompts or demonstrations that are tokenised; images are read and scaled for their size
RAISE = "or raise model.max_position_embeddings where the model allows it"


def check_setting(context: int | None, max_new_tokens: int, name: str = "rollout.max_new_tokens") -> None:
    """Raises UserError when answers alone may fill the context."""
    if context is not None and max_new_tokens >= context:
        raise UserError(
            f"{name} is {max_new_tokens}, which leaves no room for a prompt in the model's context of {context} tokens: lower "
            f"it, {RAISE}"
        )


def check_prompts(
    encoder: Encoder, task: Task, splits: Sequence[str], max_new_tokens: int, name: str = "rollout.max_new_tokens"
) -> list[str]:
    """A sentence for each split in which a prompt leaves less than `max_new_tokens` for its answer, of those looked at.

    Raises UserError for a prompt that is longer than the context itself.
    """
    if encoder.context is None:
        return []
    check_setting(encoder.context, max_new_tokens, name)
    said = []
    for split in splits:
        chosen = _longest(task, task.prompts(split))
        longest = max((len(prompt_that_fits(encoder, messages, where)) for where, messages in chosen), default=0)
        if longest + max_new_tokens > encoder.context:
            said.append(
                f"{split}: prompts of up to {longest} tokens leave {encoder.context - longest} of the model's context of "
                f"{encoder.context}, fewer than {name} = {max_new_tokens}: their answers are cut at what is left"
            )
    return said


def check_demos(encoder: Encoder, task: Task) -> None:
    """Raises UserError for a training demonstration that is longer than the context, of those looked at."""
    if encoder.context is not None:
        for demo in _spread(task.demos("train"), LOOKED_AT):
            encoder.demo(demo)


def prompt_that_fits(encoder: Encoder, messages: Sequence[Message], where: str) -> list[int]:
    """The token ids of a prompt. Raises UserError when they leave no room for a single token of an answer."""
    prompt = encoder.prompt(messages)
    if encoder.room(prompt, 1) < 1:
        raise UserError(
            f"the prompt of {where} takes {len(prompt)} tokens, and the model's context is {encoder.context}: shorten the "
            f"system prompt or leave the problem out, {RAISE}"
        )
    return prompt


def _longest(task: Task, items: Sequence[Any]) -> list[tuple[str, Sequence[Message]]]:
    """(id, messages) of the items with the longest texts; of any items, where they show images."""
    if not len(items):
        return []
    pictured = any(m.images for m in task.start(items[0]).messages)
    read = [(item.id, task.start(item).messages) for item in _spread(items, LOOKED_AT if pictured else READ)]
    return sorted(read, key=lambda one: -sum(len(m.content) for m in one[1]))[:LOOKED_AT]


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, evenly over all."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]

"""Whether prompts and answers fit into the model's context, looked at before any time is spent.

Past its last position a model with learned positions fails, and one with rotary ones goes on and talks nonsense, which is then
trained on. So an answer is never asked for more tokens than its prompt leaves (`Encoder.room`), and what that cuts is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amft_fast.errors import UserError
from amft_fast.interfaces import Task
from amft_fast.rollout.encoder import Encoder

LOOKED_AT = 256  # prompts or demonstrations of a split
WITH_IMAGES = 16  # each is read and scaled for its size
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
    """A sentence for each split in which prompts leave less than `max_new_tokens` for their answers, of those looked at.

    Raises UserError for a prompt that is longer than the context itself.
    """
    if encoder.context is None:
        return []
    check_setting(encoder.context, max_new_tokens, name)
    said = []
    for split in splits:
        chosen = _spread(task.prompts(split), lambda item: task.start(item).messages)
        lengths = [len(prompt_that_fits(encoder, task.start(item).messages, item.id)) for item in chosen]
        short = [n for n in lengths if n + max_new_tokens > encoder.context]
        if short:
            said.append(
                f"{split}: {len(short)} of {len(lengths)} prompts looked at leave fewer than {name} = {max_new_tokens} of the "
                f"model's context of {encoder.context} tokens; their answers are cut, the shortest at "
                f"{encoder.context - max(short)}"
            )
    return said


def check_demos(encoder: Encoder, task: Task) -> None:
    """Raises UserError for a training demonstration that is longer than the context, of those looked at."""
    if encoder.context is not None:
        for demo in _spread(task.demos("train"), lambda demo: demo.messages):
            encoder.demo(demo)


def prompt_that_fits(encoder: Encoder, messages: Sequence[Any], where: str) -> list[int]:
    """The token ids of a prompt. Raises UserError when they leave no room for a single token of an answer."""
    prompt = encoder.prompt(messages)
    if encoder.room(prompt, 1) < 1:
        raise UserError(
            f"the prompt of {where} takes {len(prompt)} tokens, and the model's context is {encoder.context}: shorten the "
            f"system prompt or leave the problem out, {RAISE}"
        )
    return prompt


def _spread(items: Sequence[Any], messages_of: Any) -> list[Any]:
    """At most LOOKED_AT items, evenly over all."""
    if not len(items):
        return []
    limit = WITH_IMAGES if any(m.images for m in messages_of(items[0])) else LOOKED_AT
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]

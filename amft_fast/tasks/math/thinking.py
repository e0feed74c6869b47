"""Chat templates that open the thought themselves: their prompts end in `<think>`, which a response then closes without it."""

from __future__ import annotations

import re
from typing import Any

_OPENING = re.compile(r"<think>\s*$")


def opened_thought(tokenizer: Any) -> str:
    """What the tokenizer's chat template ends a prompt with: `<think>` and the space behind it, or nothing."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    chat = [{"role": "user", "content": "x"}]
    found = _OPENING.search(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    return found[0] if found else ""


def without_opening(response: str, opened: str) -> str:
    """A demonstration as it goes on behind `opened`, which it may begin with itself."""
    if not opened or not response.lstrip().startswith("<think>"):
        return response
    rest = response.lstrip().removeprefix("<think>")
    space = opened.removeprefix("<think>")
    return rest.removeprefix(space) if space else rest

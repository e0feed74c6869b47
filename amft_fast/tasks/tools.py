"""Tools for tasks of one's own: what the policy may call, as JSON schema, and the calls that it wrote.

A task offers tools on a message of the prompt, `Message("user", ..., tools=(schema(search),))`; the model's own chat template
says them in its own way. `calls(text)` reads an answer, and `Message("tool", result)` goes back. A call is text that the policy
wrote: its name may be unknown and its arguments anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

# As Hermes, Qwen and many others write calls. The last one may be cut off.
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
MAX_CALL = 100_000
"""Characters; a longer call is none."""


class Call(NamedTuple):
    """One call. `problem` says why it cannot be made; name and arguments are empty then."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's JSON schema by its annotations and its docstring in Google's style (transformers' get_json_schema)."""
    from transformers.utils import get_json_schema

    return get_json_schema(function)


def calls(text: str) -> list[Call]:
    """The calls in an answer, in their order: between <tool_call> and </tool_call>, or the answer as a whole where it is one.

    Never raises: a call that cannot be read has a `problem`.
    """
    found = _TAGGED.findall(text)
    if found:
        return [_call(inner) for inner in found]
    bare = text.strip()
    if not (bare.startswith("{") and bare.endswith("}")):
        return []
    alone = _call(bare)
    return [] if alone.problem else [alone]


def _call(text: str) -> Call:
    if len(text) > MAX_CALL:
        return Call("", {}, f"a call of more than {MAX_CALL} characters")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as e:
        return Call("", {}, f"the call is no JSON: {str(e)[:100]}")
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return Call("", {}, "a call must be an object with a name and arguments")
    arguments = said.get("arguments", said.get("parameters", {}))  # Llama's word for them
    if isinstance(arguments, str):  # OpenAI's way: JSON in a text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return Call("", {}, f"the arguments of {said['name'][:100]!r} must be an object")
    return Call(said["name"], arguments)

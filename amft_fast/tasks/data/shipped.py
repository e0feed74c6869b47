"""The rewards that come with the trainer, in the form of one's own: `(completions, **columns) -> list[float | None]`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amft_fast.config import DataConfig
from amft_fast.errors import UserError
from amft_fast.tasks.data.code import Limits, judge

NAMES = ("math", "format", "length", "regex", "json_schema", "code")
NEEDS = {"math": "answer", "code": "tests"}  # the column that each row must have


def text_of(completion: Any) -> str:
    """A completion as text, also where it is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def shipped(name: str, settings: DataConfig) -> Callable[..., Any] | None:
    """The reward of this name, None when there is no such. Raises ValueError for what its settings lack."""
    if name == "math":
        return math
    if name == "format":
        return _format(settings.thinking)
    if name == "length":
        return _length(*settings.length)
    if name == "regex":
        return _regex(settings.pattern)
    if name == "json_schema":
        return _json_schema(settings.json_schema)
    if name == "code":
        if not settings.allow_code:
            raise ValueError(
                "reward code runs what the policy has written: say --task.data.allow_code true, on a machine or in a container "
                "where that may happen"
            )
        return _code(Limits(settings.code_seconds, settings.code_memory_mb << 20))
    return None


def math(completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """1 where the final answer is as good as the row's `answer` (tasks/math/reward.py)."""
    from amft_fast.tasks.math.reward import rewards

    return rewards([text_of(c) for c in completions], [a if isinstance(a, str) else str(a) for a in answer])


def _format(thinking: bool) -> Callable[..., list[float]]:
    from amft_fast.tasks.math.reward import format_reward

    def format(completions: list[Any]) -> list[float]:
        """1 where the answer stands in \\boxed{}, with `thinking` after one <think> ... </think>."""
        return [format_reward(text_of(c), thinking) for c in completions]

    return format


def _length(low: int, high: int) -> Callable[..., list[float]]:
    def length(completions: list[Any]) -> list[float]:
        """1 from `low` to `high` characters, below and above in proportion, 0 from twice `high` on."""
        return [_within(len(text_of(c)), low, high) for c in completions]

    return length


def _within(n: int, low: int, high: int) -> float:
    if n < low:
        return n / low
    return 1.0 if n <= high else max(0.0, 2 - n / high) if high else 0.0


def _regex(pattern: str) -> Callable[..., list[float | None]]:
    default = _compiled(pattern, "task.data.pattern") if pattern else None

    def regex(completions: list[Any], pattern: list[Any] | None = None) -> list[float | None]:
        """1 where the row's `pattern`, or the setting, is found; None where there is neither."""
        own = [_compiled(p, "the column pattern") if p else default for p in pattern or [None] * len(completions)]
        return [None if p is None else float(p.search(text_of(c)) is not None) for c, p in zip(completions, own)]

    return regex


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{what} must be a regular expression, got {pattern!r}: {e}") from None


def _json_schema(file: str) -> Callable[..., list[float | None]]:
    try:
        from jsonschema import validators
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise UserError("reward json_schema takes jsonschema: pip install 'amft-fast[rewards]'") from None
    default = None
    if file:
        try:
            default = json.loads(Path(file).read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"task.data.json_schema: {file!r} cannot be read as JSON: {e}") from None

    def validator(schema: Any) -> Any:
        if schema is None:
            return None
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = validators.validator_for(schema)
        try:
            kind.check_schema(schema)
        except SchemaError as e:
            raise ValueError(f"no JSON schema: {e.message}") from None
        return kind(schema)

    fallback = validator(default)

    def json_schema(completions: list[Any], schema: list[Any] | None = None) -> list[float | None]:
        """1 where the answer is JSON that fits the row's `schema`, or the file's; None where there is neither."""
        own = [validator(s) or fallback for s in schema or [None] * len(completions)]
        return [None if v is None else float(_fits(v, text_of(c))) for c, v in zip(completions, own)]

    return json_schema


_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def _fits(validator: Any, text: str) -> bool:
    """Of the last fenced block, or else of the whole answer."""
    fenced = _FENCED.findall(text)
    try:
        return validator.is_valid(json.loads(fenced[-1] if fenced else text))
    except (ValueError, RecursionError):
        return False


def _code(limits: Limits) -> Callable[..., list[float]]:
    def code(completions: list[Any], tests: list[Any]) -> list[float]:
        """The share of the row's `tests` that the program in the answer passes (tasks/data/code.py)."""
        return judge([text_of(c) for c in completions], tests, limits)

    return code

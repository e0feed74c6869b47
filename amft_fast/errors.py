"""What is raised across the house, and how a bad value is shown in it. Imports nothing of the house."""

from __future__ import annotations

import reprlib
from typing import Any


class UserError(Exception):
    """A mistake of the user's. Its text is one sentence that says what was wrong and what to do; shown without traceback."""


class RolloutFailure(RuntimeError):
    """A rollout engine that could not be brought back. Its text is one sentence; the run saves its state and stops with it."""


class RewardFailure(RolloutFailure, UserError):
    """A reward of the user's that raised, hung or returned what is no reward. A run saves its state and stops with it, as with
    a rollout engine that is gone; elsewhere it is shown as any mistake."""


def shown(value: Any, width: int = 60) -> str:
    """A value for a sentence: its repr, cut to `width` characters, whatever the value is.

    What comes out of a file may be nested a million deep or be a number of a million digits: neither is walked through.
    """
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxother, cut.maxstring = 3, width, width
    try:
        text = cut.repr(value[:width] if isinstance(value, bytes) else value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= width else text[: width - 3] + "..."

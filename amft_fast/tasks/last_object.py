"""The last JSON object of a response, however it is wrapped in words. Nothing is executed."""

from __future__ import annotations

import json
import re
from typing import Any

_TAIL_CHARS = 4096
_MAX_OBJECTS = 32
_DECODER = json.JSONDecoder(strict=False)
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")


def last_object(text: str, field: str) -> dict[str, Any] | None:
    """The last JSON object in `text` that has `field`, or None.

    Whatever stands before and after it is passed over, as are line breaks inside strings and a comma before a closing
    bracket. Only the last 4096 characters are read, and the last 32 opening braces tried.
    """
    text = _TRAILING_COMMA.sub(r"\1", text[-_TAIL_CHARS:])
    at = len(text)
    for _ in range(_MAX_OBJECTS):
        at = text.rfind("{", 0, at)
        if at < 0:
            break
        try:
            found, _ = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):  # ValueError also for integers of thousands of digits
            continue
        if field in found:
            return found
    return None

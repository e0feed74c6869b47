"""Pictures of episodes as text: what a task draws for the report goes through samples.jsonl as a data URI."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

MAX_CHARS = 500_000
_URI = re.compile(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/]+={0,2}")


def data_uri(picture: Any) -> str:
    """A PIL image or a text of SVG as a data URI. Raises ValueError for anything else and for what is too large to keep."""
    if isinstance(picture, str):
        kind, data = "svg+xml", picture.encode()
    elif hasattr(picture, "save"):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        kind, data = "png", buffer.getvalue()
    else:
        raise ValueError(f"picture must be a PIL image or a text of SVG, got {type(picture).__name__}")
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    if len(uri) > MAX_CHARS:
        raise ValueError(f"picture must take at most {MAX_CHARS} characters as a data URI, got {len(uri)}")
    return uri


def shown_picture(value: Any) -> str:
    """The data URI of a picture if `value` is one, else an empty text. In a page such a picture runs no script."""
    whole = isinstance(value, str) and len(value) <= MAX_CHARS and _URI.fullmatch(value)
    return value if whole else ""

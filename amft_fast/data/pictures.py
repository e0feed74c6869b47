"""Pictures as text: what a task draws for the report goes through samples.jsonl as a data URI, and the images of cached
rollouts through checkpoints."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
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


class PackedImages:
    """Images as JSON values, each once, whoever shares it: PNG in base64 without loss, or the path it was given as."""

    def __init__(self) -> None:
        self.packed: list[dict[str, str]] = []
        self._places: dict[int, int] = {}

    def put(self, images: Iterable[Any]) -> list[int]:
        """The places of these images in `packed`."""
        places = []
        for image in images:
            if id(image) not in self._places:
                self._places[id(image)] = len(self.packed)
                self.packed.append(_packed(image))
            places.append(self._places[id(image)])
        return places


def _packed(image: Any) -> dict[str, str]:
    if not hasattr(image, "save"):
        return {"path": str(image)}
    return {"png": png(image)}


def png(image: Any, **settings: Any) -> str:
    """A PIL image in RGB, as PNG in base64 without loss; `settings` are those of PIL's writer."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", **settings)
    return base64.b64encode(buffer.getvalue()).decode()


def unpack_images(packed: Iterable[dict[str, str]]) -> list[Any]:
    """The images that `PackedImages` put away."""
    from PIL import Image

    images = []
    for entry in packed:
        if "path" in entry:
            images.append(entry["path"])
            continue
        image = Image.open(io.BytesIO(base64.b64decode(entry["png"])))
        image.load()
        images.append(image)
    return images

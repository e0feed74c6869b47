"""Every setting as people read it: type, default, bounds and meaning, all taken from config/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from amft_fast.config import FILE, Config
from amft_fast.config_file import toml_value

_KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "table",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Setting:
    """`kind`, `bounds` and `default` are words; `choices` are those of a setting that takes no other values."""

    name: str
    kind: str
    bounds: str
    default: str
    text: str
    choices: tuple[str, ...]
    is_file: bool

    @property
    def line(self) -> str:
        """All but the meaning."""
        return f"{self.kind}{', ' + self.bounds if self.bounds else ''}; default: {self.default}"


@dataclass(frozen=True)
class SectionHelp:
    """A section, with the settings that stand in it directly; `name` is empty for the config itself."""

    name: str
    text: str
    settings: tuple[Setting, ...]


@cache
def sections() -> tuple[SectionHelp, ...]:
    """All sections that hold settings, each before those within it."""
    return tuple(_walk(Config, ""))


def all_settings() -> list[Setting]:
    return [setting for section in sections() for setting in section.settings]


def first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _walk(model: type[BaseModel], prefix: str) -> Iterator[SectionHelp]:
    properties = model.model_json_schema()["properties"]
    own: list[Setting] = []
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((f"{prefix}{name}", kind))
        else:
            default = field.get_default(call_default_factory=True)
            own.append(_setting(f"{prefix}{name}", properties[name], default, _is_file(field)))
    if own:
        yield SectionHelp(prefix.rstrip("."), _one_line(model.__doc__ or ""), tuple(own))
    for name, kind in inner:
        yield from _walk(kind, f"{name}.")


def _setting(name: str, schema: dict[str, Any], default: Any, is_file: bool) -> Setting:
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    choices = tuple(text for part in parts for text in _choices(part))
    closed = choices if all(_choices(part) for part in parts) else ()
    kind = " or ".join(dict.fromkeys(_kind(part) for part in parts))
    bounds = " and ".join(dict.fromkeys(b for part in parts for b in _bounds(part)))
    words = "none" if default is None else toml_value(default)
    return Setting(name, kind, bounds, words, _one_line(schema.get("description", "")), closed, is_file)


def _choices(schema: dict[str, Any]) -> list[str]:
    if schema.get("type") == "boolean":
        return ["true", "false"]
    return [str(value) for value in schema.get("enum", [schema["const"]] if "const" in schema else [])]


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return " | ".join(_choices(schema))
    if schema.get("type") != "array":
        return _KINDS.get(schema.get("type", ""), "any value")
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(_kind(item) for item in schema['prefixItems'])}"
    return f"list of {_kind(schema.get('items', {}))}"


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for key, word in _BOUNDS.items():
        if key in schema:
            yield f"{word} {schema[key]:g}" if isinstance(schema[key], float) else f"{word} {schema[key]}"
    if schema.get("minLength"):
        yield "not empty"


def _is_file(field: Any) -> bool:
    return FILE in field.metadata or FILE in getattr(
        next(iter(getattr(field.annotation, "__args__", ())), None), "__metadata__", ()
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())

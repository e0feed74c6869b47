"""From a TOML file and dotted flags to a `Config` and back, with one sentence for each mistake. Imports no torch."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import reprlib
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from amft_fast.config import FILE, Config, clean_path
from amft_fast.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of too many digits to print
        return "a number of thousands of digits"


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted names of leaf settings below `model`."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        sub = info.annotation
        if isinstance(sub, type) and issubclass(sub, BaseModel):
            names += setting_names(sub, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def did_you_mean(name: str, known: list[str]) -> str:
    """'; did you mean x?' for the nearest known dotted name, by the whole name or by its last part alone."""
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(name, known, 1, 0.75)
    leaf = difflib.get_close_matches(name.rpartition(".")[2], list(by_leaf), 1, 0.7)
    if close or leaf:
        return f"; did you mean {close[0] if close else by_leaf[leaf[0]]}?"
    section = name.partition(".")[0]
    sections = sorted({k.partition(".")[0] for k in known})
    return f"; the sections are {', '.join(sections)}" if section not in sections else ""


def _explain(error: ValidationError, source: str) -> UserError:
    """One line per mistake: which setting, what was got, what is expected."""
    known = setting_names(Config)
    # By setting: of a list's items, and of the kinds that a value may have, the first mistake.
    lines: dict[str, str] = {}
    for e in error.errors():
        parts = [str(p) for p in e["loc"]]
        name = next((n for k in range(len(parts), 0, -1) if (n := ".".join(parts[:k])) in known), ".".join(parts))
        if e["type"] == "extra_forbidden":
            text = f"unknown setting {_cut(name)}{did_you_mean(_cut(name), known)}"
        elif e["type"] == "value_error":
            text = f"{name + ': ' if name else ''}{e['ctx']['error']!s}"
        else:
            text = f"{name}: {e['msg'][0].lower() + e['msg'][1:]}, got {short(e['input'])}"
        lines.setdefault(name, text)
    return UserError(f"{source}: " + "\n".join(lines.values()))


def _cut(name: str) -> str:
    """A name as a message shows it."""
    text = name if name.isprintable() and name else repr(name)
    return text if len(text) <= 100 else text[:100] + "..."


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def split_flags(args: list[str]) -> tuple[list[str], list[str]]:
    """A command line as (what is no setting, the settings as --section.field=value, or without = where no value follows).

    A setting's value is the next argument; a yes/no setting alone means true.
    """
    rest, flags = [], []
    i = 0
    while i < len(args):
        arg, i = args[i], i + 1
        name, equals, _ = arg.partition("=")
        if not re.fullmatch(r"--[^\s.]+(\.[^\s.]+)+", name):
            rest.append(arg)
            continue
        following = args[i] if i < len(args) else None
        if equals:
            flags.append(arg)
        elif _is_bool(name) and (following is None or following.lower() not in _TRUTH):
            flags.append(f"{name}=true")
        elif following is None or following.startswith("--"):
            flags.append(name)
        else:
            flags.append(f"{name}={following}")
            i += 1
    return rest, flags


# What may follow a yes/no setting; anything else after it is the next argument.
_TRUTH = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0", "null")


@cache
def _settings() -> type:
    """The config as pydantic-settings wants it."""
    from pydantic_settings import BaseSettings

    class Flags(BaseSettings, Config):
        pass

    return Flags


def parse_flags(flags: list[str]) -> dict[str, Any]:
    """`["--train.lr", "1e-4", "--run.overwrite"]` as a nested dict of the settings given.

    `--name=value` works too, lists are JSON, `null` is none, and a yes/no setting alone means true. Unknown names raise
    `UserError` with the nearest known one.
    """
    if not flags:
        return {}
    from pydantic_settings import CliSettingsSource, SettingsError

    known = setting_names(Config)
    flags, options = _take_options(flags)
    rest, settings = split_flags(flags)
    none = {name[2:]: None for name, _, value in (s.partition("=") for s in settings) if value == "null"}
    given = [s for s in settings if s.partition("=")[0][2:] not in none or s.partition("=")[0][2:] not in known]
    try:
        values = CliSettingsSource(_settings(), cli_parse_args=given + rest, cli_exit_on_error=False)()
    except SettingsError as e:
        text = str(e).removeprefix("error parsing CLI: ")
        unknown = re.match(r"unrecognized arguments: --?([^\s=]+)", text)
        section = re.match(r'error parsing value for field "(\w+)"', text)
        if unknown:
            text = f"unknown flag --{_cut(unknown[1])}{did_you_mean(_cut(unknown[1]), known)}"
        elif text.startswith("unrecognized arguments"):
            text += "; settings are given as --section.field value"
        elif section:
            named = " ".join(s for s in given if s.startswith(f"--{section[1]}")) or f"--{section[1]}"
            text = f"{_cut(named)}: no value of this setting; lists are given as JSON, for example '[1, 2]'"
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        raise UserError(text if len(text) < 500 else text[:500] + "...") from None
    for name in none:
        if name in known:
            *sections, leaf = name.split(".")
            at = values
            for part in sections:
                at = at.setdefault(part, {})
            at[leaf] = None
    return _merge(values, options)


OPTION = "--task.options."


def _take_options(flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags without those of `task.options`; and these, nested by their dots, as text: the task's class alone knows their
    types. One without a value means true."""
    rest, options = [], {}
    given = iter(range(len(flags)))
    for i in given:
        name, equals, value = flags[i].partition("=")
        if not name.startswith(OPTION):
            rest.append(flags[i])
            continue
        if not equals:
            alone = i + 1 == len(flags) or flags[i + 1].startswith("--")
            value = "true" if alone else flags[next(given)]
        parts: Any = value
        for part in reversed(name.removeprefix(OPTION).split(".")):
            parts = {part: parts}
        options = _merge(options, parts)
    return rest, {"task": {"options": options}} if options else {}


def _is_bool(flag: str) -> bool:
    """Whether `--section.field` names a yes/no setting."""
    model: Any = Config
    for part in flag.removeprefix("--").split("."):
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return False
        model = info.annotation
    return flag.startswith("--") and model in (bool, bool | None)


def load(path: str | Path | None, flags: list[str] | None = None) -> Config:
    """The configuration of a TOML file with dotted flags laid over it.

    Raises `UserError`: file missing or not TOML (with its line), unknown key or flag (with the nearest known one), wrong
    type or range, settings that contradict each other.
    """
    over = parse_flags(flags or [])
    source = "config" if path is None else str(path)
    try:
        config = Config.model_validate(_merge({} if path is None else _read(str(path)), over))
    except ValidationError as e:
        raise _explain(e, source) from None
    except RecursionError:
        raise UserError(f"{source}: values are nested too deeply") from None
    return config if path is None else _resolve_paths(config, Path(path).resolve().parent)


def _read(path: str) -> dict[str, Any]:
    """The values of a TOML file."""
    try:
        with open(clean_path(path), "rb") as f:
            text = f.read().decode("utf-8-sig")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"no config file {path!r}; see the configs/ folder for examples") from None
    except IsADirectoryError:
        raise UserError(f"{path!r} is a folder, not a TOML file") from None
    except OSError as e:
        raise UserError(f"config {path!r} cannot be read: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as e:  # of the path, or a number of thousands of digits
        raise UserError(f"config {short(path)}: {e}") from None


def is_there(path: str) -> bool:
    """Whether a file or folder is there, or a glob matches one; False for a name that no file system would take."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


def from_settings(base: str | Path | Config | None, settings: dict[str, Any]) -> Config:
    """A file's configuration, or `base` itself, with settings laid over it: dotted names, or sections as dicts.

    Raises UserError as `load` does.
    """
    values: dict[str, Any] = {}
    for name, value in settings.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        values = _merge(values, value)
    given = base if isinstance(base, Config) else load(base)
    try:
        return Config.model_validate(_merge(given.model_dump(exclude_unset=True), values))
    except ValidationError as e:
        raise _explain(e, "settings") from None


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Settings that are marked as files and are not there from the working directory are looked up in `folder`, the config
    file's."""

    def find(text: str) -> str:
        name, equals, path = text.rpartition("=")
        path, py, inside = path.partition(".py:")  # FILE.py:NAME
        path += py.rstrip(":")
        beside = folder / path
        found = path and not is_there(path) and is_there(str(beside))
        return name + equals + str(beside) + (f":{inside}" if py else "") if found else text

    def resolved(section: BaseModel) -> BaseModel:
        found: dict[str, Any] = {}
        for name, info in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                found[name] = resolved(value)
            elif FILE in info.metadata:
                found[name] = find(value)
            elif any(FILE in getattr(part, "__metadata__", ()) for part in get_args(info.annotation)):
                found[name] = [find(text) for text in value]
        return section.model_copy(update=found)

    return resolved(config)


def toml_value(value: Any) -> str:
    """A setting's value as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    # TOML allows no half of a surrogate pair, which JSON writes for what lies beyond 16 bits, and no raw DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text (settings that are None are left out, as TOML has no null)."""

    def lines(model: BaseModel, prefix: str) -> list[str]:
        scalars, tables = [], []
        for name, value in model:
            if isinstance(value, BaseModel):
                tables += ["", f"[{prefix}{name}]", *lines(value, f"{prefix}{name}.")]
            elif value is not None:
                scalars.append(f"{name} = {toml_value(value)}")
        return scalars + tables

    return "\n".join(lines(config, "")).strip() + "\n"

"""From a TOML file and dotted flags to a `Config` and back, with one sentence for each mistake. Imports no torch."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from amft_fast.config import FILE, Config
from amft_fast.errors import UserError


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


def _did_you_mean(name: str, known: list[str]) -> str:
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
    lines = []
    for e in error.errors():
        name = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            lines.append(f"unknown setting {name}{_did_you_mean(name, known)}")
        elif e["type"] == "value_error":
            lines.append(f"{name + ': ' if name else ''}{e['ctx']['error']!s}")
        else:
            lines.append(f"{name}: {e['msg'][0].lower() + e['msg'][1:]}, got {e['input']!r}")
    return UserError(f"{source}: " + "\n".join(lines))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def parse_flags(flags: list[str]) -> dict[str, Any]:
    """`["--train.lr", "1e-4", "--run.overwrite"]` as a nested dict of the settings given.

    `--name=value` works too, lists are JSON, `null` is none, and a yes/no setting alone means true. Unknown names raise
    `UserError` with the nearest known one.
    """
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

    class Flags(BaseSettings, Config):
        pass

    known = setting_names(Config)
    args: list[str] = []
    for i, flag in enumerate(flags):
        args.append(flag)
        if _is_bool(flag) and (i + 1 == len(flags) or flags[i + 1].startswith("--")):
            args.append("true")
    try:
        return CliSettingsSource(Flags, cli_parse_args=args, cli_exit_on_error=False)()
    except SettingsError as e:
        text = str(e).removeprefix("error parsing CLI: ")
        unknown = re.match(r"unrecognized arguments: --?([^\s=]+)", text)
        if unknown:
            text = f"unknown flag --{unknown[1]}{_did_you_mean(unknown[1], known)}"
        elif text.startswith("unrecognized arguments"):
            text += "; settings are given as --section.field value"
        raise UserError(text) from None


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
    values: dict[str, Any] = {}
    if path is not None:
        try:
            with open(path, "rb") as f:
                values = tomllib.load(f)
        except FileNotFoundError:
            raise UserError(f"no config file {str(path)!r}; see the configs/ folder for examples") from None
        except IsADirectoryError:
            raise UserError(f"{str(path)!r} is a folder, not a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise UserError(f"{path} is not valid TOML: {e}") from None
    try:
        config = Config.model_validate(_merge(values, parse_flags(flags or [])))
    except ValidationError as e:
        raise _explain(e, str(path) if path else "config") from None
    return config if path is None else _resolve_paths(config, Path(path).resolve().parent)


def is_there(path: str) -> bool:
    """Whether a file or folder is there, or a glob matches one; False for a name that no file system would take."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Settings that are marked as files and are not there from the working directory are looked up in `folder`, the config
    file's."""

    def find(text: str) -> str:
        name, equals, path = text.rpartition("=")
        beside = folder / path
        return name + equals + str(beside) if path and not is_there(path) and is_there(str(beside)) else text

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


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text (settings that are None are left out, as TOML has no null)."""

    def lines(model: BaseModel, prefix: str) -> list[str]:
        scalars, tables = [], []
        for name, value in model:
            if isinstance(value, BaseModel):
                tables += ["", f"[{prefix}{name}]", *lines(value, f"{prefix}{name}.")]
            elif value is not None:
                scalars.append(f"{name} = {_toml(value)}")
        return scalars + tables

    return "\n".join(lines(config, "")).strip() + "\n"

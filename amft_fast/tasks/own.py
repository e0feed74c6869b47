"""What a user brings along: a class or a function out of a file, a module or a plug-in, and the typing of its settings.

A task of one's own is named FILE.py:NAME, MODULE:NAME, or as a package calls it in the entry points `amft_fast.tasks`. Its
settings are `task.options`. They are typed by the class's `Options`, a pydantic model, which the class is then given as one
object; without one by the arguments of its constructor. Text (`--task.options.size 3`) becomes what the type asks for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from amft_fast.config import PLUG_INS
from amft_fast.errors import UserError
from amft_fast.interfaces import Task

NEEDED = ("splits", "max_turns", "prompts", "demos", "start")  # of interfaces.Task
ALWAYS = ("train", "val", "test")


# ---------------------------------------------------------------------------------------------------------------- loading


def load(text: str, setting: str) -> Any:
    """The object that `text` names: FILE.py:NAME or MODULE:NAME.

    A file is run anew at each call, and may import what lies beside it; modules are looked for in the working directory too.
    Raises UserError, naming `setting`, when there is no such file, module or name, or when running it fails.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise UserError(f"{setting}: {text!r} must be FILE.py:NAME or MODULE:NAME")
    module = _file(place, setting) if place.endswith(".py") else _module(place, setting)
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        close = difflib.get_close_matches(name, known, 1)
        raise UserError(f"{setting}: {place} has no {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
    return getattr(module, name)


def _file(place: str, setting: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{setting}: no file {place!r}")
    _look_in(path.parent)
    # A name of its own: two files may be called alike, and neither must hide an installed module.
    name = f"_amft_own_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise UserError(f"{setting}: {place} could not be run: {_said(e, str(path))}") from e
    return module


def _module(place: str, setting: str) -> Any:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(place)
    except Exception as e:
        raise UserError(f"{setting}: module {place!r} could not be imported: {_said(e)}") from e


def _look_in(folder: Path) -> None:
    """At the end of the path: what is installed is found first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _said(error: Exception, path: str = "") -> str:
    """The error in one line, with the line of the file it came from."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}" + (f" (line {line})" if line else "")


# ---------------------------------------------------------------------------------------------------------------- settings


def typed(made_by: Any, options: dict[str, Any], what: str) -> dict[str, Any] | BaseModel:
    """`options` as `made_by` takes them: its `Options`, or else keyword arguments, typed as its constructor's are.

    Raises UserError for an unknown option (with the nearest known one) and for a value that is not of its type.
    """
    model = getattr(made_by, "Options", None)
    own = inspect.isclass(model) and issubclass(model, BaseModel)
    if not own:
        model = _model_of(made_by)
    unknown = [name for name in options if name not in model.model_fields]
    if unknown and model.model_config.get("extra") != "allow":
        known = list(model.model_fields)
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known) or 'none'}"
        raise UserError(f"task.options.{unknown[0]}: {what} has no such option; {hint}")
    try:
        valid = _validate(model, options)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(map(str, ("task.options", *first["loc"])))
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise UserError(f"{name}: {first['msg'][0].lower() + first['msg'][1:]}{got}") from None
    return valid if own else {name: getattr(valid, name) for name in valid.model_fields_set}


def _validate(model: type[BaseModel], options: dict[str, Any]) -> BaseModel:
    """Text that a field refuses is tried once more as JSON: that is how lists and the like come from the command line."""
    try:
        return model.model_validate(options)
    except ValidationError as e:
        again = json.loads(json.dumps(options, default=str)) if _any_text(options) else None
        if again is None or not any(_read_at(again, error["loc"]) for error in e.errors()):
            raise
        return model.model_validate(again)


def _any_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_any_text, value.values()))
    return isinstance(value, str)


def _read_at(options: dict[str, Any], loc: tuple[Any, ...]) -> bool:
    """Replaces the text at the first part of `loc` that is one by the JSON in it; whether there was any."""
    at: Any = options
    for part in loc:
        if not isinstance(at, dict) or part not in at:
            return False
        if isinstance(at[part], str):
            at[part] = _json_or_text(at[part])
            return not isinstance(at[part], str)
        at = at[part]
    return False


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


JsonOrText = Annotated[Any, BeforeValidator(lambda value: _json_or_text(value) if isinstance(value, str) else value)]


def _model_of(made_by: Any) -> type[BaseModel]:
    """The arguments of a constructor or function as a pydantic model."""
    signature = inspect.signature(made_by)
    try:
        hints = typing.get_type_hints(made_by.__init__ if inspect.isclass(made_by) else made_by)
    except Exception:  # names that are there for a type checker alone
        hints = {}
    fields: dict[str, Any] = {}
    extra = "forbid"
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_KEYWORD:
            extra = "allow"
        elif p.kind is not p.VAR_POSITIONAL:
            free = p.default is p.empty or p.default is None
            kind = hints.get(name, JsonOrText if free else type(p.default))
            fields[name] = (kind, ... if p.default is p.empty else p.default)
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"Options of {getattr(made_by, '__name__', made_by)}", __config__=config, **fields)


# ------------------------------------------------------------------------------------------------------------------- tasks


def find(name: str) -> Any:
    """What makes the task of one's own called `name`: FILE.py:NAME, MODULE:NAME, or a plug-in's name. Raises UserError."""
    if ":" in name:
        return load(name, "task.name")
    for point in entry_points(group=PLUG_INS, name=name):
        try:
            return point.load()
        except Exception as e:
            raise UserError(f"task.name: the plug-in {name!r} ({point.value}) could not be loaded: {_said(e)}") from e
    raise UserError(f"task.name: no installed package offers the task {name!r}")


def make(name: str, options: dict[str, Any]) -> Task:
    """The task of one's own called `name` with these settings. Raises UserError for what is wrong with either."""
    made_by = find(name)
    if not callable(made_by):
        raise UserError(f"task.name: {name} is a {type(made_by).__name__}, not a class or function that makes a task")
    return checked(call(made_by, options, name), name)


def call(made_by: Callable[..., Any], options: dict[str, Any], what: str) -> Any:
    """`made_by` with its typed settings: as one object where it has `Options`, else as keyword arguments."""
    given = typed(made_by, options, what)
    return made_by(given) if isinstance(given, BaseModel) else made_by(**given)


def checked(task: Any, name: str) -> Task:
    """The task itself, when it has what `interfaces.Task` asks for. Raises UserError that says what is missing."""
    missing = [part for part in NEEDED if not hasattr(task, part)]
    if missing:
        raise UserError(
            f"task {name}: {type(task).__name__} has no {', '.join(missing)}; docs/tasks.md has a whole task"
        )
    lacking = [split for split in ALWAYS if split not in task.splits]
    if lacking:
        raise UserError(f"task {name}: splits must hold train, val and test, got {list(task.splits)}")
    return task

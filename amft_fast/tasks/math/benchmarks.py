"""Benchmarks by name: configs/benchmarks.toml says for each where its problems are and how many answers to draw."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amft_fast.config_file import is_there
from amft_fast.errors import UserError, shown
from amft_fast.tasks.math.data import Limits, Needed, Store, Tally, load
from amft_fast.tasks.math.sources import Source, is_file_name

_NAME = re.compile(r"\w[\w.+-]{0,99}")


class Benchmark(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    """File (from the benchmarks file's folder) or dataset name, `name:config@split`."""
    samples: int = Field(1, ge=1)
    """Answers to each problem."""
    columns: dict[str, str] = {}
    """Column map, where the layout is not a known one."""
    keep: dict[str, Any] = {}
    """Values that columns must have, to take one benchmark out of a file of several."""


def read_benchmarks(path: str | Path) -> dict[str, Benchmark]:
    """The benchmarks of a TOML file. Raises UserError that names file and entry."""
    path = Path(path)
    try:
        entries = tomllib.loads(path.read_text())
    except OSError:
        raise UserError(f"no benchmarks file {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid TOML: {e}") from None
    out = {}
    for name, entry in entries.items():
        try:
            benchmark = Benchmark(**{"name": name, **entry})
        except (ValidationError, TypeError) as e:
            first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": (), "msg": "must be a table"}
            raise UserError(f"{path}: [{name}] {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        out[name] = _beside(benchmark, path.parent)
    return out


def _beside(benchmark: Benchmark, folder: Path) -> Benchmark:
    """A relative file is looked up from the working directory, then from the benchmarks file's folder."""
    beside = str(folder.resolve() / benchmark.source)
    if is_file_name(benchmark.source) and not is_there(benchmark.source) and is_there(beside):
        return benchmark.model_copy(update={"source": beside})
    return benchmark


def chosen(file: str | Path, names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks asked for, as `pick` has them. Where each brings its own source, `file` need not be there."""
    bare = [name for name in names if "=" not in name and not _is_source(name)]
    return pick(read_benchmarks(file) if bare or os.path.exists(file) else {}, names)


def _is_source(name: str) -> bool:
    return is_file_name(name) or "/" in name


def pick(known: dict[str, Benchmark], names: Sequence[str]) -> list[Benchmark]:
    """Those asked for: names of `known`, `name=file or dataset` (the rest as in the file, if it is there), or files."""
    out: list[Benchmark] = []
    for name in names:
        name, _, source = name.partition("=")
        if source:
            known_one = known.get(name) or Benchmark(name=name, source=source)
            # Another source may be laid out otherwise: the map and the filter belong to the one in the file.
            out.append(known_one.model_copy(update={"source": source, "columns": {}, "keep": {}}))
        elif name in known:
            out.append(known[name])
        elif _is_source(name):
            out.append(Benchmark(name=Path(name).name.partition(".")[0], source=name))
        else:
            raise UserError(
                f"no benchmark {name!r}: known are {', '.join(known) or 'none'}; a file or dataset is given as name=source"
            )
    for benchmark in out:
        if not _NAME.fullmatch(benchmark.name) or benchmark.name in ("train", "val", "test"):
            raise UserError(
                f"benchmark {shown(benchmark.name)}: the name becomes a split and a file: letters, digits, . _ + -, at most "
                "100, and not train, val or test; name=source gives it one"
            )
    doubled = {b.name for i, b in enumerate(out) if b.name in [c.name for c in out[:i]]}
    if doubled:
        raise UserError(f"benchmark {doubled.pop()!r} is asked for twice; name=source gives one another name")
    return out


def load_benchmark(benchmark: Benchmark, store: Store, limit: int | None = None, needed: Needed = "gold") -> Tally:
    """Reads the problems into `store`; nothing is over-long here."""
    return load(
        f"benchmark {benchmark.name}",
        [Source(benchmark.source, "test")],
        lambda key: store,
        columns=benchmark.columns,
        keep=benchmark.keep,
        needed=needed,
        limits=Limits(1 << 60, 1 << 60, lambda texts: [0] * len(texts)),
        max_problems=limit,
    )


def default_benchmarks_file() -> Path:
    """configs/benchmarks.toml, from the working directory or from the repository this package lies in."""
    name = Path("configs") / "benchmarks.toml"
    return name if name.exists() else Path(__file__).resolve().parents[3] / name

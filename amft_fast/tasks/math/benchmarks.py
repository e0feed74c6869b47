"""Benchmarks by name: configs/benchmarks.toml says for each where its problems are and how many answers to draw."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amft_fast.errors import UserError
from amft_fast.tasks.math.data import Limits, Store, Tally, load
from amft_fast.tasks.math.sources import FILE_ENDINGS, Source


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
    file = Path(benchmark.source)
    if benchmark.source.endswith(FILE_ENDINGS) and not file.exists() and (folder / file).exists():
        return benchmark.model_copy(update={"source": str((folder / file).resolve())})
    return benchmark


def pick(known: dict[str, Benchmark], names: Sequence[str]) -> list[Benchmark]:
    """Those asked for: names of `known`, `name=file or dataset` (the rest as in the file, if it is there), or files."""
    out = []
    for name in names:
        name, _, source = name.partition("=")
        if source:
            known_one = known.get(name) or Benchmark(name=name, source=source)
            # Another source may be laid out otherwise: the map and the filter belong to the one in the file.
            out.append(known_one.model_copy(update={"source": source, "columns": {}, "keep": {}}))
        elif name in known:
            out.append(known[name])
        elif name.endswith(FILE_ENDINGS) or "/" in name:
            out.append(Benchmark(name=Path(name).name.partition(".")[0], source=name))
        else:
            raise UserError(
                f"no benchmark {name!r}: known are {', '.join(known) or 'none'}; a file or dataset is given as name=source"
            )
    doubled = {b.name for i, b in enumerate(out) if b.name in [c.name for c in out[:i]]}
    if doubled:
        raise UserError(f"benchmark {doubled.pop()!r} is asked for twice; name=source gives one another name")
    return out


def load_benchmark(benchmark: Benchmark, store: Store, limit: int | None = None) -> Tally:
    """Reads the problems into `store`; nothing is over-long here."""
    return load(
        f"benchmark {benchmark.name}",
        [Source(benchmark.source, "test")],
        lambda key: store,
        columns=benchmark.columns,
        keep=benchmark.keep,
        limits=Limits(1 << 60, 1 << 60, lambda texts: [0] * len(texts)),
        max_problems=limit,
    )


def default_benchmarks_file() -> Path:
    """configs/benchmarks.toml, from the working directory or from the repository this package lies in."""
    name = Path("configs") / "benchmarks.toml"
    return name if name.exists() else Path(__file__).resolve().parents[3] / name

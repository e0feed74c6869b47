"""What a dry run looks at of mathematics: the first usable row of each source, and that benchmarks are where they say."""

from __future__ import annotations

from itertools import islice
from typing import Any

from amft_fast.config import MathConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Hub
from amft_fast.tasks.math.benchmarks import Benchmark, chosen
from amft_fast.tasks.math.layouts import read_row, recognise
from amft_fast.tasks.math.sources import BadRow, Source


def dry_run(settings: MathConfig, hub: Hub) -> list[str]:
    """One line for each thing looked at. Raises UserError for what is wrong and can be told without the hub."""
    if not settings.train:
        raise UserError("task.math.train: name at least one file or dataset")
    file = settings.benchmarks_file
    return [
        *(_source("training data", Source(text), settings.columns, hub) for text in settings.train),
        *(_benchmark(benchmark, hub) for benchmark in chosen(file, settings.benchmarks)),
        *(_benchmark(benchmark, hub, bare=True) for benchmark in chosen(file, settings.decontaminate)),
    ]


def _source(
    what: str,
    source: Source,
    columns: dict[str, str],
    hub: Hub,
    keep: dict[str, Any] | None = None,
    bare: bool = False,
) -> str:
    if not source.is_file:
        name = source.text.partition("@")[0].partition(":")[0]
        return f"{what}: {hub.look_up('dataset', name)}"
    trouble = ""
    for place, row in islice(source.rows(), 1000):
        if isinstance(row, BadRow) or any(row.get(k) != v for k, v in (keep or {}).items()):
            trouble = trouble or (f"; the first: {place}: {row}" if isinstance(row, BadRow) else "")
            continue
        try:
            read_row(row, columns, bare)
        except (BadRow, KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
            trouble = trouble or f"; the first: {place}: {e}"
            continue
        return f"{what}: {source.text}, layout {'by columns' if columns else recognise(row) or 'problems alone'}"
    raise UserError(f"{what}: no usable row among the first 1000 of {source.text}{trouble}")


def _benchmark(benchmark: Benchmark, hub: Hub, bare: bool = False) -> str:
    what = f"benchmark {benchmark.name}"
    return _source(what, Source(benchmark.source, "test"), benchmark.columns, hub, benchmark.keep, bare)

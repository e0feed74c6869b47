"""Where rows of problems come from: files, globs of files, and datasets of the Hugging Face hub, all streamed.

What a file is, is told by what it holds where that can be told: Parquet, Arrow and the compressions by their first bytes, text
by its byte-order mark or its zero bytes. The name decides between JSON and CSV alone.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from amft_fast.errors import UserError, shown

# Names that are files whether or not they are there: without this a mistyped one would be asked of the hub.
_FILE_NAME = re.compile(r"\.(?:jsonl|ndjson|json|parquet|arrow|csv|tsv)(?:\.(?:gz|bz2|xz|zst))?$", re.IGNORECASE)
FILE_KINDS = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, the text ones also as .gz, .bz2, .xz, .zst"
# Keys under which a JSON file that is one object holds its rows.
_WRAPPERS = ("data", "rows", "train", "examples", "instances", "problems", "questions")
_PROBLEM_COLUMNS = {"problem", "question", "prompt", "messages", "conversations", "instruction"}

Placed = tuple[str, "dict[str, Any] | BadRow"]


class BadRow(ValueError):
    """A row that cannot be used; its text says why."""


def is_file_name(text: str) -> bool:
    """Whether a source's text names files by its ending, there or not."""
    return _FILE_NAME.search(text) is not None


def _matches(text: str) -> list[str]:
    return sorted(p for p in glob.glob(os.path.expanduser(text), recursive=True) if os.path.isfile(p))


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a glob, or a dataset `name`, `name:config`, `name@split`, `name:config@split`.

    The name may be a folder: datasets reads those as it does the hub's, and those that `save_to_disk` wrote.
    """

    text: str
    split: str = "train"

    @property
    def is_file(self) -> bool:
        return is_file_name(self.text) or os.path.isfile(os.path.expanduser(self.text)) or glob.has_magic(self.text)

    def rows(self) -> Iterator[Placed]:
        """(place, row) pairs; the place is `file:line` for text and `name:row` else, counted from 1.

        A row that cannot be read by itself comes as a BadRow. Raises UserError when the source cannot be read, or not to its
        end.
        """
        if not self.is_file:
            yield from _hub(self.text, self.split)
            return
        paths = [self.text] if os.path.isfile(os.path.expanduser(self.text)) else _matches(self.text)
        if not paths:
            raise UserError(f"no data file {'matches ' if glob.has_magic(self.text) else ''}{shown(self.text, 200)}")
        for path in paths:
            yield from _file(Path(path).expanduser())


def _file(path: Path) -> Iterator[Placed]:
    """The rows of one file, whatever it is."""
    place = f"{path}:0"
    try:
        with path.open("rb") as raw:
            head = raw.peek(8)[:8]
            if head.startswith(b"PAR1"):
                rows = _parquet(path)
            elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
                rows = _arrow(path)
            elif path.suffix.lower() in (".parquet", ".arrow"):
                raise ValueError(f"it begins with {bytes(head)!r}")
            else:
                rows = _text_rows(path, _unpacked(raw, head))
            for place, row in rows:
                yield place, row
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, RecursionError, ImportError) as e:
        said = getattr(e, "strerror", None) or first_line(e)
        after = "" if place.endswith(":0") else f" beyond {place.rpartition(':')[2]}"
        kind = f" as {path.suffix[1:].capitalize()}" if path.suffix.lower() in (".parquet", ".arrow") else ""
        raise UserError(f"data file {shown(str(path), 200)} cannot be read{kind}{after}: {said}") from None


# --------------------------------------------------------------------------------------------------------------- text


def _unpacked(raw: BinaryIO, head: bytes) -> BinaryIO:
    """The bytes of a file, unpacked if they are packed."""
    openers: dict[bytes, Callable[[BinaryIO], Any]] = {
        b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
        b"BZh": bz2.BZ2File,
        b"\xfd7zXZ": lzma.LZMAFile,
        b"\x28\xb5\x2f\xfd": _zstandard,
    }
    for magic, opener in openers.items():
        if head.startswith(magic):
            return io.BufferedReader(opener(raw))
    return raw


def _zstandard(raw: BinaryIO) -> Any:
    return _needs("pyarrow").CompressedInputStream(raw, "zstd")


def _text_rows(path: Path, data: BinaryIO) -> Iterator[Placed]:
    head = data.peek(64)[:64]
    if head.startswith(b"PAR1"):
        raise ValueError("it is packed Parquet: unpack it first")
    encoding = json.detect_encoding(head)
    if encoding.endswith(("le", "be")) and head[:16].count(0) < 6:  # no mark, and a zero byte in an odd place
        encoding = "utf-8"
    # A bad byte spoils its line alone: it is smuggled through as half a surrogate pair and found there. In UTF-16 and
    # UTF-32 one may shift all that follows.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    name = re.sub(r"\.(?:gz|bz2|xz|zst)$", "", path.name.lower())
    if name.endswith((".csv", ".tsv")):
        return _csv(path, io.TextIOWrapper(data, encoding, errors, newline=""), name.endswith(".tsv"))
    return _json(path, io.TextIOWrapper(data, encoding, errors), name.endswith(".json"))


def _json(path: Path, text: TextIO, named_json: bool) -> Iterator[Placed]:
    """Rows of JSON, one object a line or all of them in a list; which of the two is seen at the first line."""
    lines = ((i, line) for i, line in enumerate(text, 1) if line.strip().strip("\ufeff"))
    first = next(lines, None)
    if first is None:
        return
    opening, second = _value(first[1]), None
    if isinstance(opening, BadRow):  # the first line of a list that runs over many, or a damaged row
        whole = named_json or first[1].strip("\ufeff ").startswith("[")
    else:  # a file of one line, or the first of several
        second = next(lines, None)
        wrapper = isinstance(opening, dict) and (not opening or _wrapped(opening) is not None)
        whole = second is None and (wrapper or not isinstance(opening, dict))
    if whole:
        yield from _whole(path, first[1] + text.read())
        return
    for i, line in chain([first], [second] if second else [], lines):
        yield f"{path}:{i}", _object(line)


def _whole(path: Path, text: str) -> Iterator[Placed]:
    """The rows of a file that is one JSON value."""
    try:
        found = json.loads(text.lstrip("\ufeff"))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"it is no JSON: {e}; one object a line is .jsonl") from None
    rows = _wrapped(found) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise UserError(f"data file {str(path)!r} must hold a JSON list of rows, got {type(found).__name__}")
    for i, row in enumerate(rows, 1):
        yield f"{path}:{i}", row if isinstance(row, dict) else BadRow(f"no JSON object but {type(row).__name__}")


def _wrapped(found: dict[str, Any]) -> list[Any] | None:
    """The list of rows in an object that is their wrapper; None for a row, which may have a column of such a name."""
    if not _PROBLEM_COLUMNS.isdisjoint(found):
        return None
    lists = (found[k] for k in _WRAPPERS if isinstance(found.get(k), list))
    return next((rows for rows in lists if rows and all(isinstance(r, dict) for r in rows)), None)


def _object(line: str) -> dict[str, Any] | BadRow:
    row = _value(line)
    return row if isinstance(row, dict | BadRow) else BadRow(f"no JSON object but {type(row).__name__}")


def _value(line: str) -> Any:
    """What a line of JSON says, or a BadRow."""
    spoilt = _spoilt(line)
    if spoilt:
        return spoilt
    try:
        return json.loads(line.lstrip("\ufeff"))
    except RecursionError:
        return BadRow("no JSON (nested too deeply)")
    except ValueError as e:
        return BadRow(f"no JSON ({e})")


def _spoilt(text: str) -> BadRow | None:
    found = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    return found and BadRow(f"not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start() + 1}")


def _csv(path: Path, text: TextIO, tabs: bool) -> Iterator[Placed]:
    """Rows of a table whose first line names the columns; an empty field is none."""
    csv.field_size_limit(1 << 30)
    first = text.readline().lstrip("\ufeff")
    # What spreadsheets write where a comma is the decimal point has semicolons.
    delimiter = "\t" if tabs else max(",;\t|", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    if len(set(names)) < len(names):
        raise ValueError(f"its first line names a column twice: {shown(names, 200)}")
    reader, line = csv.reader(text, delimiter=delimiter, strict=True), 2
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as e:
            fields = BadRow(f"no CSV ({e}; read to line {reader.line_num + 1})")
        if fields is None:
            return
        if fields:
            yield f"{path}:{line}", _record(names, fields)
        line = reader.line_num + 2


def _record(names: list[str], fields: list[str] | BadRow) -> dict[str, Any] | BadRow:
    if isinstance(fields, BadRow):
        return fields
    if len(fields) != len(names):
        return BadRow(f"{len(fields)} fields under {len(names)} column names")
    return _spoilt("".join(fields)) or {name: field or None for name, field in zip(names, fields)}


# ------------------------------------------------------------------------------------------------------------- tables


def _needs(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ImportError(f"it takes {name}: pip install 'amft-fast[math]'") from None


def _parquet(path: Path) -> Iterator[Placed]:
    _needs("pyarrow")
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _table_rows(path, file.iter_batches(batch_size=256))


def _arrow(path: Path) -> Iterator[Placed]:
    """An Arrow file of either form: datasets writes streams, Feather is the one with an index."""
    pa = _needs("pyarrow")
    with path.open("rb") as raw:
        if raw.peek(6)[:6] == b"ARROW1":
            file = pa.ipc.open_file(raw)
            batches: Iterable[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(raw)
        yield from _table_rows(path, batches)


def _table_rows(path: Path, batches: Iterable[Any]) -> Iterator[Placed]:
    i = 0
    for batch in batches:
        for row in _python_rows(batch):
            i += 1
            yield f"{path}:{i}", row


def _python_rows(batch: Any) -> Iterable[dict[str, Any] | BadRow]:
    """The rows of a batch; one that holds text that is not UTF-8, or a time that Python has not, does not spoil its
    neighbours."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as e:
        if batch.num_rows == 1:
            return [BadRow(first_line(e))]
    return chain.from_iterable(_python_rows(batch.slice(i, 1)) for i in range(batch.num_rows))


def _hub(text: str, split: str) -> Iterator[Placed]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{text!r} is no file, and to read it from the hub takes datasets: pip install 'amft-fast[math]'"
        ) from None
    name, _, asked = text.partition("@")
    name, _, config = name.partition(":")
    from huggingface_hub.utils import logging as hub_logging

    datasets.utils.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        if any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            rows = found[asked or split] if isinstance(found, datasets.DatasetDict) else found
        else:
            rows = datasets.load_dataset(name, config or None, split=asked or split, streaming=True)
        for i, row in enumerate(rows, 1):
            yield f"{text}:{i}", row
    except Exception as e:  # every layer below (datasets, hub, http, fsspec) has exceptions of its own
        where = (
            "is a folder that datasets cannot read"
            if os.path.isdir(name)
            else ("is no file here, and could not be had from the hub")
        )
        raise UserError(f"dataset {shown(text, 200)} {where}: {first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with its type where that says more than the text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, ValueError | ImportError) and text
    return (text if plain else f"{type(error).__name__}: {text}")[:300]

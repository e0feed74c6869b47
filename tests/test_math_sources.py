"""Files of every form that rows come in, and what is said of those that are damaged."""

import bz2
import codecs
import gzip
import json
import lzma

import pytest

from amft_fast.errors import UserError
from amft_fast.tasks.math.sources import BadRow, Source

ROWS = [{"problem": "Wie groß ist √2, gerundet?", "answer": "1.41"}, {"problem": 'Say "a, b"\nand c', "answer": "x"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'problem,answer\n"Wie groß ist √2, gerundet?",1.41\n"Say ""a, b""\nand c",x\n'


def read(path):
    return [row for _, row in Source(str(path)).rows()]


def zst(data):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data).to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
ENCODED = {
    "utf-8 with a byte-order mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-16 without a mark": lambda text: text.encode("utf-16-le"),
    "utf-32": lambda text: text.encode("utf-32"),
    "lines of DOS": lambda text: text.replace("\n", "\r\n").encode(),
}
FORMS = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "a.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=1),
    "pretty.jsonl": json.dumps(ROWS, indent=1),
    "oneline.jsonl": json.dumps(ROWS) + "\n",
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "pretty_wrapped.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "a.csv": CSV,
    "a.tsv": CSV.replace("problem,", "problem\t").replace(",1.41", "\t1.41").replace(",x", "\tx"),
    "semicolons.csv": CSV.replace("problem,", "problem;").replace(",1.41", ";1.41").replace(",x", ";x"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packing", ["", *PACKED])
def test_text_is_read_whatever_its_form_and_packing(tmp_path, name, packing):
    data = FORMS[name].encode()
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKED[packing](data) if packing else data)
    assert read(path) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "a.csv"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_text_is_read_whatever_its_encoding(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(ENCODED[encoding](FORMS[name]))
    got = read(tmp_path / name)
    if "DOS" in encoding and name == "a.csv":
        got[1]["problem"] = got[1]["problem"].replace("\r\n", "\n")
    assert got == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.arrow", "stream.arrow", "no_ending"])
def test_tables_are_known_by_what_they_hold(tmp_path, name):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table, path = pa.Table.from_pylist(ROWS), tmp_path / name
    if "arrow" in name:
        make = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    assert read(path) == ROWS


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "one") == ROWS and read(tmp_path / "splits") == ROWS
    assert [row for _, row in Source(f"{tmp_path / 'splits'}@test").rows()] == ROWS[1:]


def test_globs_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl.gz")):
        data = (json.dumps({"i": i}) + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / "*.jsonl") == [{"i": 1}, {"i": 0}]
    assert read(tmp_path / "**/*.jsonl*") == [{"i": 1}, {"i": 0}, {"i": 2}]
    assert [place for place, _ in Source(str(tmp_path / "?.jsonl")).rows()][1] == f"{tmp_path / 'b.jsonl'}:1"
    with pytest.raises(UserError, match=r"no data file matches '.*x\*\.jsonl'"):
        read(tmp_path / "x*.jsonl")


def test_a_home_folder_and_names_that_no_file_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(LINES)
    assert read("~/a.jsonl") == ROWS
    for name in ("x" * 300 + ".jsonl", "a\0b.jsonl", "/".join(["x" * 200] * 40) + ".csv"):
        with pytest.raises(UserError, match=r"^no data file '"):
            read(name)


def bad(path):
    rows = [(place.rpartition(":")[2], row) for place, row in Source(str(path)).rows()]
    return {int(i): str(row) for i, row in rows if isinstance(row, BadRow)}, [r for _, r in rows if isinstance(r, dict)]


def test_a_damaged_row_does_not_spoil_its_neighbours(tmp_path):
    good = b'{"a": 1}\n'
    deep = b"[" * 100_000 + b"]" * 100_000
    rows = [
        good,
        b'{"a": "\xff\xfe"}\n',
        b'{"a": ' + deep + b"}\n",
        b'{"a": 1\n',
        b"7\n",
        b"\n",
        b"9" * 5000 + b"\n",
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    said, kept = bad(tmp_path / "a.jsonl")
    assert kept == [{"a": 1}] * 2 and list(said) == [2, 3, 4, 5, 7]
    assert said[2] == "not UTF-8: byte 0xff at character 8" and said[3] == "no JSON (nested too deeply)"
    assert said[4].startswith("no JSON (Expecting") and said[5] == "no JSON object but int"

    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n1,2,3\n\n1,"x"y\n1,\xff\n1,\n7,"never closed\n1,2\n')
    said, kept = bad(tmp_path / "a.csv")
    assert kept == [{"a": "1", "b": "2"}, {"a": "1", "b": None}] and list(said) == [3, 5, 6, 8]
    assert said[3] == "3 fields under 2 column names" and "not UTF-8" in said[6]
    assert said[8].startswith("no CSV (unexpected end of data; read to line")


def test_a_text_that_is_not_utf_8_spoils_one_row_of_a_table(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.StringArray.from_buffers(
        3, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"a\xff\xfeb")
    )
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    said, kept = bad(tmp_path / "a.parquet")
    assert kept == [{"t": "a"}, {"t": "b"}] and "utf-8" in said[2]


def cut(data):
    return data[: len(data) * 2 // 3]


DAMAGED = {
    "cut.jsonl.gz": (lambda: cut(gzip.compress(LINES.encode() * 99)), "cannot be read.*: EOFError"),
    "cut.jsonl.bz2": (lambda: cut(bz2.compress(LINES.encode() * 99)), "cannot be read.*: EOFError"),
    "cut.jsonl.xz": (lambda: cut(lzma.compress(LINES.encode() * 99)), "cannot be read.*: EOFError"),
    "cut.jsonl.zst": (lambda: cut(zst(LINES.encode() * 99)), "cannot be read.*: OSError: Truncated"),
    "flipped.jsonl.gz": (lambda: gzip.compress(LINES.encode() * 99)[:-8] + b"\0" * 8, "CRC check failed"),
    "odd.jsonl": (lambda: LINES.encode("utf-16")[:-1], "truncated data"),
    "deep.json": (lambda: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "number.json": (lambda: b"7", "must hold a JSON list of rows, got int"),
    "other.json": (lambda: b'{\n"a": 1\n}', "must hold a JSON list of rows, got dict"),
    "cut.json": (lambda: b'[\n{"a": 1},\n{"a"', "is no JSON: .*; one object a line is .jsonl"),
    "twice.csv": (lambda: b"a,b,a\n1,2,3\n", "names a column twice"),
    "text.parquet": (lambda: b"no table", "cannot be read as Parquet: it begins with b'no table'"),
    "cut.parquet": (lambda: b"PAR1" + b"\0" * 50, "cannot be read as Parquet: "),
    "cut.arrow": (lambda: b"ARROW1\0\0" + b"\0" * 50, "cannot be read as Arrow: "),
    "packed.parquet.gz": (lambda: gzip.compress(b"PAR1" + b"\0" * 50), "packed Parquet: unpack it first"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name):
    data, said = DAMAGED[name]
    (tmp_path / name).write_bytes(data())
    with pytest.raises(UserError, match=said) as e:
        read(tmp_path / name)
    assert f"data file '{tmp_path / name}'" in str(e.value) and "\n" not in str(e.value)


def test_where_reading_broke_off_is_said(tmp_path):
    rows = "".join(json.dumps({"i": i, "x": f"{i * 2654435761 % 2**32}"}) + "\n" for i in range(12_000))
    (tmp_path / "a.jsonl.gz").write_bytes(cut(gzip.compress(rows.encode())))
    with pytest.raises(UserError, match=r"cannot be read beyond \d+: EOFError: Compressed file ended"):
        read(tmp_path / "a.jsonl.gz")


def test_a_row_with_a_column_named_as_a_wrapper_is_a_row(tmp_path):
    row = {"problem": "P", "examples": [{"problem": "Q"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read(tmp_path / "a.jsonl") == [row]


def test_empty_files_have_no_rows(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        assert read(tmp_path / name) == []
    (tmp_path / "b.json").write_text("[]")
    assert read(tmp_path / "b.json") == []

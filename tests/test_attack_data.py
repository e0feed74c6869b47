"""A hundred data files of every form, odd and damaged: never a traceback, never a row that is neither used nor counted.

Two attacks. Rows are made with what befell each of them known, in files that are whole: then those that are right are used, to
the last one, and those that are not are counted. Or a file's bytes are flipped, cut, doubled or mixed: then it is read, or the
load ends with one sentence that names it; rows that were read are accounted for all the same.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pytest

from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.run import preflight
from amft_fast.tasks.math.data import Store, Tally, load
from amft_fast.tasks.math.sources import Source

FILES = 100
USED_WITHOUT_DEMO = "(the problem is used without it)"
PACKINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le")


def text(rng, i):
    alphabet = [
        "x",
        "√2",
        "$a+b$",
        '"',
        "'",
        ",",
        ";",
        "\n",
        "é",
        "日本",
        "\\boxed{3}",
        "<|im_end|>",
        "{",
        "]",
        "\u2028",
        "\x00",
        "  ",
    ]
    return f"Problem {i}: " + " ".join(rng.choices(alphabet, k=rng.randint(1, 9))) + " end"


def right(rng, i):
    """A row in one of the layouts; its problem has its number in it."""
    problem, answer = text(rng, i), str(rng.randint(-9, 10**6))
    chat = [{"role": "user", "content": problem}]
    reply = [{"role": "assistant", "content": f"So \\boxed{{{answer}}}."}]
    return rng.choice(
        [
            {"problem": problem, "answer": answer},
            {"question": problem, "answer": f"steps\n#### {answer}"},
            {"problem": problem, "solution": f"So \\boxed{{{answer}}}.", "answer": None},
            {"prompt": chat, "reward_model": {"ground_truth": answer}},
            {"prompt": chat, "reward_model": json.dumps({"ground_truth": answer}), "response": None},
            {"messages": chat + reply},
            {"prompt": problem, "completion": reply[0]["content"]},
            {"instruction": problem, "input": "", "output": reply[0]["content"]},
            {"conversations": [{"from": "human", "value": problem}, {"from": "gpt", "value": "No box."}]},
            {"Problem": problem, "Answer": answer, "extra": [None, {"a": 1.5}]},
        ]
    )


def wrong(rng, i):
    """A row that is none."""
    odd = [
        None,
        "",
        "   ",
        True,
        [],
        {},
        [None],
        {"a": [[[]]]},
        float("nan"),
        float("-inf"),
        "\ud800",
        [{"role": "tool"}],
        10**400,
    ]
    problem, value = text(rng, i), rng.choice(odd)
    return rng.choice(
        [
            {"problem": problem, "answer": rng.choice([v for v in odd if v != 10**400])},
            {"problem": value, "answer": "1"},
            {"messages": value},
            {"prompt": [{"role": "user", "content": value}], "answer": "1"},
            {"prompt": problem, "reward_model": {"ground_truth": None}},
            {"question": problem, "options": value, "answer": "B"},
            {"text": problem},
            {},
        ]
    )


DAMAGED_LINES = [
    b"{",
    b'{"problem": "x", "answer":',
    b"nonsense",
    b"7",
    b"null",
    b"[1, 2]",
    b'"text"',
    b'{"problem": "\xff", "answer": "1"}',
]
DAMAGED_LINES += [b"[" * 5000, b'{"a":' * 5000, b"1" * 6000, b'{"problem": "a" "answer": "1"}', b"\x00", b"{]"]


def shapes(rng, rows):
    """(name, bytes) of a file that holds the rows."""
    packing, encoding = rng.choice(list(PACKINGS)), rng.choice(ENCODINGS)
    kind = rng.choice(["jsonl", "json", "pretty.json", "wrapped.json", "parquet"])
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.table({"problem": [r["problem"] for r in rows], "answer": [r["answer"] for r in rows]}), sink)
        return "a.PARQUET", sink.getvalue()
    made = {
        "jsonl": lambda: rng.choice(["\n", "\r\n"]).join(json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in rows),
        "json": lambda: json.dumps(rows),
        "pretty.json": lambda: json.dumps(rows, indent=1),
        "wrapped.json": lambda: json.dumps({"about": "x", "data": rows}),
    }[kind]()
    ending = "." + kind.rpartition(".")[2]
    return f"a{ending}{packing}", PACKINGS[packing](
        made.encode(encoding, "surrogatepass" if "8" in encoding else "replace")
    )


def read(path) -> tuple[Tally | None, list[str], str]:
    """(tally, problems used, what was said instead)."""
    store = Store()
    try:
        tally = load("data", [Source(str(path))], lambda key: store)
    except UserError as e:
        said = str(e)
        assert str(path) in said and "\n" not in said and len(said) < 2000, said
        return None, [], said
    dropped = sum(n for kind, n in tally.counts.items() if USED_WITHOUT_DEMO not in kind)
    assert tally.kept == len(store) and tally.kept + dropped == tally.rows, tally
    assert all(len(line) < 4000 for line in tally.lines())
    return tally, [p.problem for p in store], ""


def look(path):
    """The dry run reads the same files: it may refuse them, in one sentence."""
    cfg = Config.model_validate({"task": {"name": "math", "math": {"train": [str(path)]}}})
    try:
        preflight.check(cfg)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


@pytest.mark.parametrize("seed", range(FILES // 2))
def test_rows_that_are_right_are_used_and_the_others_counted(tmp_path, seed):
    rng = random.Random(f"rows {seed}")
    good = [right(rng, i) for i in range(rng.randint(1, 12))]
    bad = [wrong(rng, i) for i in range(100, 100 + rng.randint(0, 6))]
    mixed = [*good, *bad]
    rng.shuffle(mixed)
    if seed % 5 == 0:  # in a table all rows have the same columns, of one type
        good = [{"problem": text(rng, i), "answer": str(i)} for i in range(9)]
        bad = [{"problem": None, "answer": "1"}, {"problem": text(rng, 99), "answer": None}]
        mixed = good + bad
        rng.shuffle(mixed)
        name, data = shapes(rng, mixed)
    elif seed % 5 == 1:
        lines = [json.dumps(r).encode() for r in good] + rng.sample(DAMAGED_LINES, 6)
        bad = [None] * 6
        rng.shuffle(lines)
        name, data = "a.jsonl", b"\n".join(lines)
        while data.startswith(b"[" * 9):  # as the first line this would open a list
            rng.shuffle(lines)
            data = b"\n".join(lines)
    elif seed % 5 == 2:
        good = [{"problem": text(rng, i).replace("\x00", ""), "answer": str(i), "note": ""} for i in range(9)]
        sink = io.StringIO(newline="")
        writer = csv.writer(sink, delimiter=rng.choice(",;\t"))
        writer.writerows([list(good[0]), *([r[c] for c in r] for r in good)])
        writer.writerows([["one field alone"], ["problem", "", ""], ["", "1", ""]])
        bad = [None] * 3
        name, data = "a.csv", sink.getvalue().encode(rng.choice(ENCODINGS))
    else:
        shape = rng.choice(["jsonl", "json"])
        made = "\n".join(map(json.dumps, mixed)) if shape == "jsonl" else json.dumps(mixed)
        packing = rng.choice(list(PACKINGS))
        name, data = f"a.{shape}{packing}", PACKINGS[packing](made.encode(rng.choice(ENCODINGS)))
    (tmp_path / name).write_bytes(data)
    tally, used, said = read(tmp_path / name)
    look(tmp_path / name)
    assert tally is not None, said
    numbers = sorted(int(p.split(":")[0].removeprefix("Problem ")) for p in used if p.startswith("Problem "))
    assert numbers == sorted(range(len(good))) and tally.rows == len(good) + len(bad), tally.lines()


@pytest.mark.parametrize("seed", range(FILES // 2))
def test_files_whose_bytes_are_damaged_are_read_or_named(tmp_path, seed):
    rng = random.Random(f"bytes {seed}")
    name, data = shapes(rng, [{"problem": text(rng, i), "answer": str(i)} for i in range(rng.randint(1, 40))])
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.randint(1, 40)
        match rng.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data[at : at + size] = rng.randbytes(size)
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                del data[at : at + size]
            case 4:
                data += data[:at]
            case 5:
                data[at : at + 1] = bytes([rng.choice([0, 10, 34, 91, 123, 255])])
    if rng.random() < 0.2:
        name = rng.choice(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.tsv.zst"])
    (tmp_path / name).write_bytes(data)
    read(tmp_path / name)
    look(tmp_path / name)

"""Pickles that bite: 98 of them, none of which runs code, fills the memory, overflows the stack or hangs."""

import pickle
import random
import resource
import struct
import subprocess
import sys

import pytest

from amft_fast.tasks.virl import pickles
from amft_fast.tasks.virl.data import load_mapping, load_routes
from amft_fast.tasks.virl.pickles import MAX_STACK, read_pairs

MARKER = "bitten"
TOUCH = f"S'touch {MARKER}'\n".encode()


def long1(number):
    data = pickle.encode_long(number)
    return b"\x8b" + struct.pack("<i", len(data)) + data


# What each leaves on the stack, were it let: opcodes of every protocol.
BITES = {
    "GLOBAL": b"cos\nsystem\n(" + TOUCH + b"tR",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93(" + TOUCH + b"tR",
    "OBJ": b"(cos\nsystem\n" + TOUCH + b"o",
    "NEWOBJ": b"cbuiltins\nobject\n)\x81",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pid\n",
    "BINPERSID": b"NQ",
    "a memo of two thousand million": b"K\x01r\xfe\xff\xff\x7f",
    "a million tuples in one another": b"K\x01" + b"\x85" * 1_000_000,
    "a tuple of 2^60 numbers": b"K\x01" + b"q\x00h\x00\x86" * 60,
    "a million lists in one another": b"]" * 1_000_000 + b"a" * 999_999,
    "a text of 2^62 characters": b"\x8d" + struct.pack("<Q", 1 << 62) + b"x",
    "10**6000": long1(10**6000),
}
# Where it stands: alone, as key, as value, in a place, in a batch, before the mapping, under a mark.
PLACES = [
    lambda bite: bite + b".",
    lambda bite: b"}" + bite + b"\x8c\x01as.",
    lambda bite: b"}K\x01K\x02\x86" + bite + b"s.",
    lambda bite: b"}K\x01" + bite + b"\x86\x8c\x01as.",
    lambda bite: b"}(K\x01K\x02\x86\x8c\x01a" + bite + b"\x8c\x01bu.",
    lambda bite: bite + b"0}K\x01K\x02\x86\x8c\x01as.",
    lambda bite: b"(" + bite + b"\x8c\x01ad.",
]
HOSTILE = [place(bite) for bite in BITES.values() for place in PLACES]

CODE = """
import os, resource, sys
from pathlib import Path
from amft_fast.tasks.virl.data import load_mapping
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sorted(Path(sys.argv[1]).iterdir(), key=lambda p: int(p.name)):
    try: print(folder.name, len(load_mapping(folder)), flush=True)
    except ValueError as e: print(folder.name, "refused", len(str(e)), flush=True)
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_98_hostile_pickles_are_refused(tmp_path):
    assert len(HOSTILE) == 98 == len(set(HOSTILE))
    for i, data in enumerate(HOSTILE):
        (tmp_path / "all" / str(i)).mkdir(parents=True)
        (tmp_path / "all" / str(i) / "gps_pano_mapping.pkl").write_bytes(data)

    def bound():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "all")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=bound,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, grown = done.stdout.splitlines()
    said = [line.split() for line in lines]
    assert [(int(s[0]), s[1]) for s in said] == [(i, "refused") for i in range(98)]
    assert max(int(s[2]) for s in said) < 600 and int(grown.split()[1]) < 200 * 1024  # characters, kilobytes
    assert not (tmp_path / MARKER).exists() and not any((tmp_path / "all").rglob(MARKER))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read_to_what_pickle_reads(protocol):
    rng = random.Random(protocol)
    places = [(rng.uniform(-90, 90), rng.uniform(-180, 180)) for _ in range(3000)]
    mapping = {p: f"pano_{i % 700}" for i, p in enumerate(places)} | {
        (1, -2): "whole",
        (10**30, 0): "ä",
        (0.5, 0.0): "'\n",
    }
    assert dict(read_pairs(pickle.dumps(mapping, protocol))) == mapping


def test_what_python_2_wrote_is_read():
    assert read_pairs(b"(dp0\n(F1.5\nF2.5\ntp1\nS'pano_1'\np2\ns.") == [((1.5, 2.5), "pano_1")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "pickle exhausted"),
        (b"}", "pickle exhausted"),
        (b"}}.", "ends with 2 values"),
        (b"(.", "not a dict"),
        (b"K\x01.", "not a dict"),
        (b"}h\x05K\x01s.", "number 5 of its memo"),
        (b"}s.", "takes more values than it holds"),
        (b"}(K\x01s.", "takes more values than it holds"),
        (b"}u.", "takes more values than it holds"),
        (b"}(K\x01u.", "something else than numbers"),
        (b"q\x00.", "takes more values than it holds"),
        (b"}K\x01}s.", "something else than numbers"),
        (b"}" + b"K\x01" * (MAX_STACK + 1) + b".", "larger than a mapping"),
        (b"}q\x64.", "number 100 of its memo after 1 opcodes"),
        (b"}(" + b"K\x01" * 9 + b"t\x8c\x01as.", "a few numbers and texts"),
        (b"}cos\nsystem\n", r"opcode GLOBAL of 'os system'"),
    ],
)
def test_malformed_pickles_say_what_is_wrong(data, said):
    with pytest.raises(ValueError, match=said):
        read_pairs(data)


@pytest.mark.parametrize(
    ("bound", "said"), [("MAX_BYTES", "has 5,00. bytes"), ("MAX_MEMO", "larger"), ("MAX_OPCODES", "larger")]
)
def test_what_a_pickle_may_take_is_bounded(monkeypatch, bound, said):
    monkeypatch.setattr(pickles, bound, 1000)
    assert read_pairs(b"}" + b"\x94" * 500 + b".") == []
    with pytest.raises(ValueError, match=said):
        read_pairs(b"}" + b"\x94" * 5000 + b".")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-91", "1e999", "NaN", "true", '"1"', "9" * 4000])
def test_numbers_that_are_no_place_are_refused_in_both_files(tmp_path, number):
    (tmp_path / "gps_pano_mapping.json").write_text(f'[[{number}, 2.0, "a"]]')
    with pytest.raises(ValueError, match=r"must be \(latitude, longitude\), got") as e:
        load_mapping(tmp_path)
    assert len(str(e.value)) < 400
    start = f'{{"start_place": {{"relocated_geocode": [1.0, {number}]}}}}'
    (tmp_path / "route_infos.json").write_text(f"[[{start if number != '-91' else start.replace('-91', '400')}], 1]")
    with pytest.raises(
        ValueError, match=r"route 0: start_place.relocated_geocode must be \(latitude, longitude\), got"
    ):
        load_routes(tmp_path)


def test_deep_json_is_refused_in_both_files(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "route_infos.json").write_text(f"[[{deep}], 1]")
    with pytest.raises(ValueError, match="JSON nested too deeply"):
        load_routes(tmp_path)
    (tmp_path / "gps_pano_mapping.json").write_text(deep)
    with pytest.raises(ValueError, match="is refused"):
        load_mapping(tmp_path)

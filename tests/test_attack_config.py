"""300 configurations that nobody would write: each is refused in a sentence, or comes back from its run's file as it was."""

import json
import random
import tomllib
from functools import reduce

import pytest

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.errors import UserError

NAMES = config_file.setting_names(Config)
# Values as TOML has them; flags take the same texts.
VALUES = [
    "nan", "-inf", "inf", "0", "-1", "1", "2", "0.5", "1e-320", "1e39", "-1e308", str(2**31), str(2**63), "-" + "9" * 30,
    "9" * 4400, "0x" + "f" * 40, "true", "false", '""', '"nan"', '"x"', '"a\\u0000b"', '"\\uD7FF\\U0001F600"', '"../.."',
    '"~no_such_user_here/x"', '"/dev/null"', '"' + "y" * 6000 + '"', '"' + "d/" * 3000 + '"', "[]", "[1]", "[1, 2]", "[2, 1]",
    "[nan, inf]", '["a", "b"]', '["~no_such_user_here"]', "[[[[[[]]]]]]", "[" * 400 + "]" * 400, "{}", "{a = 1}", '{a = "b"}',
    '{"a\\u0000" = "b"}', "1979-05-27", "07:32:00", '"""\nseveral\nlines"""', "'amft'", "1_000", "+1", "null", "",
]  # fmt: skip
BROKEN = [
    b"\xff\xfe",
    b"\x00",
    b"[",
    b"=",
    b"\xef\xbb\xbf",
    b"\r",
    b"[train]\n[train]\n",
    b'[train]\n"" = 1\n',
    b"a.b.c.d = 1\n",
]


# Lines that are right, so that some of the files are.
SHIPPED = [
    f"{n} = {json.dumps(value)}"
    for n in NAMES
    if isinstance(value := reduce(getattr, n.split("."), Config()), int | float | str | tuple | list)
]


def name(lot: random.Random) -> str:
    """A setting, a section, or something like one."""
    known = lot.choice(NAMES)
    twisted = [
        known.partition(".")[0],
        known + ".x",
        known[:-1],
        known.upper(),
        "." + known,
        known.replace(".", ".."),
        "x",
        "",
    ]
    return lot.choice([known] * 12 + twisted)


def attack(lot: random.Random) -> tuple[bytes, list[str]]:
    """A TOML file and flags."""
    lines = [lot.choice([f"{name(lot)} = {lot.choice(VALUES)}", lot.choice(SHIPPED)]) for _ in range(lot.randrange(4))]
    text = "\n".join(lines).encode()
    if lot.random() < 0.2:
        at = lot.randrange(len(text) + 1)
        text = text[:at] + lot.choice(BROKEN) + text[at:]
    flags = []
    for _ in range(lot.choice([0, 0, 1, 2])):
        value = lot.choice(VALUES).strip('"').replace("\\u0000", "\0")
        flags += lot.choice([[f"--{name(lot)}", value], [f"--{name(lot)}={value}"], [f"--{name(lot)}"], [value]])
    return text, flags


def parts_of(config: Config) -> str:
    return json.dumps(config.model_dump(), sort_keys=True)


@pytest.mark.parametrize("part", range(3))
def test_300_configurations(tmp_path, part):
    path, taken = tmp_path / "c.toml", 0
    for seed in range(100 * part, 100 * part + 100):
        text, flags = attack(random.Random(seed))
        path.write_bytes(text)
        try:
            cfg = config_file.load(path, flags)
        except UserError as e:
            said = str(e)
            assert 10 < len(said) < 3000 and "Traceback" not in said and "\0" not in said, seed
            assert all(len(line) < 700 for line in said.splitlines()), seed
            continue
        taken += 1
        written = config_file.to_toml(cfg)
        assert "nan" not in written.split() and "inf" not in written.split(), seed
        again = Config.model_validate(tomllib.loads(written))
        assert parts_of(again) == parts_of(cfg), seed
    assert taken > 10, "some of them are configurations"

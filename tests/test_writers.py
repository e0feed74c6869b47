"""The files that grow while a run goes: what a crash, a full disk and other hands do to them."""

import json
import shutil

import pytest

from amft_fast.errors import UserError
from amft_fast.run.writers import JsonLines, replace_text


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_from_the_resumed_step_on_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path, 0, pytest.fail)
    for step in range(5):
        file.write({"step": step, "loss": float("inf")})
    file.close()
    file = JsonLines(path, 3, pytest.fail)
    file.write({"step": 3})
    file.sync()
    assert steps(path) == [0, 1, 2, 3] and json.loads(path.read_text().splitlines()[0])["loss"] is None


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff"], ids=["cut off", "no line break", "bytes"]
)
def test_a_line_cut_off_by_a_crash_is_dropped_without_ado(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + torn)
    JsonLines(path, 9, pytest.fail).close()
    assert steps(path) == [0, 1] and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        b"7", b"null", b'"step"', b"[1]", b'["step"]', b"\xff\xfe{", b"{", b"", b'{"other": 1}', b'{"step": null}',
        b'{"step": "1"}', b'{"step": NaN}', b"[" * 100_000, b"1" * 5000, b'{"step": true}',
    ],
    ids=lambda line: line[:12],
)  # fmt: skip
def test_a_damaged_line_is_named_left_out_and_kept_beside(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    held = b'{"step": 0}\n' + line + b'\n{"step": 1}\n{"step": 2}\n'
    path.write_bytes(held)
    said = []
    JsonLines(path, 2, said.append).close()
    assert steps(path) == [0, 1]
    assert len(said) == 1 and "metrics.jsonl: line 2 is damaged" in said[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == held


def test_no_room_for_a_line_is_a_sentence(tmp_path, file_limit):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path, 0)
    file.write({"step": 0})
    with (
        file_limit(20),
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written: File too large; .* --resume"),
    ):
        file.write({"step": 1})
    file.close()
    JsonLines(path, 9, pytest.fail).close()
    assert steps(path) == [0]


def test_no_room_at_a_resume_leaves_the_file_as_it_was(tmp_path, file_limit):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    with file_limit(5), pytest.raises(UserError, match="cannot be written: File too large"):
        JsonLines(path, 2)
    assert steps(path) == [0, 1] and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("hand", ["deletes", "moves", "deletes and makes anew"])
def test_a_folder_taken_away_in_mid_run_stops_it_at_once(tmp_path, hand):
    folder = tmp_path / "run"
    folder.mkdir()
    file = JsonLines(folder / "metrics.jsonl", 0)
    file.write({"step": 0})
    if hand == "moves":
        folder.rename(tmp_path / "other")
    else:
        shutil.rmtree(folder)
    if hand == "deletes and makes anew":
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("another run's")
    with pytest.raises(UserError, match="moved or deleted while the run wrote to it"):
        file.write({"step": 1})


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, file_limit):
    path = tmp_path / "summary.json"
    replace_text(path, "old")
    with file_limit(100), pytest.raises(UserError, match="File too large; what it held before is still there"):
        replace_text(path, "new" * 100)
    assert path.read_text() == "old"
    replace_text(path, "μ")
    assert path.read_bytes() == "μ".encode() and [p.name for p in tmp_path.iterdir()] == ["summary.json"]

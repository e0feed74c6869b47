"""bench/probe.py: it writes what it measured, and times nothing whose check is red."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def probe(monkeypatch):
    path = Path(__file__).parent.parent / "bench" / "probe.py"
    spec = importlib.util.spec_from_file_location("bench_probe", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "bench_probe", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(probe, path):
    code = probe.main(["--elements", "20000", "--tensors", "20", "--rounds", "1", "--output", str(path)])
    result = json.loads(path.read_text())
    return code, result, {row["name"]: row for row in result["rows"]}


def test_results_are_written_with_device_versions_and_commit(probe, tmp_path, capsys):
    code, result, rows = run(probe, tmp_path / "new" / "probe.json")
    assert code == 0
    assert result["device"] and result["versions"]["torch"] and result["commit"]
    assert all(row["green"] and row["best_ms"] > 0 for row in rows.values())
    assert rows["two u, AdamW"]["error"] <= 1e-12
    assert result["bar"]["best_library_way"] in probe.SAME_NUMBERS
    assert "multi_tensor_dot is" in capsys.readouterr().out


def test_a_red_check_blocks_its_timing(probe, tmp_path, monkeypatch, capsys):
    right = probe.ours
    monkeypatch.setattr(probe, "ours", lambda lists: [x * (1 + 1e-9) for x in right(lists)])
    code, result, rows = run(probe, tmp_path / "probe.json")
    assert code == 1
    assert not rows["multi_tensor_dot"]["green"] and rows["multi_tensor_dot"]["best_ms"] is None
    assert rows["torch._foreach"]["best_ms"] > 0 and result["bar"] == {}
    assert "RED, over 1e-12: not timed" in capsys.readouterr().out


def test_bad_arguments_are_refused(probe, capsys):
    with pytest.raises(SystemExit):
        probe.main(["--elements", "3", "--tensors", "4"])
    assert "--elements must be at least --tensors" in capsys.readouterr().err

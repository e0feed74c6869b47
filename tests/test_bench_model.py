"""bench step and bench rollout on a model of a folder."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not part of the package

from bench import rollout, step


def test_a_step_on_a_folder_s_model_is_checked_and_timed(checkpoint_folder, tmp_path, capsys):
    flags = ["--model", str(checkpoint_folder), "--rounds", "1", "--rollouts", "8", "--out", str(tmp_path)]
    assert step.main(flags) == 0
    result = json.loads((tmp_path / f"step_cpu_{checkpoint_folder.name}.json").read_text())
    rows = {r["name"]: r for r in result["rows"]}
    assert result["shape"] == checkpoint_folder.name and result["rollouts"] == 8 and "by_flat_share" not in result
    for name in ("amft-fast", step.EVERY, "transformers, eager loss, 8 rows"):
        assert rows[name]["ms"] > 0 and rows[name]["gradient_distance"] < 1e-4 and not rows[name]["note"]
    assert "amft-fast, compiled layers" not in rows and any(name.startswith("TRL") for name in rows)
    assert "transformers: ours is" in capsys.readouterr().out


def test_rollouts_of_a_folder_s_model_are_checked_and_timed(checkpoint_folder, tmp_path):
    ways = f"{rollout.ENGINE},{rollout.GENERATE}"
    flags = ["--device", "cpu", "--model", str(checkpoint_folder), "--rounds", "1", "--no-overhead", "--ways", ways]
    assert rollout.main([*flags, "--loads", "even", "--out", str(tmp_path / "r.json")]) == 0
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["model"] == checkpoint_folder.name and result["requests"] == 48 and result["tokens"] == 1200
    assert set(result["ways"]) == set(ways.split(","))


@pytest.mark.parametrize("bench", [step, rollout])
def test_what_is_no_folder_of_a_model_is_refused(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--model", str(tmp_path)])
    assert "--model takes a transformers folder" in capsys.readouterr().err

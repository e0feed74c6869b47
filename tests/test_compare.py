"""The study: method specifications, statistics, and a small one end to end on the demo's own task and model."""

import json
import math
from pathlib import Path

import pytest
from markupsafe import Markup

from amft_fast import cli
from amft_fast.errors import UserError
from amft_fast.study import compare, stats
from amft_fast.study.tables import Table, page

ROOT = Path(__file__).parent.parent


def test_method_specifications():
    assert compare.parse_method("rl").flags == ("--train.method", "rl")
    assert compare.parse_method("fixed:0.2").flags == ("--train.method", "fixed", "--controller.mu_init", "0.2")
    method = compare.parse_method("amft:0.9+controller.signal=cosine+train.lr=1e-4")
    assert method.flags[4:] == ("--controller.signal", "cosine", "--train.lr", "1e-4")
    for text, said in (("ppo", "unknown method 'ppo'"), ("amft+lr", "section.field=value")):
        with pytest.raises(UserError, match=said):
            compare.parse_method(text)


def test_interval_of_the_mean_is_students():
    mean, half = stats.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(4) = 2.776, s = sqrt(2.5)
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert stats.interval([0.5])[0] == 0.5 and math.isnan(stats.interval([0.5])[1])


def test_area_under_the_curve():
    assert stats.area_under_curve([(0, 0.0), (10, 1.0)], 10) == pytest.approx(0.5)
    assert stats.area_under_curve([(0, 0.2), (5, 0.4)], 10) == pytest.approx((5 * 0.3 + 5 * 0.4) / 10)
    assert stats.area_under_curve([(5, 1.0), (0, 0.0), (12, 1.0)], 10) == pytest.approx(0.75)


def test_a_page_shows_its_tables_and_escapes_what_they_hold():
    table = Table("Results", ("method", "test"), [("a <b>", "1 & 2"), ("c", "3")])
    assert table.markdown() == "| method | test |\n| --- | --- |\n| a <b> | 1 & 2 |\n| c | 3 |"
    plain = page("benchmarks", "configs/<x>", "One sentence.", [table, table], ["A note."])
    assert plain.count("<h2>Results</h2>") == 2 and '<th scope="row">a &lt;b&gt;</th><td>1 &amp; 2</td>' in plain
    assert "configs/&lt;x&gt;" in plain and "A note." in plain and "Curves" not in plain
    assert "<svg></svg>" in page("comparison", "x", "", [table], [], Markup("<svg></svg>"))


def test_mistakes_come_before_the_first_run(tmp_path, capsys):
    demo = str(ROOT / "configs" / "demo.toml")
    for args in (["--methods", "rl,nonsense"], ["--methods", "fixed:1.5"], ["--methods", "rl", "--seeds", "0"]):
        assert cli.main(["compare", demo, *args, "--out", str(tmp_path / "out")]) == 2
        assert "amft-fast:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_small_study_runs_at_equal_tokens_and_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "study"
    args = [
        "compare", str(ROOT / "configs" / "demo.toml"), "--methods", "sft,rl,amft", "--seeds", "1", "--out", str(out),
        "--train.steps", "4", "--train.prompts_per_step", "8", "--train.demos_per_step", "8", "--eval.every", "2",
        "--eval.max_prompts", "4", "--eval.num_samples", "2", "--meta.prompts", "8", "--controller.window", "2",
        "--log.to", "[]", "--checkpoint.export", "false",
    ]  # fmt: skip
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "| rl | 1 |" in printed and "| amft | 1 |" in printed
    data = json.loads((out / "compare.json").read_text())
    steps = {m: r[0]["summary"]["steps"] for m, r in data["runs"].items()}
    tokens = {m: r[0]["summary"]["tokens"] for m, r in data["runs"].items()}
    assert steps["sft"] > 2 * steps["rl"] >= steps["amft"] > 0
    assert all(data["budget"] <= t < 1.8 * data["budget"] for t in tokens.values()), tokens
    for name in ("compare.md", "compare.html", "compare.png"):
        assert (out / name).stat().st_size > 500
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/seed-0/summary.json")}
    assert cli.main(args) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/seed-0/summary.json")} == before

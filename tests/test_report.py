"""report.html and report.png on made-up run folders: whole, unfinished, damaged, hostile."""

import json
import re

import pytest
from operations import lines_run
from pages import Page, lines, result, rl_step

from amft_fast.cli import main
from amft_fast.errors import UserError
from amft_fast.report import charts
from amft_fast.report import page as report
from amft_fast.report import reader as records
from amft_fast.report.controller import controller_section
from amft_fast.report.plots import budget, in_bars, phase_seconds, smooth


def page(run, picture=False) -> Page:
    """The page of a run, checked for what holds of every page. The picture takes half a second, so few tests have it."""
    if picture:
        assert report.write_report(run) == run / "report.html"
        assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
        text = (run / "report.html").read_text(encoding="utf-8")
    else:
        text = report.render(records.read(run))
    assert not list(run.glob("*.part"))
    parsed = Page(text)
    assert not parsed.urls and not parsed.handlers and "script" not in parsed.tags and "img" not in parsed.tags
    assert not re.search(r"url\(|@import|nan|\binf\b", text, re.IGNORECASE)
    assert len(parsed.ids) == len(set(parsed.ids))
    return parsed


def files_without(*names: str) -> dict:
    return dict.fromkeys(names)


def test_finished_run(run_folder):
    parsed = page(run_folder(), picture=True)
    assert (
        "SFT + RL with a fixed μ, on General Points: 4 steps (1 of them warm-up) in 12.0 s on A CPU, 2 threads"
        in parsed.words
    )
    assert "20.0% → 40.0%" in parsed.words and "+20.0 ± 2.8 points" in parsed.words  # 1.96 · √2 · 1 point
    assert "20.0% ± 2.0" in parsed.words and "pass@8" in parsed.words
    assert "✓ correct · reward 1" in parsed.words and "✗ wrong · reward 0" in parsed.words
    assert "not finished" not in parsed.words
    assert "mu_init = 0.5" in parsed.words  # the resolved config
    for title in ("Mixing weight μ", "Entropy of the policy", "Imitation loss", "Gradient norm", "Seconds per step"):
        assert title in parsed.words
    assert "clip fraction 0.0%" in parsed.words  # constant: told in words
    assert "Clip fraction" not in parsed.words


def test_every_chart_has_a_title_and_words(run_folder):
    run = run_folder()
    page(run)
    text = report.render(records.read(run))
    drawn = text.count('<svg class="chart"')
    assert drawn >= 10
    assert drawn == text.count('role="img"') == len(re.findall(r'<title id="chart\d+t">[^<]', text))
    assert drawn == len(re.findall(r'<desc id="chart\d+d">[^<]', text))
    assert "val: from 10.0% at step 0 to 30.0% at step 4, between 10.0% and 30.0%" in text


def test_page_is_the_same_each_time_and_leaves_the_run_alone(run_folder):
    run = run_folder()
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    page(run, picture=True)
    first, again = (run / "report.html").read_text(), report.render(records.read(run))
    assert re.sub(r"chart\d+", "", first) == re.sub(r"chart\d+", "", again)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_unfinished_run_ends_at_its_newest_evaluation(run_folder):
    evals = [
        {"at": 0, "full": True, "val": result(0.1), "test": result(0.2)},
        {"at": 2, "full": False, "val": result(0.2, 10, 4)},
    ]
    config = {"train": {"method": "rl", "steps": 9}}
    parsed = page(run_folder(config=config, **{"summary.json": None, "evals.jsonl": lines(evals)}))
    assert "This run is not finished: 4 of 9 steps are done" in parsed.words
    assert "“end” is the evaluation at step 2. It is a scheduled one" in parsed.words
    assert "10.0% → 20.0%" in parsed.words
    assert "+20.0" not in parsed.words  # pass@4 against pass@8 has no change


def test_summary_of_an_earlier_shorter_run_is_not_taken_for_this_ones(run_folder):
    parsed = page(run_folder(config={"train": {"method": "rl", "steps": 9}}))
    assert "This run is not finished: 4 of 9" in parsed.words


@pytest.mark.parametrize("evals", ["", None, "not json\n"])
def test_nothing_measured_yet(run_folder, evals):
    run = run_folder(**{"metrics.jsonl": "", "evals.jsonl": evals, "samples.jsonl": None, "summary.json": None})
    parsed = page(run, picture=evals is None)
    assert "No step of this run is on record yet." in parsed.words
    assert "svg" not in parsed.tags


def test_what_hardly_changes_is_told_in_words(run_folder):
    rows = [rl_step(i) | {"mismatch_ess": 1 - 1e-7 * i, "turns": 1.0} for i in range(5)]
    words = page(run_folder(**{"metrics.jsonl": lines(rows)})).words
    assert "effective share of samples 100.0%" in words and "turns per problem 1." in words
    assert "Mismatch, effective samples" not in words and "Turns" not in words


def test_single_step(run_folder):
    parsed = page(run_folder(steps=1, warmup=0), picture=True)
    assert "1 step in" in parsed.words and "Imitation loss" in parsed.words


def test_imitation_alone_has_no_rollout_charts(run_folder):
    keep = ("step", "phase", "mu", "lr", "loss", "sft_loss", "grad_norm", "tokens", "seconds", "time/update")
    rows = [{k: v for k, v in rl_step(i).items() if k in keep} | {"mu": 1.0} for i in range(5)]
    parsed = page(run_folder(**{"metrics.jsonl": lines(rows), "samples.jsonl": ""}))
    assert "Imitation loss" in parsed.words
    for title in ("Entropy", "Reward", "Policy loss", "Response length", "Completions"):
        assert title not in parsed.words


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></article></main><h1>owned</h1>",
    "{{ 7 * 7 }} {% raw %} &amp; &#60;",
    "bell \x07 escape \x1b[31m nul \x00 half \ud800 arrow → 算式",
    "</style></title></svg><!-- ",
]


def test_completions_are_shown_as_they_are_and_do_nothing(run_folder):
    rows = [
        {"step": 1, "prompt": text, "completion": text, "reward": None, "success": bool(i % 2)}
        for i, text in enumerate(HOSTILE)
    ]
    later = [row | {"step": 2} for row in rows[::-1]]
    parsed = page(run_folder(**{"samples.jsonl": lines(rows + later)}))
    for text in HOSTILE[:4] + HOSTILE[5:]:
        assert text.strip() in parsed.words
    assert "bell \ufffd escape \ufffd[31m nul \ufffd half \ufffd arrow → 算式" in parsed.words
    assert parsed.tags.count("h1") == 1 and "49" not in [w for w in parsed.words.split() if w == "49"]


def test_everything_else_from_files_is_escaped_too(run_folder):
    bad = "<b onclick=x>& $\\x$"
    evals = [{"at": 0, "full": True, bad: result(0.1)}, {"at": 4, "full": True, bad: result(0.2)}]
    rows = [rl_step(i) | {f"time/{bad}": 0.1, f"controller/{bad}": float(i)} for i in range(4)]
    run = run_folder(
        **{
            "evals.jsonl": lines(evals),
            "metrics.jsonl": lines(rows),
            "environment.json": json.dumps({bad: bad, "device": bad}),
            "summary.json": json.dumps(
                {"steps": 4, "method": bad, "task": bad, "start": {bad: result(0.1)}, "end": {bad: result(0.2)}}
            ),
            "config.toml": f"# {bad}\n[train]\nmethod = '''{bad}'''\nsteps = 4\n",
        }
    )
    parsed = page(run, picture=True)
    assert parsed.words.count(bad) >= 6


def test_long_completions_are_cut_with_a_word_on_it(run_folder):
    row = {"step": 1, "prompt": "p" * 5000, "completion": "c" * 5000, "reward": 1, "success": True}
    parsed = page(run_folder(**{"samples.jsonl": lines([row])}))
    assert "c" * report.COMPLETION_CHARS + " … [3500 characters left out]" in parsed.words
    assert "[4400 characters left out] … " + "p" * report.PROMPT_CHARS in parsed.words


def test_nulls_and_wrong_types_leave_gaps(run_folder):
    odd = [None, "high", [1], True, {"a": 1}, 10**400]
    rows = [rl_step(i) for i in range(30)]
    for i, row in enumerate(rows):
        for name in ("loss", "entropy", "mu", "grad_norm", "time/rollout", "seconds", "tokens"):
            if i % 3 == 0:
                row[name] = odd[(i // 3) % len(odd)]
    rows += [rl_step(30) | {"loss": None, "skipped_total": 2}]
    evals = [{"at": 0, "full": True, "val": {"sampled": None, "greedy": "x", "k": 8}}, {"at": 30, "val": result(0.3)}]
    run = run_folder(
        **{
            "metrics.jsonl": lines(rows) + '{"step": 31, "loss": NaN, "entropy": Infinity}\n',
            "evals.jsonl": lines(evals),
        }
    )
    parsed = page(run, picture=True)
    assert "2 update(s) were skipped because the loss or the gradient was not finite" in parsed.words
    assert None in records.read(run).series("entropy")[1]


def test_damaged_lines_are_left_out_and_counted(run_folder):
    good = lines([rl_step(i) for i in (3, 1, 2, 0)])
    bad = (
        'no json\n{"step": "1"}\n[1, 2]\n{"loss": 1}\n{"step": -4}\n{"step": true}\n'
        + "[" * 5000
        + '\n{"step": 4, "los'
    )
    run = run_folder(
        **{"metrics.jsonl": good + bad, "config.toml": "= = =", "environment.json": "[]", "summary.json": "{"}
    )
    parsed = page(run)
    assert "metrics.jsonl: 8 damaged lines were left out" in parsed.words
    for name in ("config.toml", "environment.json", "summary.json"):
        assert f"{name}: 1 damaged line was left out" in parsed.words
    assert [m["step"] for m in records.read(run).metrics] == [0, 1, 2, 3]


def test_binary_files_do_not_break_it(run_folder):
    run = run_folder()
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "summary.json", "config.toml", "environment.json"):
        (run / name).write_bytes(bytes(range(256)) * 4)
    assert "damaged line" in page(run).words


def test_only_metrics_are_needed(run_folder):
    names = ("config.toml", "environment.json", "evals.jsonl", "samples.jsonl", "summary.json")
    parsed = page(run_folder(**files_without(*names)))
    assert "unknown method" in parsed.words and "left no config.toml" in parsed.words


def test_no_such_run(tmp_path, capsys):
    with pytest.raises(UserError, match="no run folder"):
        report.write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        report.write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_prints_the_path(run_folder, capsys):
    run = run_folder()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_looks_at_held_out_prompts_have_charts(run_folder):
    rows = [rl_step(i) for i in range(40)]
    for i, (alive, right, reward) in zip((0, 3, 9), ((0.0, 0.0, 0.0), (0.1, 0.02, 0.02), (0.3, 0.05, 0.05))):
        rows[i] |= {
            "controller/alive": alive,
            "controller/right": right,
            "controller/reward": reward,
            "time/utility": 0.05,
        }
        rows[i] |= {"controller/tokens": 500} | ({"controller/rise_t": 1.0 * i} if i else {})
    run = run_folder(
        config={"train": {"method": "amft", "steps": 40}}, **{"metrics.jsonl": lines(rows), "summary.json": None}
    )
    words = page(run).words
    for text in (
        "Why μ moved",
        "Held-out reward",
        "Rise of the held-out reward",
        "confidence 2",
        "The looks at held-out prompts took",
    ):
        assert text in words
    assert "Change of logit(μ)" not in words and "mu_min 0.02" not in words


def test_controller_section_comes_with_its_fields(run_folder):
    rows = [rl_step(i) for i in range(40)]
    names = ("signal", "stderr", "snr", "gate", "cos_sft", "cos_rl", "ess", "success", "useful_groups", "something_new")
    for i in range(9, 40, 10):
        rows[i] |= {f"controller/{name}": 0.01 * i for name in names}
        rows[i] |= {
            "controller/mu_meta": -0.02,
            "controller/mu_entropy": 0.01,
            "controller/tokens": 500,
            "time/utility": 0.05,
        }
    config = {"train": {"method": "amft", "steps": 40}, "controller": {"signal": "balanced"}}
    run = run_folder(config=config, **{"metrics.jsonl": lines(rows), "summary.json": None})
    words = page(run).words
    assert "Why μ moved" in words and "took 0.5% of the recorded time and 5.0% of the tokens" in words
    titles = (
        "Change of logit(μ) since the start",
        "Signal to noise",
        "Gate",
        "Alignment with the utility",
        "Cache, groups",
    )
    for title in (*titles, "something_new", "mu_min 0.02"):
        assert title in words
    assert "by the meta-gradient −0.08" in words and "by the entropy term 0.04" in words  # running sums of four moves
    assert controller_section(records.Record(run, metrics=[rl_step(0)])) is None


def test_run_with_a_token_budget(run_folder):
    config = "[train]\nmethod = 'rl'\nsteps = 9\ntoken_budget = 4000\n"
    record = records.read(run_folder(**{"config.toml": config}))
    assert record.finished and record.planned is None
    record.config["train"]["token_budget"] = 5000
    assert not record.finished and "4 steps are done" in report.warnings(record)[0]


def test_1000_steps_take_some_2000_lines_of_code_each(run_folder):
    """A page takes a second or two then. What compares each step with each other one would run a million lines more."""
    rows = [rl_step(i) | {"loss": (i * 7919 % 1000) / 100} for i in range(1000)]
    run = run_folder(steps=1000, **{"metrics.jsonl": lines(rows)})
    assert lines_run(lambda: page(run, picture=True)) < 3000 * len(rows)
    assert (run / "report.html").stat().st_size < 1 << 20


def test_time_of_a_step_is_shared_out(run_folder):
    rows = [rl_step(i) | ({"time/eval": 5.0} if i == 2 else {}) for i in range(4)]
    record = records.read(run_folder(**{"metrics.jsonl": lines(rows)}))
    phases = phase_seconds(record)
    assert list(phases) == ["rollout", "update", "eval", "rest"]
    assert phases["eval"] == [0, 0, 5.0, 0]  # beside the step's own second, so it takes nothing from the rest
    assert phases["rest"] == pytest.approx([0.1] * 4)


def test_bars_of_time_hold_whole_intervals_between_evaluations(run_folder):
    record = records.read(run_folder(steps=501, warmup=0))
    edges, bars, size = in_bars(record, phase_seconds(record))
    assert size == 20 and edges[:2] == [0, 20] and edges[-2:] == [500, 501]
    assert bars["rollout"] == pytest.approx([0.6] * 26)


def test_where_the_tokens_went(run_folder):
    """A look, two steps that imitate, one that explores, one that does both."""
    rows = [
        {"step": i, "mu": mu, "tokens_sampled": sampled, "tokens_trained": trained, "tokens": sampled + trained + own}
        for i, (mu, sampled, trained, own) in enumerate(
            [(1, 0, 90, 30), (1.0, 0, 110, 0), (0, 40, 60, 50), (0.3, 20, 100, 0)]
        )
    ]
    run = run_folder(**{"metrics.jsonl": lines(rows)})
    spent = budget(records.read(run))
    assert spent == {
        "imitating": [90, 110, 0, 0],
        "exploring": [0, 0, 100, 0],
        "both": [0, 0, 0, 120],
        "controller": [30, 0, 50, 0],
    }
    assert "of all 500: imitating 40.0%, exploring 20.0%, both 24.0%, controller 16.0%" in page(run).words


def test_colours_can_be_told_from_the_page():
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colours, card in ((charts.LIGHT, "#ffffff"), (charts.DARK, "#1a1e22")):
        for colour in colours:
            low, high = sorted((luminance(colour), luminance(card)))
            assert (high + 0.05) / (low + 0.05) >= 4, (colour, card)  # WCAG asks 3 of graphics


def test_numbers():
    cases = {
        0: "0",
        1: "1",
        0.5: "0.5",
        1234.5: "1234",
        12345: "12.3k",
        4.5e6: "4.5M",
        2.14e-7: "2.1e-7",
        -0.25: "−0.25",
    }
    assert {v: charts.number(v) for v in cases} == cases
    assert charts.number(None) == charts.number(float("nan")) == "–"
    assert charts.number(0.1234, percent=True) == "12.3%"


@pytest.mark.parametrize("low, high", [(0, 1), (0.1, 0.11), (-3, 17), (1e-9, 5e-9), (0, 123456), (-1e6, -1e5)])
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    ticks = charts.ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * (high - low) and ticks[-1] >= high - 1e-6 * (high - low)
    labels = charts.Scale([low, high], (0, 100)).labels(False)
    assert len(set(labels)) == len(labels)


def test_thinning_keeps_spikes_and_gaps():
    ys: list = [0.0] * 5000
    ys[1234], ys[3456] = 9.0, -9.0
    xs, kept = charts.thin(range(5000), ys)
    assert len(xs) <= charts.MOST_POINTS + 2 and max(kept) == 9.0 and min(kept) == -9.0 and xs == sorted(xs)
    assert None in charts.thin(range(5000), [None if 1000 <= i < 2000 else 1.0 for i in range(5000)])[1]


def test_smoothing_leaves_out_what_is_missing():
    assert smooth([1.0, None, 3.0, None, None, None, 5.0], 1) == [1.0, 2.0, 3.0, 3.0, None, 5.0, 5.0]

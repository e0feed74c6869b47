"""A planned study with runs that are made up: its sweep, its seeds, its plan, its tables; and the regret over regimes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from amft_fast import cli, config_file
from amft_fast.errors import UserError
from amft_fast.study import jobs, regret, stages, stats, sweep
from amft_fast.study.jobs import Clock, Job, overridden, parse_method

DEMO = str(Path(__file__).parent.parent / "configs" / "demo.toml")
# Sampled success by method, and what a learning rate and a seed add to it.
SKILL = {"rl": 0.34, "fixed": 0.33, "linear": 0.30, "sft": 0.18}
RATES = {1e-4: -0.02, 2e-4: 0.0, 4e-4: -0.01}
SEEDS = (0.0, 0.01, -0.01, 0.005, 0.0)


class MadeUp:
    """A process of a run that has ended: it leaves the files that a study reads."""

    started: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()  # folders whose runs fail
    returncode = 0

    def __init__(self, command, **_):
        flags = command[command.index("train") + 2 :]
        cfg = config_file.load(command[command.index("train") + 1], [f for f in flags if f != "--resume"])
        folder, method, seed = Path(cfg.run.dir), cfg.train.method, cfg.run.seed
        self.started.append("/".join(folder.parts[-3:]))
        if any(part in self.broken for part in folder.parts):
            self.returncode = 1
            return
        (folder / "config.toml").write_text(config_file.to_toml(cfg))
        # A spread by method of its own, so that no interval has width 0.
        share = SKILL[method] + RATES[cfg.train.lr] + SEEDS[seed] + 0.002 * ((seed * seed + len(method) * seed) % 4)
        figures = {"sampled": share, "greedy": share + 0.05, "pass_at_k": 0.6, "k": 8}
        splits = cfg.eval.splits or ["train", "val", "test", "ood"]
        tokens = cfg.train.token_budget or 5000
        summary = {"seed": seed, "tokens": tokens, "wall_s": tokens / 100, "mu_first": 0.5, "mu_last": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary | {"end": dict.fromkeys(splits, figures)}))
        evals = [{"tokens": t, "full": False, "val": figures} for t in (0, tokens)]
        (folder / "evals.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
        step = {"tokens": tokens, "phase": "train", "mu": 0.5, "entropy": 0.2, "seconds": 1.0}
        (folder / "metrics.jsonl").write_text((json.dumps(step) + "\n") * 2)

    def poll(self):
        return self.returncode

    def terminate(self): ...
    def wait(self): ...


@pytest.fixture
def made_up(monkeypatch):
    """Runs of studies are made up; the list of those started, as folders."""
    MadeUp.started, MadeUp.broken = [], set()
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=MadeUp, STDOUT=None, DEVNULL=None))
    return MadeUp.started


def study(out, *more):
    methods = "rl,fixed:0.05,linear,sft"
    return cli.main(
        ["compare", DEMO, "--methods", methods, "--budget", "8000", "--cores", "4", "--out", str(out), *more]
    )


SWEEP = ("--sweep", "train.lr=1e-4,2e-4,4e-4")


def test_a_planned_study_from_its_sweep_to_its_tables(tmp_path, made_up, capsys):
    out = tmp_path / "study"
    args = (*SWEEP, "--seeds", "3", "--final-seeds", "5", "--finalists", "2", "--stop-behind", "1", "--eval.every", "5")
    assert study(out, *args) == 0
    printed = capsys.readouterr().out
    swept = {
        f"sweep/{m}_train.lr_{lr}/seed-0"
        for m in ("rl", "fixed_0.05", "linear", "sft")
        for lr in ("1e-4", "2e-4", "4e-4")
    }
    assert set(made_up[:12]) == swept
    runs = {name.partition("/")[2] for name in made_up[12:]}
    two = {f"{m}/seed-{s}" for m in ("rl", "fixed_0.05", "linear", "sft") for s in (0, 1)}
    assert runs == two | {f"{m}/seed-{s}" for m in ("rl", "fixed_0.05") for s in (2, 3, 4)}
    assert len(made_up) == 12 + 14
    assert "12 runs, 0 done" in printed and "left" in printed.split("sweep: rl takes train.lr 2e-4")[0]

    data = json.loads((out / "compare.json").read_text())
    assert data["sweep"]["chosen"] == dict.fromkeys(("rl", "fixed:0.05", "linear", "sft"), "2e-4")
    assert (
        data["baseline"] == "rl" and set(data["stopped"]) == {"linear", "sft"} and data["stopped"]["sft"]["seeds"] == 2
    )
    assert data["differences"]["fixed:0.05"]["test"]["sampled"]["seeds"] == 5
    text = (out / "compare.md").read_text()
    assert "| method | seeds | train.lr | test greedy |" in text and "| rl | 5 | 2e-4 | " in text
    assert (
        "Difference to rl in points, paired by seed" in text and "| 32.0 (37.0) | 34.0 (39.0) * | 33.0 (38.0) |" in text
    )
    assert "sft was stopped after 2 seeds: −1" in text and "sft was stopped" in (out / "compare.html").read_text()
    assert (out / "compare.png").stat().st_size > 500 and not list(out.glob(".*"))

    # The sweep is judged on val alone, in runs of half the tokens, and what the user asked of evaluations is not joined to it.
    kept = config_file.load(out / "sweep" / "rl_train.lr_1e-4" / "seed-0" / "config.toml")
    assert (
        kept.eval.splits == ["val"]
        and kept.eval.every == 1000
        and kept.train.token_budget == 4000
        and kept.train.lr == 1e-4
    )
    kept = config_file.load(out / "rl" / "seed-4" / "config.toml")
    assert kept.eval.every == 5 and kept.train.token_budget == 8000 and kept.train.lr == 2e-4

    made_up.clear()
    assert study(out, *args) == 0 and made_up == []
    assert "0 left, 4 at a time: nothing to do" in capsys.readouterr().out


def test_the_plan_alone_runs_nothing(tmp_path, made_up, capsys):
    out = tmp_path / "study"
    assert study(out, "--plan", *SWEEP, "--final-seeds", "5") == 0
    printed = capsys.readouterr().out
    assert "4 methods, 8,000 tokens a run" in printed and "the first to end tells how long" in printed
    assert "3 seeds each: 12 runs, 0 done" in printed and "at most 8 runs" in printed and "32 left" in printed
    assert made_up == [] and not out.exists()


def test_another_sweep_or_budget_does_not_take_the_runs_of_the_first(tmp_path, made_up, capsys):
    out = tmp_path / "study"
    assert study(out, "--sweep", "train.lr=1e-4,4e-4", "--seeds", "1") == 0
    made_up.clear()
    assert study(out, *SWEEP, "--seeds", "1") == 2
    said = capsys.readouterr().err
    assert "holds a run with train.lr 0.0004, and the sweep chooses 2e-4 for rl" in said and "another --out" in said
    assert study(out, "--budget", "20000", "--seeds", "1") == 2
    assert "holds a run of 8,000 tokens, and those of this study have 20,000" in capsys.readouterr().err


def test_runs_that_fail_are_left_out_and_tried_again(tmp_path, made_up, capsys):
    out = tmp_path / "study"
    MadeUp.broken = {"rl_train.lr_2e-4", "sft"}
    assert study(out, *SWEEP, "--seeds", "2") == 1
    text = (out / "compare.md").read_text()
    assert "| rl | 33.0" not in text and "| rl | 32.0 (37.0) | failed | 33.0 (38.0) * |" in text
    assert "sft/seed-1" not in {name.partition("/")[2] for name in made_up}
    assert "sft seed 0: failed, see" in capsys.readouterr().out
    MadeUp.broken = {"rl_train.lr_2e-4"}
    made_up.clear()
    assert study(out, *SWEEP, "--seeds", "2") == 1
    assert {name.partition("/")[2] for name in made_up} == {"rl_train.lr_2e-4/seed-0", "sft/seed-0", "sft/seed-1"}


def test_a_method_that_gives_the_setting_itself_is_not_swept(tmp_path, made_up):
    out = tmp_path / "study"
    args = [
        "compare",
        DEMO,
        "--methods",
        "rl,sft+train.lr=1e-4",
        "--budget",
        "8000",
        "--seeds",
        "1",
        "--out",
        str(out),
        *SWEEP,
    ]
    assert cli.main(args) == 0
    assert len(made_up) == 3 + 2 and "| sft+train.lr=1e-4 | 1 | its own |" in (out / "compare.md").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--sweep", "train.lr"), "--sweep: give section.field=value,value..."),
        (("--sweep", "train.lr=1e-4"), "--sweep: give section.field=value,value..."),
        (("--sweep", "train.lr=1,1"), "a value of train.lr is given twice"),
        (("--sweep", "train.lrr=1,2"), "unknown setting 'train.lrr'; did you mean train.lr?"),
        (("--sweep", "train.lr=1e-4,x"), "train.lr: "),
        (("--baseline", "amft"), "--baseline: 'amft' is none of --methods, rl, fixed:0.05, linear, sft"),
        (("--final-seeds", "2"), "--final-seeds must be at least --seeds, 3, got 2"),
        (("--sweep-share", "0"), "--sweep-share must be at least 0.001"),
        (("--stop-behind", "-1"), "--stop-behind must be at least 0"),
    ],
)
def test_mistakes_are_sentences_before_the_first_run(tmp_path, made_up, capsys, args, said):
    assert study(tmp_path / "study", *args) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and made_up == []


# ------------------------------------------------------------------------------------------------------------- arithmetic


def test_differences_are_paired_by_seed():
    found = stats.paired({0: 0.5, 1: 0.4, 2: 0.3, 7: 1.0}, {2: 0.2, 1: 0.2, 0: 0.1})
    # differences 0.4, 0.2, 0.1: mean 0.7/3, s² = 0.0233..., t(2) = 4.303
    assert found.seeds == 3 and found.mean == pytest.approx(0.7 / 3)
    assert found.half == pytest.approx(4.303 * math.sqrt(0.07 / 3 / 3), rel=1e-3)
    with pytest.raises(ValueError, match="no seed in common"):
        stats.paired({0: 1.0}, {1: 1.0})


def test_pooled_spread_is_that_of_two_way_layouts():
    # Arm and seed effects alone leave nothing; one cell moved by 3e leaves residuals that sum to (3e)²(a-1)(b-1)/(ab).
    clean = [{0: 0.1 * a, 1: 0.1 * a + 0.05} for a in range(3)]
    assert stats.pooled_half(clean) == pytest.approx(0, abs=1e-12)
    moved = [dict(arm) for arm in clean]
    moved[1][0] += 0.03
    rest = 0.03**2 * 2 * 1 / 6
    assert stats.pooled_half(moved) == pytest.approx(4.303 * math.sqrt(2 * (rest / 2) / 2), rel=1e-3)
    assert math.isnan(stats.pooled_half(clean[:1])) and math.isnan(stats.pooled_half([{0: 1.0}, {0: 0.5}]))


def test_who_goes_on():
    scores = {
        "a": {0: 0.30, 1: 0.31, 2: 0.29, 3: 0.30},
        "b": {0: 0.295, 1: 0.30, 2: 0.29, 3: 0.29},
        "c": {0: 0.20, 1: 0.21, 2: 0.20},
        "d": {0: 0.27, 1: 0.28, 2: 0.27},
        "failed": {0: 0.9},
    }
    arms = list(scores)
    seeds = stages.Seeds(first=3, last=5, finalists=2, stop_behind=1)
    assert stages.standing(arms, scores, 1, seeds).active == arms
    two = stages.standing(arms, scores, 2, seeds)
    assert two.active == ["a", "b"] and set(two.stopped) == {"c", "d"} and two.stopped["c"][1].seeds == 2
    wide = stages.Seeds(first=3, last=5, finalists=2, stop_behind=5)
    assert stages.standing(arms, scores, 2, wide).active == ["a", "b", "d"]
    three = stages.standing(arms, scores, 3, wide)
    assert three.active == ["a", "b"] and three.cut == ["d"] and set(three.stopped) == {"c"}
    spared = stages.Seeds(first=3, last=5, finalists=2, stop_behind=1, baseline="c")
    assert stages.standing(arms, scores, 3, spared).active == ["a", "b", "c"]
    # Later seeds change no earlier decision.
    assert stages.standing(arms, scores, 4, wide).cut == ["d"] and stages.standing(arms, scores, 4, wide).active == [
        "a",
        "b",
    ]
    never = stages.Seeds(first=3, last=3)
    assert stages.standing(arms, scores, 2, never).active == ["a", "b", "c", "d"]


def test_ties_go_to_greedy_then_to_the_first_named(tmp_path):
    swept, method = sweep.Sweep("train.lr", ("1e-4", "2e-4", "4e-4")), parse_method("rl")
    for job, (sampled, greedy) in zip(swept.jobs(method, tmp_path, 1000), [(0.3, 0.3), (0.3, 0.4), (0.3, 0.4)]):
        job.folder.mkdir(parents=True)
        (job.folder / "config.toml").write_text(f"[train]\ntoken_budget = 490\nlr = {job.label.partition('=')[2]}\n")
        (job.folder / "summary.json").write_text(json.dumps({"end": {"val": {"sampled": sampled, "greedy": greedy}}}))
    assert sweep.choose(swept, [method], tmp_path, 1000).value == {"rl": "2e-4"}
    with pytest.raises(UserError, match="holds a run of 490 tokens, and those of this study have 1,000"):
        sweep.choose(swept, [method], tmp_path, 2000)


def test_flags_given_again_are_replaced_and_not_joined():
    flags = ['--eval.splits=["val","test"]', "--train.lr", "1e-4", "--run.overwrite"]
    assert overridden(flags, ["--eval.splits", '["val"]', "--train.lr", "2"]) == [
        "--run.overwrite", "--eval.splits", '["val"]', "--train.lr", "2",
    ]  # fmt: skip


def test_time_left_is_by_the_rate_of_each_method(tmp_path):
    def job(arm, seed, wall=None):
        made = Job(arm, seed, tmp_path / arm / str(seed), 1000, (), arm)
        if wall:
            made.folder.mkdir(parents=True)
            (made.folder / "summary.json").write_text(json.dumps({"wall_s": wall, "tokens": 1000}))
        return made

    assert Clock([job("rl", 0)]).seconds([job("rl", 1)]) is None
    clock = Clock([job("rl", 0, 10.0), job("sft", 0, 30.0)])
    assert clock.seconds([job("rl", 1), job("sft", 1), job("amft", 0)]) == pytest.approx(10 + 30 + 20)


# ----------------------------------------------------------------------------------------------------------------- regret


def regime(folder, scores):
    folder.mkdir()
    runs = {
        label: [{"summary": {"seed": s, "end": {"test": {"sampled": v}}}} for s, v in enumerate(values)]
        for label, values in scores.items()
    }
    (folder / "compare.json").write_text(json.dumps({"config": f"{folder.name}.toml", "runs": runs}))
    return str(folder)


def test_regret_ranks_by_the_worst_regime(tmp_path, capsys):
    dense = regime(
        tmp_path / "dense", {"rl": [0.34, 0.36], "amft": [0.33, 0.35], "sft": [0.18, 0.20], "hpt": [0.30, 0.31]}
    )
    sparse = regime(tmp_path / "sparse", {"rl": [0.0, 0.0], "sft": [0.05, 0.04], "amft": [0.03, 0.04]})
    out = tmp_path / "out"
    assert cli.main(["regret", dense, sparse, "--out", str(out)]) == 0
    data = json.loads((out / "regret.json").read_text())
    assert data["ranked"] == ["amft", "rl", "sft"] and data["unranked"] == ["hpt"]
    assert data["worst"]["sft"]["regime"] == "dense" and data["worst"]["sft"]["mean"] == pytest.approx(-0.16)
    assert data["losses"]["hpt"] == {
        "dense": {"mean": pytest.approx(-0.045), "half": pytest.approx(12.706 * 0.005, rel=1e-3), "seeds": 2}
    }
    assert (out / "regret.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "regret.md").read_text()
    assert "| amft | 1 | −1.0 ± 0.0 (dense) | −1.0 ± 0.0 | −1.0 ± 12.7 |" in text.replace("(sparse)", "(dense)")
    assert "| hpt |  |  | −4.5 ± 6.4 |  |" in text and "| dense | dense.toml | test | rl | 35.0 | 2 |" in text
    assert (
        '<th scope="row">amft</th>' in (out / "regret.html").read_text() and "| amft | 1 |" in capsys.readouterr().out
    )


def test_regret_says_what_is_no_study(tmp_path, capsys):
    good, bad = regime(tmp_path / "good", {"rl": [0.1]}), tmp_path / "bad"
    bad.mkdir()
    for args, said in (
        ((good, str(bad)), "give folders that `amft-fast compare` has written"),
        ((good, good), "named twice"),
    ):
        assert cli.main(["regret", *args, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    for text in ("{", "[]", '{"runs": {}}', '{"config": "x", "runs": {"rl": [{}]}}'):
        (bad / "compare.json").write_text(text)
        with pytest.raises(UserError, match="is no study"):
            regret.read_regimes([bad])
    assert not (tmp_path / "out").exists()

"""Whole runs of a few steps: each method, resume, signals, guards, what a run leaves."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import CopyTask
from runs import cfg_for, lines, train, wait_until, without_times

from amft_fast import config_file
from amft_fast.data.stream import Stream, sample_seed
from amft_fast.errors import UserError
from amft_fast.methods import METHODS
from amft_fast.run import checkpoint


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if not row.mixture])
def test_each_method_runs_and_leaves_what_it_should(tmp_path, checkpoint_folder, method):
    cfg = cfg_for(
        tmp_path, checkpoint_folder, "--train.method", method, "--checkpoint.export", "true", "--train.sft_share", "0.5",
        "--controller.signal", "balanced", "--controller.window", "2", "--meta.prompts", "2",
        "--mixture.chord_steps", "3", "--mixture.gac_every", "2",
    )  # fmt: skip
    assert train(cfg) == 0
    records = lines(tmp_path)
    assert [r["step"] for r in records] == list(range(6))
    assert [r["phase"] for r in records] == ["warmup"] * 2 + ["train"] * 4
    main = records[2:]
    want = {
        "sft": [1, 1, 1, 1],
        "rl": [0, 0, 0, 0],
        "sft_then_rl": [1, 1, 0, 0],
        "fixed": [0.5] * 4,
        "linear": [0.9, 0.9 - 0.8 / 3, 0.9 - 1.6 / 3, 0.1],
        "cosine": [0.9, 0.7, 0.3, 0.1],
        "chord_mu": [0.9, 0.05 + 0.85 * 0.75, 0.05 + 0.85 * 0.25, 0.05],
    }.get(method)
    if want is None:  # learned: it starts where it is told and moves from the second window on
        want = [r["mu"] for r in main]
        assert want[:2] == ([0.5, 0.5] if method != "gac" else [0.5, want[2]]) and 0.02 <= want[-1] <= 0.95
    assert [r["mu"] for r in main] == pytest.approx(want)
    for r in main:
        assert ("sft_loss" in r) == (r["mu"] > 0) and ("success" in r) == (r["mu"] < 1)
        # H* costs rollouts: only a controller that holds the entropy up to it asks for them.
        assert (r["entropy_target"] or 0) > 0 if method in ("amft", "amft_no_meta") else r["entropy_target"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    for when in ("start", "end"):
        assert set(summary[when]) == {"train", "val", "test", "ood"}
        assert all(0 <= row[k] <= 1 for row in summary[when].values() for k in ("greedy", "sampled", "pass_at_k"))
    assert summary["mu_first"] == pytest.approx(want[0]) and summary["mu_last"] == pytest.approx(want[-1])
    assert summary["method"] == method and summary["steps"] == 6 and summary["wall_s"] > 0
    assert (tmp_path / "report.html").read_text().count("<") > 20
    assert config_file.load(tmp_path / "config.toml") == cfg
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tensors, _ = checkpoint.load(tmp_path / "checkpoints" / "step-000006")
    for name, p in exported.named_parameters():
        assert torch.equal(p, tensors[f"param.{name}"]), name


def test_imitation_ends_when_it_has_had_its_effect(tmp_path, checkpoint_folder):
    """No loss is under a hundredth of the first: two looks, and RL begins. A resumed run knows it."""
    flags = (
        "--train.method", "sft_then_rl", "--train.sft_stop", "saturation", "--train.sft_share", "0.9",
        "--train.sft_check_every", "1", "--train.sft_patience", "1", "--train.sft_tolerance", "0.99",
        "--checkpoint.keep_last", "4",
    )  # fmt: skip
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags)) == 0
    whole = lines(tmp_path)
    assert [r["mu"] for r in whole[2:]] == [1, 0, 0, 0]
    assert [r.get("controller/looks_without_gain") for r in whole[2:]] == [0, 1, None, None]
    (tmp_path / "checkpoints" / "step-000006" / "state.json").write_text("damaged")
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags), resume=True) == 0
    assert without_times(lines(tmp_path)) == without_times(whole)
    bare = CopyTask()
    bare.demos = lambda split: CopyTask.demos(bare, split) if split == "train" else []
    with pytest.raises(UserError, match="looks at demonstrations of the split val, and the task has none"):
        train(cfg_for(tmp_path / "bare", checkpoint_folder, *flags), task=bare)


@pytest.mark.parametrize("kind", ["dr_grpo", "rloo", "reinforce++", "gae"])
def test_each_advantage_runs_with_two_minibatches(tmp_path, checkpoint_folder, kind):
    cfg = cfg_for(
        tmp_path, checkpoint_folder, "--advantage.kind", kind, "--train.minibatches_per_rollout", "2",
        "--objective.kl_coef", "0.1", "--objective.tis_cap", "2.0", "--advantage.value_lr", "0.01", "--train.lr", "0.05",
    )  # fmt: skip
    assert train(cfg) == 0
    main = lines(tmp_path)[2:]
    assert all(r["mismatch_max"] < 1e-4 for r in main), "old log-probs must be the sampler's"
    assert any(r["ratio_max"] > 1.001 for r in main), "the second minibatch must be off-policy"
    assert ("value_loss" in main[0]) == (kind == "gae")
    assert any(r["ref_kl"] > 0 for r in main[1:])


def test_published_hyper_parameters_leave_mu_where_it_is_and_say_so(tmp_path, checkpoint_folder, capsys):
    """The controller of configs/published.toml on a task where demonstrations are all that helps."""
    published = config_file.load(Path(__file__).parent.parent / "configs" / "published.toml")
    cfg = cfg_for(
        tmp_path,
        checkpoint_folder,
        "--train.method",
        "amft",
        "--controller.signal",
        "raw",
        "--train.steps",
        "50",
        "--eval.every",
        "0",
    )
    cfg = cfg.model_copy(update={"controller": published.controller, "meta": published.meta})
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"lr": published.train.lr})})
    assert train(cfg) == 0
    mus = [r["mu"] for r in lines(tmp_path)[2:]]
    assert max(abs(m - 0.8) for m in mus) < 0.01
    assert any("controller/signal" in r for r in lines(tmp_path)), "the probe ran"
    assert "will stay where it starts, at 0.8" in capsys.readouterr().out


def test_implicit_rewards_are_logged(tmp_path, checkpoint_folder):
    cfg = cfg_for(tmp_path, checkpoint_folder, "--log.implicit_reward", "true", "--train.method", "fixed")
    assert train(cfg) == 0
    main = lines(tmp_path)[2:]
    assert main[0]["implicit_reward/demos"] == pytest.approx(0, abs=1e-5), "nothing has moved yet"
    assert main[-1]["implicit_reward/demos"] > 0.1 and "implicit_reward/rollouts" in main[-1]


class Useless:
    """Wraps CopyTask: random rewards in training (or everywhere), or demonstrations that answer with another word."""

    def __init__(self, rewards: str, demos: str) -> None:
        self.inner, self.rewards, self.demo_kind = CopyTask(), rewards, demos
        self.splits, self.max_turns = self.inner.splits, 1
        self.lots = itertools.count(1)  # of this task alone: no test's draws depend on which ran before it

    def prompts(self, split):
        return (
            self.inner.prompts({"val": "train"}.get(split, split)) if split != "train" else self.inner.prompts("train")
        )

    def demos(self, split):
        shift = {"a": "b", "b": "c", "c": "d", "d": "a"}
        if self.demo_kind == "right":
            return self.inner.demos("train")
        return [dataclasses.replace(d, response=shift[d.response]) for d in self.inner.demos("train")]

    def start(self, item):
        episode = self.inner.start(item)
        judge = episode.step

        def step(text):
            result = judge(text)
            if self.rewards == "right" or (self.rewards == "random in training" and self.drawing_utility):
                return result
            lot = sample_seed(text, item.id, next(self.lots)) % 2
            return dataclasses.replace(result, reward=float(lot))

        episode.step = step
        return episode

    drawing_utility = False


@pytest.mark.parametrize(
    ("rewards", "demos", "goes"),
    [("random in training", "right", "up"), ("right", "wrong", "down"), ("random", "wrong", "nowhere")],
)
def test_mu_follows_what_helps_on_constructed_problems(tmp_path, checkpoint_folder, monkeypatch, rewards, demos, goes):
    """Demonstrations right and rewards useless; the other way round; both useless."""
    from amft_fast.trainer import Trainer

    task = Useless(rewards, demos)
    draw = Trainer.draw_utility

    def draw_utility(self):
        task.drawing_utility = True
        try:
            return draw(self)
        finally:
            task.drawing_utility = False

    monkeypatch.setattr(Trainer, "draw_utility", draw_utility)
    cfg = cfg_for(
        tmp_path, checkpoint_folder, "--train.method", "amft_no_entropy", "--train.warmup_steps", "0", "--train.steps", "40",
        "--controller.signal", "balanced",
        "--train.lr", "1e-3", "--eval.every", "0", "--meta.prompts", "4", "--meta.num_generations", "32",
        "--meta.refresh_share", "1", "--rollout.num_generations", "8", "--rollout.max_new_tokens", "2",
        "--controller.snr_gate", "0" if goes != "nowhere" else "2",
    )  # fmt: skip
    assert train(cfg, task=task) == 0
    moved = json.loads((tmp_path / "summary.json").read_text())["mu_last"] - 0.5
    assert {"up": moved > 0.15, "down": moved < -0.15, "nowhere": abs(moved) < 0.1}[goes], moved


def test_rl_learns_to_copy(tmp_path, checkpoint_folder):
    cfg = cfg_for(
        tmp_path, checkpoint_folder, "--train.method", "rl", "--train.warmup_steps", "0", "--train.steps", "40",
        "--rollout.num_generations", "8", "--eval.every", "0", "--rollout.max_new_tokens", "2",
    )  # fmt: skip
    assert train(cfg) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["end"]["train"]["sampled"] > summary["start"]["train"]["sampled"] + 0.3


def test_sft_learns_the_demonstrations(tmp_path, checkpoint_folder):
    cfg = cfg_for(tmp_path, checkpoint_folder, "--train.method", "sft", "--train.steps", "30", "--eval.every", "0")
    assert train(cfg) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["end"]["train"]["greedy"] == 1.0
    losses = [r["sft_loss"] for r in lines(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            "--train.method",
            "amft",
            "--controller.signal",
            "balanced",
            "--controller.window",
            "3",
            "--meta.prompts",
            "2",
        ),
        ("--train.method", "amft", "--controller.look_prompts", "2", "--controller.imitation_share", "0.5"),
        ("--advantage.kind", "gae", "--train.minibatches_per_rollout", "2"),
        ("--objective.kl_coef", "0.1"),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, checkpoint_folder, flags):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(cfg_for(whole, checkpoint_folder, *flags)) == 0
    assert train(cfg_for(cut, checkpoint_folder, *flags, "--checkpoint.keep_last", "9")) == 0
    for step in (4, 5, 6):
        for path in (cut / "checkpoints").glob(f"step-{step:06d}"):
            (path / "state.json").write_text("damaged")
    assert train(cfg_for(cut, checkpoint_folder, *flags), resume=True) == 0
    assert without_times(lines(cut)) == without_times(lines(whole))
    assert without_times(lines(cut, "evals.jsonl")) == without_times(lines(whole, "evals.jsonl"))
    a, b = (checkpoint.load(f / "checkpoints" / "step-000006")[0] for f in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batch_size_does_not_change_the_run(tmp_path, checkpoint_folder):
    for name, tokens in (("a", "100000"), ("b", "16")):
        train(cfg_for(tmp_path / name, checkpoint_folder, "--train.micro_batch_tokens", tokens))
    for x, y in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        for key in ("loss", "sft_loss", "entropy", "grad_norm"):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=1e-4), key


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path, checkpoint_folder):
    cfg = cfg_for(tmp_path, checkpoint_folder, "--train.steps", "1")
    train(cfg)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--resume"):
        train(cfg)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert train(cfg_for(tmp_path, checkpoint_folder, "--train.steps", "1", "--run.overwrite")) == 0


def test_resume_without_a_checkpoint_starts_anew(tmp_path, checkpoint_folder, capsys):
    """What a run left that was killed before its first checkpoint goes too: its first evaluation is written once."""
    rows = [{"step": -1, "at": 0, "full": True}, {"step": 0, "at": 1, "full": False}]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(cfg_for(tmp_path, checkpoint_folder), resume=True) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert [row["at"] for row in lines(tmp_path, "evals.jsonl")] == [0, 2, 4, 6]


def test_resume_of_another_method_or_model_is_refused(tmp_path, checkpoint_folder):
    train(cfg_for(tmp_path, checkpoint_folder, "--train.steps", "2"))
    with pytest.raises(UserError, match="method 'fixed'"):
        train(cfg_for(tmp_path, checkpoint_folder, "--train.method", "rl"), resume=True)


def test_updates_that_are_not_finite_are_named_and_stop_the_run(tmp_path, checkpoint_folder, capsys, monkeypatch):
    from amft_fast.engine.local import LocalEngine

    real = LocalEngine.step

    def poisoned(self):
        self.groups[0].grad[0] = float("nan")
        return real(self)

    monkeypatch.setattr(LocalEngine, "step", poisoned)
    with pytest.raises(UserError, match="stopped after 3 updates in a row whose gradient was not finite"):
        train(cfg_for(tmp_path, checkpoint_folder, "--train.max_bad_steps", "3"))
    out = capsys.readouterr().out
    assert "step 0: the gradient was not finite" in out and "(3 in a row)" in out
    path, tensors, _ = checkpoint.latest(tmp_path / "checkpoints")
    assert path.name == "step-000003" and all(
        torch.isfinite(v).all() for k, v in tensors.items() if k.startswith("param")
    )


def test_stream_visits_everything_once_per_pass_and_resumes():
    s = Stream(7, 3, "x")
    order = s.take(21)
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in (0, 7, 14)) and order[:7] != order[7:14]
    other = Stream(7, 3, "x")
    other.position = 5
    assert other.take(9) == order[5:14]
    assert Stream(7, 4, "x").take(21) != order and Stream(7, 3, "y").take(21) != order


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import fakes
from amft_fast import cli
from amft_fast.run import build
build.make_task = lambda cfg: fakes.CopyTask()
sys.exit(cli.main(sys.argv[1:]))
"""


def start(tmp_path, checkpoint_folder, *flags):
    (tmp_path / "c.toml").write_text(config_file.to_toml(cfg_for(tmp_path / "run", checkpoint_folder)))
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", script, "train", str(tmp_path / "c.toml"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_mid_step_saves_and_stops_and_resume_goes_on(tmp_path, checkpoint_folder, number, code):
    flags = ("--train.steps", "60", "--checkpoint.every", "0", "--eval.every", "0")
    process = start(tmp_path, checkpoint_folder, *flags)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 5, process)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == code, out
    assert "saving and stopping" in out and "go on with --resume" in out and "Traceback" not in out
    done = len(lines(tmp_path / "run"))
    assert 5 <= done < 62 and checkpoint.latest(tmp_path / "run" / "checkpoints")[2]["step"] == done
    process = start(tmp_path, checkpoint_folder, *flags, "--resume")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert [r["step"] for r in lines(tmp_path / "run")] == list(range(62))
    whole = cfg_for(tmp_path / "whole", checkpoint_folder, *flags)
    train(whole)
    assert without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))


def test_a_users_mistake_is_one_sentence_without_traceback(tmp_path):
    for args, said in (
        (["train", "nowhere.toml"], "no config file"),
        (["train"], "needs a config file"),
        (["train", "--resume", str(tmp_path / "none")], "no run folder"),
        (["report", str(tmp_path)], "metrics.jsonl"),
    ):
        p = subprocess.run([sys.executable, "-m", "amft_fast", *args], capture_output=True, text=True)
        assert p.returncode == 2 and said in p.stderr and "Traceback" not in p.stderr + p.stdout, p.stderr


@pytest.mark.parametrize(("path", "said"), [("", "model.path is not set"), ("./nothing", "no config.json")])
def test_a_missing_model_is_one_sentence(tmp_path, path, said):
    with pytest.raises(UserError, match=said):
        train(cfg_for(tmp_path, path))

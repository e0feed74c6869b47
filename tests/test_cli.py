"""The command line: mistakes are one sentence and exit code 2; settings stand where one likes."""

import json
import os
import signal

import pytest
from fakes import CopyTask
from runs import cfg_for

from amft_fast import cli, config_file


@pytest.fixture
def started(monkeypatch):
    """Takes the place of training: what was asked for."""
    asked = []

    def train(cfg, resume=False):
        asked.append((cfg, resume))
        return 0

    monkeypatch.setattr("amft_fast.run.launch.train", train)
    return asked


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.toml").write_text(config_file.to_toml(config_file.load(None, ["--train.steps", "7"])))
    return folder


def test_resume_auto_takes_the_config_s_own_folder(started, run_folder):
    assert cli.main(["train", str(run_folder / "config.toml"), "--resume", "auto", "--train.steps", "9"]) == 0
    cfg, resume = started[0]
    assert resume == "auto" and cfg.train.steps == 9


def test_settings_go_with_resume_as_the_readme_has_it(started, run_folder):
    assert cli.main(["train", "--resume", str(run_folder), "--train.steps", "9"]) == 0
    assert cli.main(["train", "--train.steps", "9", "--resume", str(run_folder)]) == 0
    for cfg, resume in started:
        assert resume and cfg.train.steps == 9 and cfg.run.dir == str(run_folder)


def test_settings_go_before_the_config(started, run_folder):
    config = str(run_folder / "config.toml")
    assert cli.main(["train", "--train.lr", "1e-4", "--run.overwrite", config, "--train.sft_lr=2e-4"]) == 0
    cfg, resume = started[0]
    assert not resume and (cfg.train.lr, cfg.train.sft_lr, cfg.train.steps) == (1e-4, 2e-4, 7) and cfg.run.overwrite


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--mu_init", "0.3"], "unknown flag --mu_init; did you mean controller.mu_init?"),
        (["train", "--resume", "configs/demo.toml"], "give a config before it: train configs/demo.toml --resume"),
        (["train", "--resume", "a\0b"], "resume: holds a NUL character"),
        (["train", "--resume", "x" * 5000], "resume: is too long for a path"),
        (["train", "x" * 300], "config: is too long for a path"),
        (["train", "~no_such_user_here/c.toml"], "config: names a home that is not here"),
        (["train", "configs/demo.toml", "--run.dir", "/proc/no/such"], "run.dir '/proc/no/such' cannot be written"),
        (["eval", "configs/demo.toml", "--out", "no/such/folder.json"], "--out: no folder 'no/such'"),
        (["eval", "configs/demo.toml", "--model", "a\0b"], "model: holds a NUL character"),
        (["compare", "configs/demo.toml", "--methods", ""], "--methods: name at least one of amft, "),
        (["compare", "configs/demo.toml", "--methods", ","], "--methods: name at least one of amft, "),
        (["compare", "configs/demo.toml", "--methods", "rl,sft,rl"], "--methods: rl is named twice"),
        (["compare", "configs/demo.toml", "--methods", "fixed:nan"], "controller.mu_init: input should be a finite number"),
        (["compare", "configs/demo.toml", "--methods", "rl", "--budget", "-5"], "--budget must be at least 1, got -5"),
        (["compare", "configs/demo.toml", "--methods", "rl", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["compare", "configs/demo.toml", "--methods", "rl", "--out", "README.md/x"], "compare: README.md/x: Not a directory"),
        (["report", "x" * 5000], "run: is too long for a path"),
        (["report", "~no_such_user_here"], "run: names a home that is not here"),
        (["doctor", "--plan", "configs/demo.toml", "--gpu-memory", "nan"], "--gpu-memory must be at least 0.001, got nan"),
        (["doctor", "--plan", "a\0b"], "plan: holds a NUL character"),
        (["doctor", "--plan", "configs/demo.toml", "--gpus", "1" * 4000], "--gpus must be at most"),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(args, said, capsys):
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("amft-fast: ") and len(error) < 700 and error.count("\n") == 1


class Interrupting(CopyTask):
    """When the first answer of its second split is judged, a signal comes."""

    come = False

    def start(self, item):
        episode = super().start(item)
        judge = episode.step

        def step(text):
            if item.id.startswith("val/") and not self.come:
                self.come = True
                os.kill(os.getpid(), signal.SIGINT)
            return judge(text)

        episode.step = step
        return episode


def test_an_interrupted_evaluation_keeps_what_is_there(tmp_path, checkpoint_folder, monkeypatch, capsys):
    monkeypatch.setattr("amft_fast.run.build.make_task", lambda cfg: Interrupting())
    (tmp_path / "c.toml").write_text(config_file.to_toml(cfg_for(tmp_path / "run", checkpoint_folder)))
    assert cli.main(["eval", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out.json")]) == 130
    said = capsys.readouterr()
    assert "train" in said.out and "test" not in said.out and "stopped; not evaluated: val, test, ood" in said.err
    kept = json.loads((tmp_path / "out.json").read_text())
    assert list(kept["results"]) == ["train"] and kept["missing"] == ["val", "test", "ood"]
    assert kept["results"]["train"]["prompts"] == 4

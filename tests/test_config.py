"""Configuration: files, flags, mistakes."""

import tomllib
from pathlib import Path

import pytest

from amft_fast import config, config_file
from amft_fast.errors import UserError

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(p for p in FOLDER.glob("*.toml") if p.name != "benchmarks.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_parses(path):
    cfg = config_file.load(path)
    assert config.Config.model_validate(tomllib.loads(config_file.to_toml(cfg))) == cfg


def test_there_are_shipped_configs():
    assert "demo.toml" in [p.name for p in CONFIGS]


def test_flags_lie_over_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[train]\nmethod = "sft"\nlr = 1e-3\n[task.general_points]\nnum_cards = 3\n')
    cfg = config_file.load(path, ["--train.lr", "2e-4", "--task.general_points.targets=[1,40]", "--run.overwrite"])
    assert cfg.train.method == "sft" and cfg.train.lr == 2e-4
    assert cfg.task.general_points.num_cards == 3 and cfg.task.general_points.targets == (1, 40)
    assert cfg.run.overwrite


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.metod", "sft"], "did you mean train.method"),
        (["--trian.method", "sft"], "did you mean train.method"),
        (["--mu_init", "0.3"], "did you mean controller.mu_init"),
        (["--train.method", "ppo"], "'ppo'"),
        (["--train.lr"], "train.lr"),
        (["--train.lr", "fast"], "'fast'"),
        (["--objective.clip_low", "-0.1"], "clip_low"),
        (["--objective.clip_high", "0"], "clip_high"),
        (["--rollout.top_p", "0.9"], "top_p"),
        (["--controller.mu_min", "0.9", "--controller.mu_max", "0.1"], "mu_min must be below mu_max"),
        (["--train.method", "amft", "--controller.mu_init", "0.99"], "mu_init must lie in"),
        (["--train.minibatches_per_rollout", "5"], "prompts_per_step must be divisible"),
        (["--rollout.num_generations", "1"], "num_generations must be at least 2"),
        (["--task.general_points.val_share", "0.6", "--task.general_points.test_share", "0.5"], "val_share"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_setting(flags, said):
    with pytest.raises(UserError) as e:
        config_file.load(None, flags)
    assert said in str(e.value) and "\n" not in str(e.value).strip()


def test_unknown_key_in_a_file_names_file_and_neighbour(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[objective]\nclip_hihg = 0.3\n")
    with pytest.raises(
        UserError, match=r"c.toml: unknown setting objective.clip_hihg; did you mean objective.clip_high"
    ):
        config_file.load(path)


def test_broken_toml_names_its_line(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nlr = \n")
    with pytest.raises(UserError, match="line 2"):
        config_file.load(path)
    with pytest.raises(UserError, match="no config file"):
        config_file.load(tmp_path / "missing.toml")

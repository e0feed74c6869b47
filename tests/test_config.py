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
    ("said", "flags"),
    [
        ("did you mean train.method", ["--train.metod", "sft"]),
        ("did you mean train.method", ["--trian.method", "sft"]),
        ("did you mean controller.mu_init", ["--mu_init", "0.3"]),
        ("'ppo'", ["--train.method", "ppo"]),
        ("train.lr", ["--train.lr"]),
        ("'fast'", ["--train.lr", "fast"]),
        ("clip_low", ["--objective.clip_low", "-0.1"]),
        ("clip_high", ["--objective.clip_high", "0"]),
        ("top_p", ["--rollout.top_p", "0.9"]),
        ("mu_min must be below mu_max", ["--controller.mu_min", "0.9", "--controller.mu_max", "0.1"]),
        (
            "mu_init must lie in",
            ["--train.method", "amft", "--controller.signal", "balanced", "--controller.mu_init", "0.99"],
        ),
        ("prompts_per_step must be divisible", ["--train.minibatches_per_rollout", "5"]),
        ("num_generations must be at least 2", ["--rollout.num_generations", "1"]),
        ("val_share", ["--task.general_points.val_share", "0.6", "--task.general_points.test_share", "0.5"]),
        ("stray", ["stray"]),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_setting(said, flags):
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


NUMBERS = {
    "--train.lr nan": "train.lr: input should be a finite number, got 'nan'",
    "--train.lr inf": "train.lr",
    "--train.lr 1e400": "train.lr",
    "--train.lr 1e300": "train.lr: must fit into fp32",
    "--train.adam_betas [0.9, 1e400]": "train.adam_betas",
    "--objective.dual_clip nan": "objective.dual_clip",
    "--run.threads 1000000": "run.threads",
    "--rollout.temperature 1e-300": "rollout.temperature",
    "--eval.temperature 1e30": "eval.temperature",
    "--rollout.vllm.start_timeout_s 1e30": "rollout.vllm.start_timeout_s",
    "--task.virl.legs [3, 1000000]": "legs must be the fewest and the most",
    "--task.general_points.card_size [0, 100000]": "card_size must be width and height",
    "--model.path ~no_such_user_here/x": "model.path: names a home that is not here: '~no_such_user_here'",
    "--train.adam_betas 0.9": "train.adam_betas",
    "--train.adam_betas 1_0": "lists are given as JSON",
}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *((flag.split(" ", 1), said) for flag, said in NUMBERS.items()),
        (["--run.seed", str(2**63)], "run.seed: input should be less than or equal to 9223372036854775807"),
        (["--rollout.max_new_tokens", str(10**12)], "rollout.max_new_tokens"),
        (["--model.lora.rank", str(10**9)], "model.lora.rank"),
        (["--train.max_bad_steps", str(10**30)], "train.max_bad_steps: must fit into 64 bits"),
        (["--run.dir", "a\0b"], "run.dir: holds a NUL"),
        (["--run.dir", "\udcff"], "run.dir: is not valid Unicode"),
        (["--run.dir", ""], "run.dir"),
        (["--run.dir", "x/" * 2500], "run.dir: is too long for a path"),
        (["--task.math.benchmarks", '["x=~no_such_user_here/y"]'], "task.math.benchmarks: names a home"),
        (["--task.math.columns", '{"a": "b\\u0000"}'], "task.math.columns: holds a NUL"),
        (["--model.path", "x" * 300], "model.path: is too long"),
        (["--eval.splits", "[" * 5000], "eval.splits"),
        (["--train.metod" + "x" * 5000, "3"], "unknown flag"),
        (["--train.method", "x" * 10**6], "train.method"),
        (["--train.steps", "1" * 10**5], "train.steps"),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_values_that_fit_nothing_are_one_short_sentence(flags, said):
    with pytest.raises(UserError) as e:
        config_file.load(None, flags)
    text = str(e.value)
    assert said in text and "\n" not in text.strip() and len(text) < 700


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nlr = nan", "train.lr: input should be a finite number"),
        ("[train]\nsteps = true", "train.steps: takes no true or false, got true"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "[" * 500 + "]" * 500, "nested too deeply"),
        ("a = " + "{b = " * 2000 + "1" + "}" * 2000, "nested too deeply"),
        ("[run]\nseed = " + "1" * 5000, "digits"),
        ("[run]\nseed = 0x" + "f" * 5000, "run.seed"),
        ("[train]\nlr = '" + "y" * 10**6 + "'", "train.lr"),
        ("'' = 1", "unknown setting ''"),
        ('[run]\n"a b\\n" = 1', r"unknown setting 'run.a b\n'"),
        (b"\xff\xfe\x00", "not valid TOML"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_files_that_are_no_config_are_one_short_sentence(tmp_path, text, said):
    path = tmp_path / "c.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e:
        config_file.load(path)
    assert said in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 700


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "x" * 300, "/proc/self/mem", "", "/", "~no_such_user_here/x"])
def test_a_path_that_is_no_file_is_one_short_sentence(path):
    with pytest.raises(UserError) as e:
        config_file.load(path)
    assert len(str(e.value)) < 700


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nlr = 1e-3\r\n")
    assert config_file.load(path).train.lr == 1e-3


@pytest.mark.parametrize("name", ["runs/😀", "runs/μ", 'a "b" \\ c', "a\x7f\n\tb"])
def test_any_name_comes_back_from_the_config_that_a_run_writes(tmp_path, name):
    cfg = config_file.load(None, ["--run.dir", name])
    (tmp_path / "c.toml").write_bytes(config_file.to_toml(cfg).encode())
    assert config_file.load(tmp_path / "c.toml").run.dir == name


def test_a_home_is_read_as_a_shell_reads_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config_file.load(None, ["--run.dir", "~/runs/x", "--task.math.train", '["~/a.jsonl", "b=~/c"]'])
    assert cfg.run.dir == "/home/me/runs/x" and cfg.task.math.train == ["/home/me/a.jsonl", "b=/home/me/c"]


def test_null_is_none():
    cfg = config_file.load(
        None, ["--eval.splits", "null", "--task.general_points.targets=null", "--model.lora.alpha", "null"]
    )
    assert cfg.eval.splits is None and cfg.task.general_points.targets is None and cfg.model.lora.alpha is None


@pytest.mark.parametrize(
    ("args", "rest", "settings"),
    [
        (["train", "--resume", "runs/x", "--train.steps", "9"], ["train", "--resume", "runs/x"], ["--train.steps=9"]),
        (["train", "--train.lr", "1e-4", "c.toml"], ["train", "c.toml"], ["--train.lr=1e-4"]),
        (["--run.overwrite", "c.toml"], ["c.toml"], ["--run.overwrite=true"]),
        (["--run.overwrite", "false", "c.toml"], ["c.toml"], ["--run.overwrite=false"]),
        (["--log.progress", "--train.lr=2", "c"], ["c"], ["--log.progress=true", "--train.lr=2"]),
        (["--train.lr", "--train.steps", "3"], [], ["--train.lr", "--train.steps=3"]),
        (["--advantage.lam", "-0.5", "--trian.x", "y"], [], ["--advantage.lam=-0.5", "--trian.x=y"]),
        (["--out", "a.b", "--top-p", "0.5", "--engine=x.y"], ["--out", "a.b", "--top-p", "0.5", "--engine=x.y"], []),
    ],
)  # fmt: skip
def test_a_setting_takes_its_value_wherever_it_stands(args, rest, settings):
    assert config_file.split_flags(args) == (rest, settings)

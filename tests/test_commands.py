"""The commands for people who start: init, docs and completion."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from amft_fast import cli, config_file
from amft_fast.commands import docs, settings
from amft_fast.config import Config
from amft_fast.doctor import plan, shapes
from amft_fast.doctor.memory import memory
from amft_fast.errors import UserError

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1), "solution": f"It is {i + 1}."} for i in range(8)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with rows and a task of one's own, and no terminal."""
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "bare.jsonl").write_text('{"prompt": "Hi", "answer": "Ho"}\n')
    (tmp_path / "odd.csv").write_text("asked,told\n1,2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return tmp_path


def init(*args):
    return cli.main(["init", *args])


# ------------------------------------------------------------------------------------------------------------------ init


def test_init_writes_a_config_that_passes_a_dry_run(here, checkpoint_folder, capsys):
    given = ["--model", str(checkpoint_folder), "--data", "my.jsonl", "--gpus", "0", "--train.lr", "1e-4"]
    assert init("c.toml", *given) == 0
    assert "start with: amft-fast train c.toml" in capsys.readouterr().out
    assert cli.main(["train", "c.toml", "--dry-run"]) == 0
    cfg = config_file.load("c.toml")
    assert (cfg.task.name, cfg.task.data.prompt, cfg.task.data.response) == ("data", "question", "solution")
    assert cfg.task.data.rewards == ["math"] and cfg.train.method == "amft" and cfg.train.lr == 1e-4
    text = (here / "c.toml").read_text()
    assert "# Column with the prompt: a text, or a list of messages" in text and "the plan: " in text
    assert [p.name for p in here.glob(".*")] == []


def test_init_overwrites_only_when_told(here, checkpoint_folder, capsys):
    given = ["c.toml", "--model", str(checkpoint_folder), "--data", "my.jsonl", "--gpus", "0"]
    (here / "c.toml").write_text("mine")
    assert init(*given) == 2 and (here / "c.toml").read_text() == "mine"
    assert "c.toml is there already; give another name, or --force" in capsys.readouterr().err
    assert init(*given, "--force") == 0 and (here / "c.toml").read_text() != "mine"


def test_init_asks_on_a_terminal(here, checkpoint_folder, monkeypatch):
    asked, answers = [], iter(["", str(checkpoint_folder), "odd.csv", "asked", "length", "0"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))
    assert init() == 0
    for question, word in zip(asked, ("Model", "Model", "a file of your rows", "asked, told", "Rewards", "GPUs")):
        assert word in question
    cfg = config_file.load("amft.toml")
    assert cfg.task.data.prompt == "asked" and cfg.task.data.rewards == ["length"] and cfg.run.device == "cpu"
    answers = iter(["no"])
    assert init() == 2 and "overwrite it?" in asked[-1]


def test_init_takes_rl_where_there_is_nothing_to_imitate(here, checkpoint_folder):
    given = ["--model", str(checkpoint_folder), "--data", "bare.jsonl", "--gpus", "0"]
    assert init(*given) == 0 and config_file.load("amft.toml").train.method == "rl"
    assert init(*given, "--force", "--method", "fixed") == 0 and config_file.load("amft.toml").train.method == "fixed"


@pytest.mark.parametrize(
    ("model", "gpus", "gigabytes", "stage"),
    [("Qwen/Qwen2.5-1.5B", 1, 80, None), ("Qwen/Qwen2.5-7B", 8, 80, 1), ("Qwen/Qwen2.5-7B", 16, 48, 2)],
)
def test_init_takes_what_the_plan_says_fits(here, model, gpus, gigabytes, stage, monkeypatch):
    """The settings fit, the defaults would not, and no change asks for another machine."""
    monkeypatch.setattr("amft_fast.run.preflight.Hub.has", lambda self, kind, name: True)
    given = ["--task", "general_points", "--gpus", str(gpus), "--gpu-memory", str(gigabytes)]
    assert init("--model", model, *given) == 0
    cfg = config_file.load("amft.toml")
    rest = {"prompt_tokens": 512, "response_tokens": None, "image_tokens": 0, "peak_tflops": None, "mfu": 0.4}
    machine, _ = plan.machine_of(cfg, Namespace(gpus=gpus, gpu_memory=float(gigabytes), **rest))
    shape = shapes.find(model)
    assert memory(cfg, shape, machine).needed <= gigabytes * 1e9
    assert stage == (cfg.engine.zero_stage if cfg.engine.kind == "deepspeed" else None)
    plain = config_file.from_settings(
        cfg,
        {
            "model.gradient_checkpointing": False,
            "train.micro_batch_tokens": Config().train.micro_batch_tokens,
            "rollout.max_batch": Config().rollout.max_batch,
            "engine": {"zero_stage": 1, "offload": False},
        },
    )
    assert memory(plain, shape, machine).needed > gigabytes * 1e9
    assert cfg.rollout.engine == "transformers"


MISTAKES = {
    (): "init: give --model; without a terminal nothing can be asked",
    ("--model", "x"): "init: give --data or --task; without a terminal",
    ("--model", "x", "--task", "virl", "--data", "my.jsonl"): "init: give --data or --task, not both",
    ("--model", "x", "--task", "virl", "--rewards", "math"): "init: --rewards are for --data",
    ("--model", "x", "--data", "odd.csv", "--gpus", "0"): "init: give --task.data.prompt",
    ("--model", "x", "--data", "gone.jsonl", "--gpus", "0"): "no data file",
    ("--model", "x", "--task", "virl", "--gpus", "-2"): "--gpus must be a whole number from 0 to 1024",
    ("--model", "/no/such/model", "--task", "general_points", "--gpus", "0"): "is not a transformers checkpoint",
    ("no/such/c.toml", "--model", "x"): "init: no/such/c.toml must be a file in a folder that is there",
    ("--model", "Qwen/Qwen2.5-72B", "--task", "general_points", "--gpus", "1"): "init: the run does not fit: ",
    ("--model", "x", "--task", "virl", "--gpus", "0", "--train.lrr", "1"): "unknown flag --train.lrr; did you mean",
}


@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_mistakes_of_init_leave_no_file(here, args, capsys):
    assert init(*args) == 2
    said = capsys.readouterr().err
    assert MISTAKES[args] in said and said.count("\n") == 1
    assert not list(here.rglob("*.toml*"))


# ------------------------------------------------------------------------------------------------------------------ docs


def test_docs_of_a_setting_has_type_default_bounds_and_meaning(capsys):
    assert cli.main(["docs", "controller.mu_init"]) == 0
    said = capsys.readouterr().out
    assert "number, above 0 and below 1; default: 0.5" in said and "Where mu starts" in said
    assert "grpo | dr_grpo | rloo | reinforce++ | opo" in docs.text("advantage.kind")
    assert "true or false or selective" in docs.text("model.gradient_checkpointing")
    assert "list of 2: whole number, whole number" in docs.text("task.virl.legs")
    assert "whole number, at least 1 and at most 1024; default: none" in docs.text("run.threads")
    assert docs.text("lora.rank") == docs.text("--model.lora.rank"), "the last part alone will do"


def test_docs_of_sections_and_of_what_is_neither(capsys):
    names = [line.split()[0] for line in docs.text(None).splitlines() if line and "docs SECTION" not in line]
    assert {"run", "task.data", "rollout.vllm", "checkpoint"} <= set(names)
    assert "sections within: model.lora" in docs.text("model") and "model.dtype" in docs.text("model")
    assert cli.main(["docs", "train.lrr"]) == 2
    assert "no setting or section 'train.lrr'; did you mean train.lr?" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean controller"):
        docs.text("controler")


def test_every_setting_has_a_kind_and_a_meaning():
    every = settings.all_settings()
    assert [s.name for s in every if not s.text] == [] and [s.name for s in every if "any value" in s.kind] == []
    assert sorted(s.name for s in every) == sorted(config_file.setting_names(Config))
    assert {s.name for s in every if s.is_file} >= {"task.name", "task.data.train", "model.path"}


# ------------------------------------------------------------------------------------------------------------ completion


def completed(line, folder):
    """What argcomplete's function in the shell is told for a line, in a process of its own."""
    out = folder / "out"
    env = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
    env |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    code = "import sys; sys.argv = ['amft-fast']; from amft_fast.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | env, check=True, cwd=folder)
    return out.read_text().split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("amft-fast train --train.lr_", ["--train.lr_schedule", "--train.lr_warmup_steps"]),
        ("amft-fast train c.toml --train.method sft", ["sft", "sft_then_rl"]),
        ("amft-fast init --task.name m", ["math", "my_task.py"]),
    ],
)
def test_commands_settings_and_values_are_completed(line, offered, tmp_path):
    (tmp_path / "my_task.py").write_text("")
    assert completed(line, tmp_path) == offered


def test_the_shells_take_the_lines(tmp_path):
    script = f'eval "$({sys.executable} -m amft_fast completion bash)"; complete -p amft-fast'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "amft-fast" in done.stdout
    zsh = subprocess.run([sys.executable, "-m", "amft_fast", "completion", "zsh"], capture_output=True, text=True)
    assert zsh.stdout.startswith("#compdef amft-fast")

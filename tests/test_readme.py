"""README's own commands, as they stand there: each is run, or checked as far as it is cheap, and none is left out.

What takes minutes, the network, a GPU or an environment of its own (`make setup`, `eval MODEL --benchmarks aime24`, `compare`,
the benchmarks, torchrun) is not run here: its words are taken apart by the program's own parsers instead, and tests of their
own run the same code in small (test_compare, test_benchmarks, test_bench, test_distributed).
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from amft_fast import cli, config_file
from amft_fast.study.compare import parse_method
from bench.__main__ import BENCHMARKS
from bench.__main__ import main as bench

ROOT = Path(__file__).parent.parent
STARTS = ("make ", "amft-fast ", "python -m ", "torchrun ")
# The demo in a second; flags after those that README gives.
SHORT = shlex.split(
    "--train.steps 2 --train.warmup_steps 1 --train.prompts_per_step 2 --train.demos_per_step 2 --rollout.num_generations 2 "
    "--train.lr_warmup_steps 0 --eval.every 1 --eval.max_prompts 2 --eval.schedule_max_prompts 2 --eval.num_samples 1 "
    "--eval.schedule_num_samples 1 --rollout.max_new_tokens 4 --log.to [] --task.general_points.max_train 20"
)
SHORT_EVAL = shlex.split("--eval.max_prompts 2 --eval.num_samples 1 --rollout.max_new_tokens 4")
FILLED_IN = {"CONFIG": "configs/demo.toml", "FOLDER": "configs", "MODEL": "configs/math_base"}


def commands() -> list[str]:
    """The command lines of README's code blocks and of its inline code, without comments."""
    text = (ROOT / "README.md").read_text().replace(" \\\n", " ")
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", text)
    found = (line.partition(" #")[0].strip() for line in [*blocks, *inline])
    return list(dict.fromkeys(" ".join(shlex.split(c)) if "'" not in c else c for c in found if c.startswith(STARTS)))


COMMANDS = commands()
# In README's order, in one folder: each finds there what those before it have left.
RUN = [
    ("amft-fast docs train.lr", []),
    ("amft-fast train configs/demo.toml --train.method rl --train.lr 1e-4", SHORT),
    ("amft-fast train configs/demo.toml --dry-run", []),
    ("amft-fast data configs/demo.toml", []),
    ("amft-fast train --resume runs/demo", []),
    ("amft-fast eval configs/demo.toml --model runs/demo/model", SHORT_EVAL),
    ("amft-fast export runs/demo --checkpoint best --dtype bf16", []),
    ("amft-fast report runs/demo", []),
    ("amft-fast watch runs/demo", []),
    ("amft-fast doctor", []),
]


def test_readme_has_these_commands():
    """The pattern finds them, and what is to be run here stands there."""
    assert len(COMMANDS) > 20
    assert [c for c in COMMANDS if c in dict(RUN)] == [c for c, _ in RUN]


def test_commands_that_are_cheap_run_as_they_stand(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for command, short in RUN:
        said = capsys.readouterr()
        assert cli.main([*shlex.split(command)[1:], *short]) == 0, (command, said)
    for path in ("metrics.jsonl", "samples.jsonl", "report.html", "model/config.json", "summary.json"):
        assert (tmp_path / "runs" / "demo" / path).exists(), path
    assert list((tmp_path / "runs" / "demo" / "export").glob("step-*/config.json"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in dict(RUN)])
def test_other_commands_are_ones_that_the_program_takes(command, monkeypatch):
    """Of the kinds below; a new kind of command must be given its own check, or be run above."""
    monkeypatch.chdir(ROOT)
    words = [FILLED_IN.get(w, w) for w in shlex.split(command)]
    if words[0] == "make":
        plan = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0 and plan.stdout, plan.stderr
    elif words[:3] == ["python", "-m", "bench"]:
        assert words[3] in BENCHMARKS
        with pytest.raises(SystemExit) as stopped:
            bench([words[3], "--help"])
        assert stopped.value.code == 0
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
    elif words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "amft_fast"
        check(words[words.index("-m") + 2 :])
    else:
        check(words[1:])


def check(argv: list[str]) -> None:
    """The arguments of `amft-fast` as its parsers read them: the command, its settings, methods, benchmarks."""
    if len(argv) == 1:  # a command that the text names
        assert argv[0] in cli.COMMANDS
        return
    rest, flags = config_file.split_flags(argv)
    args = cli.build_parser().parse_args(rest)
    if args.command in ("convert", "regret"):  # take no config
        return
    if getattr(args, "benchmarks", None):
        from amft_fast.tasks.math.benchmarks import chosen, default_benchmarks_file

        assert chosen(default_benchmarks_file(), args.benchmarks.split(","))
        return
    config_file.load(getattr(args, "config", None) or args.target, flags)
    for method in args.methods.split(",") if args.command == "compare" else ():
        assert parse_method(method)

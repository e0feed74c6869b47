"""amft-fast init: a config to start from, asked for on a terminal or given as flags, with what fits on the machine.

Nothing is written that `train --dry-run` would refuse, and no file is overwritten without being told to.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.methods import METHODS

DEFAULT = "amft.toml"
# What rows of problems call their columns where they do not call them `prompt` and `response`.
PROMPTS = ("prompt", "question", "problem", "instruction", "query", "messages")
RESPONSES = ("response", "completion", "solution", "output")
# A step that one CPU gets through. GPUs start from the defaults, which are written out too: they are what one changes first.
SMALL = {
    "train.prompts_per_step": 16,
    "train.demos_per_step": 16,
    "train.micro_batch_tokens": 4096,
    "rollout.num_generations": 4,
    "rollout.max_new_tokens": 256,
    "meta.prompts": 16,
}


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's options; what is left out is asked for on a terminal."""
    parser = commands.add_parser(
        "init",
        help="write a config to start from: model, data or task, and what fits on the GPUs",
        description="Asks for what is not given, on a terminal. Settings as flags are written into the config too.",
    )
    parser.add_argument("file", nargs="?", default=DEFAULT, help="to write (default %(default)s)")
    parser.add_argument("--model", help="checkpoint folder or hub name")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="rows of your own, instead of --task")
    parser.add_argument("--rewards", help="of --data, comma-separated: FILE.py:NAME, math, format, length, regex ...")
    parser.add_argument("--task", help="general_points, virl, math, reasoning_gym:NAME, FILE.py:CLASS ...")
    parser.add_argument(
        "--method", choices=tuple(METHODS), help="(default: amft, or rl where there is no demonstration)"
    )
    parser.add_argument("--gpus", dest="on_gpus", type=int, metavar="N", help="0: the CPU (default: those here)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU (default: that here, or 80)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the longest prompt (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Writes the config and says how to start. Raises UserError, with nothing written."""
    path = Path(args.file)
    ask = _ask if sys.stdin.isatty() else _refuse
    _check_place(path, args.force, ask)
    settings = _answers(args, flags, ask)
    cfg = config_file.from_settings(None, settings)
    cfg, fits = _fitted(cfg, args)
    text = _text(cfg, path, fits, args.on_gpus)
    for line in _write(path, text):
        print(line, file=sys.stderr)
    print(f"{path} is written; start with: {_start(path, args.on_gpus)}")
    return 0


# --------------------------------------------------------------------------------------------------------------- answers

Ask = Callable[[str, str, str], str]  # (question, default, the flag that answers it)


def _ask(question: str, default: str, flag: str) -> str:
    while True:
        try:
            said = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise UserError(f"init: no answer to {question!r}; {flag} gives it") from None
        if said:
            return said


def _refuse(question: str, default: str, flag: str) -> str:
    """Without a terminal: the default, where there is one."""
    if not default:
        raise UserError(f"init: give {flag}; without a terminal nothing can be asked")
    return default


def _check_place(path: Path, force: bool, ask: Ask) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"init: {path} must be a file in a folder that is there")
    if (
        path.exists()
        and not force
        and ask(f"{path} is there already; overwrite it? yes or no", "no", "--force") != "yes"
    ):
        raise UserError(f"init: {path} is there already; give another name, or --force to overwrite it")


def _answers(args: argparse.Namespace, flags: list[str], ask: Ask) -> dict[str, Any]:
    """The settings that follow from flags and answers; `args.on_gpus` and `args.gpu_memory` are filled in."""
    model = args.model or ask("Model, a checkpoint folder or a hub name", "", "--model")
    what = args.data or args.task
    if args.data and args.task:
        raise UserError("init: give --data or --task, not both")
    if not what:
        tasks = "general_points, virl, math, reasoning_gym:NAME, FILE.py:CLASS"
        what = ask(f"What to learn: a file of your rows, or a task ({tasks})", "", "--data or --task")
    settings: dict[str, Any] = {"run.dir": f"runs/{Path(args.file).stem}", "model.path": model}
    if isinstance(what, list) or _is_data(what):
        settings |= _data(what if isinstance(what, list) else [what], args.rewards, ask)
    elif args.rewards:
        raise UserError("init: --rewards are for --data")
    else:
        settings["task.name"] = what
    settings |= _machine(args, ask)
    given = config_file.parse_flags(flags)
    settings |= given
    if "method" not in given.get("train", {}):
        task = {name: value for name, value in settings.items() if name.partition(".")[0] == "task"}
        settings["train.method"] = args.method or (
            "amft" if _has_demos(config_file.from_settings(None, task)) else "rl"
        )
    return settings


def _is_data(text: str) -> bool:
    from amft_fast.tasks.math.sources import Source

    return ":" not in text and Source(text).is_file


def _data(files: list[str], rewards: str | None, ask: Ask) -> dict[str, Any]:
    """Settings of the task `data`, by the columns of the first row that can be read."""
    from amft_fast.tasks.math.sources import Source

    source = Source(files[0])
    columns: dict[str, Any] = {}
    if source.is_file:
        columns = next((row for _, row in islice(source.rows(), 1000) if isinstance(row, dict)), {})
        if not columns:
            raise UserError(f"init: no row among the first 1000 of {files[0]} can be read")
    prompt = next((name for name in PROMPTS if name in columns), "" if columns else "prompt")
    if not prompt:
        prompt = ask(f"The column with the prompt, of {', '.join(columns)}", "", "--task.data.prompt")
    response = next((name for name in RESPONSES if name in columns and name != prompt), "response")
    named = rewards or ask(
        "Rewards, FILE.py:NAME or math, format, length, regex, json_schema",
        "math" if "answer" in columns else "",
        "--rewards",
    )
    return {
        "task.name": "data",
        "task.data.train": files,
        "task.data.prompt": prompt,
        "task.data.response": response,
        "task.data.rewards": [name.strip() for name in named.split(",") if name.strip()],
    }


def _machine(args: argparse.Namespace, ask: Ask) -> dict[str, Any]:
    from amft_fast.doctor.plan import GB, MAX_GPUS, gpus_here

    here = gpus_here()
    if args.on_gpus is None:
        said = ask("GPUs, 0 for the CPU", str(here.count), "--gpus")
        args.on_gpus = int(said) if said.isdecimal() and len(said) < 8 else -1
    if not 0 <= args.on_gpus <= MAX_GPUS:
        raise UserError(f"--gpus must be a whole number from 0 to {MAX_GPUS}")
    if not args.on_gpus:
        return {"run.device": "cpu", **SMALL}
    args.gpu_memory = args.gpu_memory or (here.memory / GB if here.count else 80.0)
    kind = {"engine.kind": "deepspeed", "engine.zero_stage": 1} if args.on_gpus > 1 else {"engine.kind": "local"}
    defaults = {
        name: getattr(getattr(Config(), section), field) for name in SMALL for section, field in [name.split(".")]
    }
    return {"run.device": "cuda", **kind, **defaults}


def _has_demos(cfg: Config) -> bool:
    """Whether there is anything to imitate."""
    from amft_fast.tasks import shipped
    from amft_fast.tasks.math.sources import Source

    if cfg.task.name == "data":
        rows = (row for text in cfg.task.data.train for _, row in islice(Source(text).rows(), 1000))
        return any(isinstance(row, dict) and row.get(cfg.task.data.response) for row in rows)
    if cfg.task.name == "math":
        return True  # sources with solutions are what it is for; a dry run says what it found
    if cfg.task.name.startswith("reasoning_gym:"):
        small = {"train_size": 8, "val_size": 0, "test_size": 0}
        cfg = config_file.from_settings(cfg, {f"task.gym.{name}": n for name, n in small.items()})
    try:
        return len(shipped.make(cfg.task).demos("train")) > 0
    except ValueError as e:
        raise UserError(f"task.{cfg.task.name}: {e}") from None


# ------------------------------------------------------------------------------------------------------------------ plan


def _fitted(cfg: Config, args: argparse.Namespace) -> tuple[Config, str]:
    """The config with the changes that the memory plan asks for, and a sentence on it. Raises UserError when none fits."""
    from amft_fast.doctor import plan, shapes
    from amft_fast.doctor.memory import memory

    try:
        shape = shapes.find(cfg.model.path)
    except UserError as e:
        return cfg, f"memory was not planned ({e})"
    given = {"gpus": args.on_gpus, "gpu_memory": args.gpu_memory, "prompt_tokens": args.prompt_tokens}
    rest = {"response_tokens": None, "image_tokens": 0, "peak_tflops": None, "mfu": 0.4}
    machine, _ = plan.machine_of(cfg, argparse.Namespace(**given, **rest))
    needed = memory(cfg, shape, machine)
    if needed.needed > machine.memory:
        advice = plan.advise(cfg, shape, machine, more_gpus=False)
        if advice is None:
            raise UserError(plan.refusal(cfg, shape, machine, needed).replace("--plan: the config", "init: the run"))
        changes, needed = advice
        for change in changes:
            cfg, machine = change.apply(cfg, machine)
    where = f"each of {args.on_gpus} GPUs" if args.on_gpus else "the machine"
    return cfg, f"the plan: {plan.size(needed.needed)} of the {plan.size(machine.memory)} of {where}"


# ------------------------------------------------------------------------------------------------------------------ file


def _start(path: Path, gpus: int) -> str:
    file = shlex.quote(str(path))
    return f"torchrun --nproc-per-node {gpus} -m amft_fast train {file}" if gpus > 1 else f"amft-fast train {file}"


def _text(cfg: Config, path: Path, fits: str, gpus: int) -> str:
    """The settings that were chosen, each under its meaning."""
    from amft_fast.commands.docs import comment
    from amft_fast.commands.settings import sections

    file = shlex.quote(str(path))
    head = [
        f"Written by amft-fast init; {fits}.",
        f"Look at the data: amft-fast data {file}",
        f"Start: {_start(path, gpus)}",
        "More settings: amft-fast docs; each can stand here, or be given as a flag.",
    ]
    if gpus > 1:
        head.insert(3, "It takes DeepSpeed: pip install 'amft-fast[deepspeed]'")
    lines = [comment(line) for line in head]
    chosen = cfg.model_dump(exclude_unset=True)
    for section in sections():
        values: Any = chosen
        for part in section.name.split("."):
            values = values.get(part, {}) if isinstance(values, dict) else {}
        body = []
        for setting in section.settings:
            value = values.get(setting.name.rpartition(".")[2])
            if value is not None:
                body += [comment(setting.text), f"{setting.name.rpartition('.')[2]} = {config_file.toml_value(value)}"]
        if body:
            lines += ["", f"[{section.name}]", *body]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> list[str]:
    """Puts the file in its place once a dry run has passed; returns what that found. Raises UserError."""
    from amft_fast.run.preflight import check
    from amft_fast.run.writers import replace_text

    tried = path.with_name(f".{path.name}.try")
    replace_text(tried, text)
    try:
        found = check(config_file.load(tried))
    finally:
        tried.unlink()
    replace_text(path, text)
    return found

"""Completion in bash and zsh, by argcomplete: `eval "$(amft-fast completion bash)"`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

NAME = "amft-fast"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="the lines that let a shell complete commands and settings",
        description=f'Put this into ~/.bashrc or ~/.zshrc: eval "$({NAME} completion bash)", or zsh.',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace, flags: list[str]) -> int:
    from argcomplete import shellcode

    print(shellcode([NAME], shell=args.shell))
    return 0


def asked() -> bool:
    """Whether a shell has started this process to be told how a line may go on."""
    return "_ARGCOMPLETE" in os.environ


def answer(parser: argparse.ArgumentParser) -> None:
    """Tells the shell, and ends the process."""
    from argcomplete import autocomplete

    autocomplete(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag, as completion wants it; values are parsed elsewhere (config_file.py)."""
    from amft_fast.commands.settings import all_settings, first_sentence

    for setting in all_settings():
        alone = setting.kind == "true or false"
        action = parser.add_argument(
            f"--{setting.name}", nargs="?" if alone else None, help=first_sentence(setting.text)
        )
        if setting.name == "task.name":
            action.completer = _task_names
        elif setting.choices:
            action.completer = _one_of(setting.choices)


def _one_of(choices: tuple[str, ...]) -> Callable[..., list[str]]:
    return lambda prefix, **_: [c for c in choices if c.startswith(prefix)]


def _task_names(prefix: str, **_: Any) -> list[str]:
    from importlib.metadata import entry_points

    from argcomplete import FilesCompleter

    from amft_fast.config import PLUG_INS, SHIPPED

    names = [*SHIPPED, *(point.name for point in entry_points(group=PLUG_INS)), "reasoning_gym:", "verifiers:"]
    return [n for n in names if n.startswith(prefix)] + list(FilesCompleter(["py"])(prefix))

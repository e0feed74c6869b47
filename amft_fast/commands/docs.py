"""amft-fast docs: what a setting means, without leaving the terminal."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from amft_fast.config_file import did_you_mean
from amft_fast.errors import UserError

WIDTH = 100


def add(commands: Any) -> None:
    parser = commands.add_parser("docs", help="what a setting means: its type, default and bounds")
    parser.add_argument("setting", nargs="?", help="a setting or a section (default: all sections)")


def run(args: argparse.Namespace, flags: list[str]) -> int:
    print(text(args.setting))
    return 0


def text(name: str | None) -> str:
    """The help of a setting, of a section, or the list of sections. Raises UserError for what is neither."""
    from amft_fast.commands.settings import all_settings, first_sentence, sections

    if not name:
        wide = max(len(s.name) for s in sections())
        rows = [f"{s.name:<{wide}}  {first_sentence(s.text)}" for s in sections()]
        return "\n".join(
            [*rows, "", "amft-fast docs SECTION lists its settings, amft-fast docs SECTION.SETTING explains one"]
        )
    name = name.removeprefix("--").strip(".")
    for section in sections():
        if section.name == name:
            wide = max(len(s.name) for s in section.settings)
            rows = [f"{s.name:<{wide}}  {first_sentence(s.text)} ({s.default})" for s in section.settings]
            within = [s.name for s in sections() if s.name.startswith(f"{name}.")]
            more = ["", f"sections within: {', '.join(within)}"] if within else []
            return "\n".join([_wrapped(section.text), "", *rows, *more])
    found = [s for s in all_settings() if s.name == name] or [s for s in all_settings() if s.name.endswith(f".{name}")]
    if not found:
        known = [s.name for s in all_settings()] + [s.name for s in sections()]
        raise UserError(f"docs: no setting or section {name!r}{did_you_mean(name, known)}")
    return "\n\n".join(f"{s.name}\n{_wrapped(s.line)}\n{_wrapped(s.text)}" for s in found)


def comment(words: str) -> str:
    """A text as comments of a config."""
    return textwrap.fill(words, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _wrapped(words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent="  ", subsequent_indent="  ")

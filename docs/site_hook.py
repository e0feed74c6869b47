"""What the site has beyond the files of docs/: every setting, generated from config/, and files of the repository that pages
link to. mkdocs calls these functions by their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A link that leaves docs/ for a file of the repository: CONTRIBUTING.md, a plot under bench/results.
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "settings.md", content=settings_page()))
    texts = [p.read_text() for p in Path(config["docs_dir"]).glob("*.md")]
    for name in sorted({name for text in texts for name in _OUTSIDE.findall(text)}):
        if name.endswith(".md"):
            # Seen from the root, pages lie in docs/.
            files.append(File.generated(config, name, content=(ROOT / name).read_text().replace("](docs/", "](")))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return _OUTSIDE.sub(r"](\1", markdown)


def settings_page() -> str:
    """Every section and setting, in the order of the config."""
    from amft_fast.commands.settings import sections

    lines = [
        "# Every setting",
        "",
        "In a config file `[train]` and below it `lr = 1e-4`, on the command line `--train.lr 1e-4`, in Python "
        '`{"train.lr": 1e-4}`. '
        "`amft-fast docs train.lr` prints what stands here.",
    ]
    for section in sections():
        lines += ["", f"## {section.name}", "", _plain(section.text), ""]
        for setting in section.settings:
            lines += [f"### {setting.name}", "", f"*{_plain(setting.line)}*", "", _plain(setting.text), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text in which nothing but `code` is Markdown."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", part) for i, part in enumerate(parts))

"""README's tree names every source file, in its room, and no other."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("amft_fast", "kernels", "csrc", "bench")


def on_disk():
    """The source files by folder, as git has them; from the disk where there is no git."""
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).rglob("*")]
    files = [Path(n) for n in names if n.endswith((".py", ".cpp", ".cu")) and not n.endswith("__init__.py")]
    return {folder: {f.stem for f in files if str(f.parent) == folder} for folder in {str(f.parent) for f in files}}


def drawn():
    """What the tree says: a word with a slash opens a folder, two blanks further in; the words after it, up to a dot in the
    middle of the line, are its files."""
    text = re.search(r"## The tree\n\n(.*?)\n\n[^ ]", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    rooms, path = {}, []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        words = line.partition("·")[0].split()
        opened = [w.rstrip("/") for w in words if w.endswith("/")]
        path = path[:depth] + opened[:1]
        rooms.setdefault("/".join(path), set()).update(w for w in words if not w.endswith("/"))
    return rooms


def test_the_tree_is_what_lies_there():
    files, rooms = on_disk(), drawn()
    assert {room: names for room, names in rooms.items() if room.startswith(FOLDERS)} == files
    assert all((ROOT / room).is_dir() for room in rooms)

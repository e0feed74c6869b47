"""The site of the docs: it builds strictly, and what its tables name is there."""

import dataclasses
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amft_fast.commands.settings import all_settings, sections
from amft_fast.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SETTINGS = {s.name for s in all_settings()}
SECTIONS = {s.name for s in sections()} | {"task"}
# History tells of settings as they were.
PAGES = sorted(p for p in DOCS.glob("*.md") if p.stem not in ("lab_notes", "study"))


def rows(page):
    """(names on the left, names on the right) of each row of a page's tables, without their heads."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return [(re.findall(r"`([^`]+)`", c[0]), re.findall(r"`([^`]+)`", c[1])) for c in cells]


@pytest.mark.parametrize("page", ["from_trl.md", "from_verl.md"])
def test_our_names_are_settings(page):
    found = rows(page)
    assert len(found) > 40
    assert [name for _, ours in found for name in ours if name not in SETTINGS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_settings_that_pages_name_are_there(page):
    """In code, `section.field` or --section.field; a field that a task's own options have is its class's to know."""
    other = re.compile(r"task\.options\b|run\.lock$|\w+\.\w+_$")  # a task's own class knows; a file; gac_*
    named = re.findall(
        rf"(?:`|--)((?:{'|'.join({s.partition('.')[0] for s in SECTIONS})})\.[a-z_.]+[a-z_])", page.read_text()
    )
    assert [n for n in named if n not in SETTINGS | SECTIONS and not other.match(n)] == []


def test_names_of_trl_are_those_of_its_config():
    trl = pytest.importorskip("trl", reason="part of the extra bench")
    known = {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    assert [name for theirs, _ in rows("from_trl.md") for name in theirs if name not in known] == []


def test_names_of_verl_are_those_of_its_config():
    yaml, verl = pytest.importorskip("yaml"), importlib.util.find_spec("verl")
    if verl is None:
        pytest.skip("verl is not installed")
    config = Path(next(iter(verl.submodule_search_locations))) / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    known = yaml.safe_load(config.read_text())
    for theirs, _ in rows("from_verl.md"):
        for name in theirs:
            at = known
            for part in name.split("."):
                assert part in at, name
                at = at[part]


def test_every_method_is_described():
    assert set(METHODS) <= {name for names, _ in rows("methods.md") for name in names}


def test_every_setting_is_on_the_generated_page():
    page = runpy.run_path(str(DOCS / "site_hook.py"))["settings_page"]()
    assert {line[4:] for line in page.splitlines() if line.startswith("### ")} == SETTINGS
    assert "*number, above 0; default: 1e-06*" in page


@pytest.fixture
def tree(tmp_path):
    """What the site is made of, to be spoilt."""
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "docs", "bench/results"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    return tmp_path


def build(tree):
    command = [sys.executable, "-m", "mkdocs", "build"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.mark.integration
def test_the_site_builds_and_a_broken_link_fails_it(tree):
    pytest.importorskip("material", reason="part of the extra docs")
    done = build(tree)
    assert done.returncode == 0, done.stderr
    site = tree / "build" / "site"
    assert 'id="trainlr"' in (site / "settings" / "index.html").read_text()
    assert (site / "bench" / "results" / "step_cpu.png").is_file() and (site / "notebook.ipynb").is_file()
    (tree / "docs" / "index.md").write_text("# x\n\n[gone](gone.md) [nowhere](tasks.md#nowhere)\n")
    done = build(tree)
    assert done.returncode == 1 and "gone.md" in done.stderr and "#nowhere" in done.stderr

"""docs/notebook.ipynb, executed by a Jupyter kernel as a reader would."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# What a notebook does to a run: an event loop is there already, cells come again, and widgets run threads.
MORE = """
import signal
import threading
from pathlib import Path


async def short(completions):
    return [1 / (1 + len(c)) for c in completions]


def again():
    runs.append(train(model, rows, [exact, short], **settings | {"train": settings["train"] | {"steps": 1, "method": "fixed"}}))


runs, before = [], signal.getsignal(signal.SIGINT)
again()
thread = threading.Thread(target=again)
thread.start()
thread.join()
assert [r.code for r in runs] == [0, 0] and runs[0].path != runs[1].path and signal.getsignal(signal.SIGINT) == before
assert runs[0].summary["end"] == runs[1].summary["end"] and {"task/exact", "task/short"} <= set(runs[0].metrics.columns)
"""


def test_it_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="part of the extra dev")
    book = nbformat.read(DOCS / "notebook.ipynb", 4)
    nbformat.validate(book)
    assert [c.source for c in book.cells if c.get("outputs") or c.get("execution_count")] == []


@pytest.mark.integration
def test_it_runs_and_learns_what_it_says(tmp_path):
    nbformat, nbclient = (
        pytest.importorskip("nbformat"),
        pytest.importorskip("nbclient", reason="part of the extra dev"),
    )
    (tmp_path / "configs").symlink_to(DOCS.parent / "configs")
    (tmp_path / "docs").mkdir()
    book = nbformat.read(DOCS / "notebook.ipynb", 4)
    book.cells.append(nbformat.v4.new_code_cell("assert after > before + 0.3, (before, after)\n" + MORE))
    nbclient.NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute()
    shown = [set(o.get("data", {})) for c in book.cells for o in c.get("outputs", [])]
    assert {"text/plain", "text/html"} in shown, "the report is shown"
    assert any("image/png" in kinds for kinds in shown), "and the plot"

"""CONTRIBUTING.md: the method of its worked example runs, and imitates what it says."""

import re
from pathlib import Path

from fakes import copy_run
from runs import lines, train

from amft_fast import mixtures
from amft_fast.methods import METHODS

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def test_the_worked_example_is_a_method(tmp_path, checkpoint_folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(mixtures.MIXTURES, "raft", names["Raft"])
    # Settings know the rows that ship: the example takes the place of one.
    monkeypatch.setitem(METHODS, "fixed", names["ROW"])
    flags = ("--train.method", "fixed", "--train.steps", "12", "--rollout.num_generations", "4", "--train.lr", "0.05")
    cfg = copy_run(tmp_path, checkpoint_folder, *flags, "--eval.at_start", "false", "--eval.num_samples", "1")
    assert train(cfg) == 0
    records = lines(tmp_path)
    assert all(r["mu"] == 1 and "sft_loss" in r and "pg_loss" not in r for r in records)
    assert records[-1]["success"] > records[0]["success"] + 0.3

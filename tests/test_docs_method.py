"""CONTRIBUTING.md: the method of its worked example runs, and imitates what it says."""

import re
from pathlib import Path

from fakes import copy_run
from runs import steps, trainer_of

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
    done = steps(trainer_of(copy_run(tmp_path, checkpoint_folder, *flags)), 12)
    assert all(s.mu == 1 and "sft_loss" in s.figures and "pg_loss" not in s.figures for s in done)
    right = [sum(x.success for x in s.drawn.samples) for s in done]
    assert right[-1] > right[0] + 4, "of sixteen"

"""A process that holds the lock of a run's folder, for tests of what others are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOLD = """
import os, sys, time
from pathlib import Path
from amft_fast.run.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print("held", child, flush=True)
    time.sleep(600)
"""


def hold(folder, *options):
    """Another process that holds the folder."""
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *options], stdout=subprocess.PIPE, text=True, env=env
    )
    word, child = process.stdout.readline().split()
    assert word == "held"
    return process, int(child)

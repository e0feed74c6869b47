"""40 kills at any moment: nothing is lost, and the run ends as an undisturbed one, bit for bit. See kill_worker.py.

test_kill_points.py goes through all moments one by one; here are real processes, their locks and signals.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


def test_40_kills(tmp_path):
    here = Path(__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(here.parent) + os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, str(here / "kill_worker.py"), str(tmp_path), "40"]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-6000:]
    counted = json.loads(out.stdout.splitlines()[-1])
    assert counted["kills"] == 40 and counted["with rows"] > 20, counted

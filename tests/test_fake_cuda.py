"""The training step on a CUDA device that is not there: `on_fake_cuda.py`, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import SHIM, build_shim

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: no wheels for macOS")
@pytest.mark.timeout(900)
def test_the_step_on_a_device_that_is_not_there(tmp_path):
    """The shim has to be loaded before torch, hence the process; `-p` loads it before conftest.py."""
    shim = build_shim(tmp_path)
    if shim is None:
        pytest.skip("no C++ compiler")
    options = ["-q", "-p", "fake_cuda", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "on_fake_cuda.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {SHIM: shim}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=880)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]

"""The loss head's Triton backend without a GPU: in Triton's interpreter, and where Triton cannot serve at all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from amft_kernels.backends import choose_backend, triton_obstacle
from amft_kernels.linear_policy_loss import linear_policy_loss

HERE = Path(__file__).parent


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: there are no wheels for macOS"
)
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    """`interpreted_loss_head.py` in a process of its own: half a minute on a free core."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_loss_head.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # before anything imports Triton, as conftest.py may
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=880)
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter cannot take a run-time loop bound with this numpy (fixed by Triton 3.9)")
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


def test_torch_serves_where_triton_is_not_installed():
    """As on macOS: everything imports, auto takes torch, and asking for Triton says what is wrong."""
    program = """
import sys
sys.modules["triton"] = None  # any import of it fails, and it cannot be found
import torch
from amft_kernels.linear_logprob import linear_logprob
from amft_kernels.linear_policy_loss import linear_policy_loss
hidden, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 1, 2, 6])
linear_logprob(hidden, weight, targets)
linear_policy_loss(hidden, weight, targets, nll_weight=torch.ones(4))
try:
    linear_logprob(hidden, weight, targets, backend="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "backend 'triton' cannot be used: triton is not installed", run.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: there are no wheels for macOS"
)
def test_why_triton_does_not_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_obstacle("cuda", torch.bfloat16) is None
    assert "float32" in triton_obstacle("cuda", torch.float64)
    assert "CUDA" in triton_obstacle("cpu", torch.float32)
    hidden = torch.randn(2, 3)
    assert choose_backend("auto", hidden) == "torch"
    for backend, message in (("triton", "needs a CUDA device"), ("cuda", "backend must be one of auto, triton, torch")):
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(hidden, hidden, torch.zeros(2).long(), nll_weight=torch.ones(2), backend=backend)

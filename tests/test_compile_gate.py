"""Every Triton kernel configuration compiles for GPUs that are not here, without spills and with 128-bit accesses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: no wheels for macOS"
    ),
    pytest.mark.timeout(900),
]


def run(arguments, tmp_path, **changes):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), **changes}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)


def test_every_configuration_compiles_and_fits(tmp_path):
    gate = run(["-m", "bench.compile_gate", "--json", str(tmp_path / "gate.json")], tmp_path)
    print(gate.stdout)
    assert gate.returncode == 0, gate.stdout[-3000:] + gate.stderr[-3000:]
    reports = json.loads((tmp_path / "gate.json").read_text())
    kernels = {report["case"]["kernel"] for report in reports}
    rows = {"policy_rows_kernel", "policy_parts_kernel", "logprob_rows_kernel", "slab_grad_kernel"}
    assert kernels == rows | {"fused_stats_kernel"}
    assert {report["case"]["architecture"] for report in reports} == {80, 90, 100}
    assert all(
        report["registers"] > 0 and report["load_bits"] >= 128 and not report["spill_bytes"] for report in reports
    )


def test_the_gate_sees_a_spill_and_narrow_loads(tmp_path):
    """32768 columns on 16 warps do not fit the registers of sm_90; an unaligned row cannot be read 128 bits at a time."""
    program = """
import bench.compile_gate as gate
wide = gate.Case("policy_rows_kernel", (("BLOCK", 32768), *gate.PLAIN), 16, 3, "bf16", "all", False, 90)
print(gate.compile_case(wide).faults)
gate._ALIGNED = ()
narrow = gate.Case("policy_rows_kernel", (("BLOCK", 1024), *gate.PLAIN), 4, 3, "bf16", "none", False, 90)
print(gate.compile_case(narrow).faults)
"""
    out = run(["-c", program], tmp_path, TRITON_DEFAULT_FP_FUSION="1")
    spill, narrow = out.stdout.strip().splitlines()
    assert "spills" in spill, out.stderr
    assert "loads" in narrow and "stores 32 bits at most" in narrow, out.stderr

"""The Triton kernel that rollouts attend with on a GPU: its numbers in the interpreter, its compiled form for GPUs not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: no wheels for macOS"
    ),
    pytest.mark.timeout(600),
]


def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_decode_attention.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # from the start: conftest.py's imports bring Triton in
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=580)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter cannot take a run-time loop bound with this numpy (fixed by Triton 3.9)")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


COMPILE = """
import triton
from amft_kernels.decode_attention import decode_attention_kernel as kernel, decode_config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.compile_gate import _resources
for architecture in (80, 90, 100):
    for group, size in ((1, 64), (6, 128), (7, 128)):
        config = decode_config(group, size)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        pointers = {"out_ptr": "*bf16", "query_ptr": "*bf16", "keys_ptr": "*bf16", "values_ptr": "*bf16",
                    "position_ptr": "*i64", "query_stride": "i32", "scale": "fp32", "capacity": "i32"}
        names = kernel.arg_names
        signature = pointers | {n: "constexpr" for n in config}
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers if n.endswith("_ptr")}
        source = ASTSource(fn=kernel, signature=signature, attrs=attrs,
                           constexprs={(names.index(n),): v for n, v in config.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        registers, spill = _resources(compiled.asm["cubin"])
        print(architecture, group, size, registers, spill, compiled.metadata.shared)
        assert registers <= 255 and spill == 0 and compiled.metadata.shared <= 160 * 1024
"""


def test_compiles_for_gpus_that_are_not_here(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 9

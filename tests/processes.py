"""Jobs of several processes, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(worker: str, *args: object, processes: int = 2) -> subprocess.Popen:
    """torchrun with so many processes of a file beside this one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
    ]
    command += [str(Path(__file__).parent / worker), *map(str, args)]
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    # With AMX the loss head rounds in bf16 where others do not, and a mixture's routers choose by jumps: bounds are for all.
    env.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(process: subprocess.Popen, seconds: float) -> str:
    """The output of a job that ends; one that does not is killed."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers
        raise

"""Programs of the policy's, run against a row's tests, each in a process of its own with limits.

The limits are the kernel's: processor time, memory, size of files, open files, no core. The process starts in a folder of its
own, with an empty environment and without installed packages, in a session that is ended as a whole. What is not bounded is the
network, and what the user may read and write: a run with this reward belongs into a container or on a machine without anything
of worth. Tests are a list of

    {"input": "1 2\\n", "output": "3"}   run with this input; what it prints is compared, but for spaces at ends of lines
    "assert add(1, 2) == 3"             Python, run after the program in a copy of its namespace

The second kind shares a process with the program. A program that ends it early, or prints what looks like a verdict, passes
nothing; one that makes `==` lie is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

FILE_BYTES = 1 << 20
OUTPUT_BYTES = 1 << 20
PATIENCE = 4.0
"""A program may take so many times its seconds on the clock, on a machine that is busy with other things."""


class Limits(NamedTuple):
    """Of one program: seconds of processor time, bytes of memory."""

    seconds: float
    memory: int


def judge(texts: Sequence[str], tests: Sequence[Any], limits: Limits) -> list[float]:
    """The share of each row's tests that the program in its answer passes; as many at once as there are cores.

    Raises ValueError for tests that are no list of texts or of input and output.
    """
    wanted = [_tests(t) for t in tests]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda pair: _share(program(pair[0]), pair[1], limits), zip(texts, wanted)))


def program(text: str) -> str:
    """The last fenced block of an answer, or the whole of it."""
    blocks = re.findall(r"```(?:python|py)?\s*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


def _tests(tests: Any) -> list[Any]:
    if isinstance(tests, str):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    tests = [tests] if isinstance(tests, str) else tests
    good = isinstance(tests, list) and tests
    if not good or not all(
        isinstance(t, str) or (isinstance(t, dict) and {"input", "output"} <= t.keys()) for t in tests
    ):
        raise ValueError(f"the column tests must be a list of Python texts or of {{input, output}}, got {tests!r:.80}")
    return tests


def _share(source: str, tests: list[Any], limits: Limits) -> float:
    asserted = [t for t in tests if isinstance(t, str)]
    passed = _passed_asserts(source, asserted, limits) if asserted else 0
    for test in tests:
        if isinstance(test, dict):
            said = _run(source, str(test["input"]), limits)
            passed += said is not None and _lines(said) == _lines(str(test["output"]))
    return passed / len(tests)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


# Reads the job, runs the program, then each test in the program's namespace. The verdict carries a word that the program was
# not told, on a descriptor of its own: prints do not reach it.
_RUNNER = """
import json, os, sys
word, source, tests = json.load(sys.stdin)
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdin = open(os.devnull)
names, passed = {"__name__": "__main__"}, 0
try:
    exec(compile(source, "answer", "exec"), names)
    for test in tests:
        try:
            exec(compile(test, "test", "exec"), dict(names))
            passed += 1
        except Exception:
            pass
except Exception:
    passed = 0
out.write(json.dumps([word, passed]))
out.flush()
os._exit(0)
"""


def _passed_asserts(source: str, tests: list[str], limits: Limits) -> int:
    word = secrets.token_hex(16)
    said = _run(_RUNNER, json.dumps([word, source, tests]), limits)
    try:
        got, passed = json.loads(said or "")
    except (ValueError, TypeError):
        return 0
    return passed if got == word and isinstance(passed, int) and 0 <= passed <= len(tests) else 0


def _run(source: str, given: str, limits: Limits) -> str | None:
    """What a program prints when it is given this input; None when it fails, takes too long or prints without end."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        path = os.path.join(folder, "answer.py")
        with open(path, "wb") as file:
            file.write(source.encode(errors="replace"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LIMITER, str(limits.memory), str(limits.seconds), path],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            start_new_session=True,
        )
        try:
            process.communicate(given.encode(errors="replace"), timeout=PATIENCE * limits.seconds + 5)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have started too
            process.wait()
        if process.returncode:
            return None
        out.seek(0)
        return out.read(OUTPUT_BYTES).decode(errors="replace")


# The limits are set by the new process itself, before it becomes the program: code between fork and exec would have to be safe
# beside threads.
_LIMITER = f"""
import math, os, resource, sys
memory, seconds = int(sys.argv[1]), float(sys.argv[2])
for kind, value in (
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_CPU, math.ceil(seconds)),
    (resource.RLIMIT_FSIZE, {FILE_BYTES}),
    (resource.RLIMIT_NOFILE, 32),
    (resource.RLIMIT_CORE, 0),
):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
os.execv(sys.executable, [sys.executable, "-I", "-S", sys.argv[3]])
"""

"""The process that compares answers: `python -m amft_fast.tasks.math.worker`, driven by pool.py through its pipes.

It reads one JSON line `[answer, gold, seconds]` and writes one JSON line, true or false. An item that takes more processor time
than `seconds` is false; time on the clock would make rewards depend on what else the machine does. An item that hangs where
Python's signals do not reach, in one big multiplication, is ended by the kernel, with the process, even if its parent is gone.
The address space is bounded too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable

MEMORY = 4 << 30


def _limit(kind: str, soft: int) -> None:
    try:
        import resource

        which = getattr(resource, kind)
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system; the parent's limit remains


class _TimeUp(BaseException):
    """Not an Exception: the libraries catch those."""


def _time_up(number: int, frame: object) -> None:
    raise _TimeUp


def serve(load: Callable[[], Callable[[str, str], bool | float]]) -> None:
    """Answers until its input ends. `load` makes what judges (answer, gold); it may take its time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGPROF, _time_up)
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _limit("RLIMIT_AS", MEMORY)
    judge = load()
    answers.write("ready\n")
    for line in sys.stdin:
        answer, gold, seconds = json.loads(line)
        _limit("RLIMIT_CPU", int(time.process_time() + seconds) + 1)
        verdict: bool | float = False
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            verdict = judge(answer, gold)
        except (_TimeUp, Exception):
            verdict = False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(verdict) + "\n")


def _load() -> Callable[[str, str], bool]:
    from amft_fast.tasks.math.compare import same

    same("x+1", "1+x")  # what is loaded at first use is not on the first item's time
    return lambda answer, gold: bool(same(answer, gold))


if __name__ == "__main__":
    serve(_load)

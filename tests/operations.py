"""Work counted instead of timed: it is the same on every machine, however busy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def lines_run(function: Callable[[], Any], within: str = "amft_fast") -> int:
    """Lines of code that a call executes in modules of the package `within`; what C does in one line counts as one."""
    count = 0

    def line(frame, event, _):
        nonlocal count
        count += event == "line"
        return line

    def enter(frame, event, _):
        return line if frame.f_globals.get("__name__", "").partition(".")[0] == within else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        function()
    finally:
        sys.settrace(before)
    return count

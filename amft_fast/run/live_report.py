"""report.html while the run goes: written anew at each evaluation and checkpoint; the page then loads itself anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amft_fast.report.page import write_report

SHARE = 0.02  # of a run's time that goes into its page: that of a run of many thousand steps takes a second


class LiveReport:
    """A listener (run/listeners.py). A page that cannot be written is said once and ends nothing.

    A finished run's page is written where its summary is (run/launch.py); that of one which was stopped, here: none of these
    loads itself anew.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.failed = False
        self.not_before = 0.0

    def on_eval(self, record: dict[str, Any]) -> None:
        self._write(live=True)

    def on_checkpoint(self, path: Path) -> None:
        self._write(live=True)

    def on_end(self, folder: Path, finished: bool) -> None:
        if not finished:
            self.not_before = 0.0
            self._write(live=False)

    def _write(self, live: bool) -> None:
        begin = time.monotonic()
        if self.failed or begin < self.not_before:
            return
        try:
            write_report(self.folder, live)
        except Exception as e:
            self.failed = True
            self.say(f"report.html is not written while the run goes: {e}")
        seconds = time.monotonic() - begin
        self.not_before = begin + seconds / SHARE

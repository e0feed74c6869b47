"""The signals that end a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from amft_fast.engine.world import launched_rank, launched_size

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopSignal:
    """Remembers a first SIGINT, SIGTERM or SIGHUP, for the loop to save and stop; a second one ends the process at once.

    A context manager: on leaving, the handlers that it found are back. Python takes signals in the main thread alone, so
    elsewhere nothing is handled here; `request` stops a run from any thread.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so, as nohup wants it; but SIGINT, which a shell's background ignores, asks for an end.
            wanted = (n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def __call__(self) -> bool:
        return self.received is not None

    def request(self, number: int = signal.SIGINT) -> None:
        """As if the signal had come: the run saves and stops at the next place where it can."""
        if self.received is None:
            self.received, self.at = number, time.monotonic()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # A launcher passes on the signal that the terminal has sent to all processes already.
            if launched_size() == 1 or time.monotonic() - self.at > 2:
                os._exit(128 + number)
            return
        self.request(number)
        if launched_rank() == 0:
            print(f"\n{signal.Signals(number).name}: saving and stopping (once more: stop at once)", flush=True)

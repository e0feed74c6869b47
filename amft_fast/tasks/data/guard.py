"""A user's function in bounded time."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
WAKE, BUSY = signal.SIGUSR2, signal.SIGPROF


class Hang(BaseException):
    """Not an Exception: a function that catches those would go on hanging."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns. Raises Hang when it does not return in `seconds`.

    In the main thread a signal breaks it off, so that it may use signals too (math-verify's own limits do); elsewhere, where
    Python takes none, it is left behind in a thread of its own, which ends with the process.
    """
    if threading.current_thread() is threading.main_thread():
        with _broken_off(seconds):
            return work()
    return _left_behind(seconds, work)


@contextlib.contextmanager
def _broken_off(seconds: float) -> Iterator[None]:
    """Two clocks: a thread, for what waits; and the processor time, for what computes without ever letting a thread run."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    over = threading.Event()
    main = threading.main_thread().ident

    def watch() -> None:
        while not over.wait(seconds):  # again and again: what caught it once may go on
            signal.pthread_kill(main, WAKE)

    before = {number: signal.signal(number, stop) for number in (WAKE, BUSY)}
    timer = signal.setitimer(signal.ITIMER_PROF, 2 * seconds)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_PROF, *timer)
        while thread.is_alive():
            with contextlib.suppress(Hang):  # one that was on its way; none may come once the handlers are gone
                thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, run in a thread of its own: where this one has an event loop already, as in a notebook."""
    return _left_behind(None, work)


def _left_behind(seconds: float | None, work: Callable[[], T]) -> T:
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except BaseException as e:
            result.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise Hang
    value, error = result[0]
    if error is not None:
        raise error
    return value

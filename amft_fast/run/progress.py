"""Progress on the terminal: of the steps, and of every other phase that takes longer than a moment, each with its ETA.

On a terminal a bar, elsewhere plain lines. A phase says nothing in its first `QUIET` seconds: what is over by then needs no
progress.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

TELLING = 0.1  # share of a phase from which its pace is told
LONG_PHASE = 300.0  # seconds from which it is told anyway
QUIET = 2.0  # seconds
LONG = 30.0  # seconds, of a step: what is longer says how far it is
PAUSES = (8.0, 20.0, 30.0)  # between a phase's plain lines: the first ones, then the last of these
RECENT = 50  # steps that the pace is taken over
ASIDE = 20.0  # steps that what has been done aside in a run's first steps is spread over: it gets rarer


def clock_text(seconds: float) -> str:
    """0m07s, 51m00s, 2h07m."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    return f"{minutes}m{s:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Pace:
    """What is left of a run in seconds: steps at the pace of recent ones, evaluations at the pace of theirs.

    Both are counted apart, in their own units: the run's clock, and answers. Steps that imitate alone draw no rollouts and tell
    nothing of those that do: each kind has its pace, and what is left is expected to be of the present one. So within the
    warm-up there is an ETA of the warm-up alone. What some steps do beside (a look at held-out prompts) is taken over the whole
    run.
    """

    def __init__(self, clock: float) -> None:
        self.clock = clock  # negative in the warm-up
        # By kind, whether they imitate alone: (progress of the clock, seconds)
        self.steps: dict[bool, deque[tuple[float, float]]] = {k: deque(maxlen=RECENT) for k in (False, True)}
        self.imitates = False  # the kind of the last one
        self.moved = self.aside = 0.0  # since the warm-up: of the clock, and seconds
        self.answers = self.answer_seconds = 0.0

    def step(self, clock: float, moved: float, seconds: float, aside: float = 0.0, imitates: bool = False) -> None:
        """A step has taken the run's clock to here, by so much; `aside`: of its seconds, on looks at held-out prompts."""
        if self.clock <= 0 < clock:  # the first one after the warm-up
            self.moved = self.aside = 0.0
            for recent in self.steps.values():
                recent.clear()
        self.steps[imitates].append((moved, seconds - aside))
        self.moved, self.aside = self.moved + moved, self.aside + aside
        self.clock, self.imitates = clock, imitates

    def evaluation(self, answers: int, seconds: float) -> None:
        """An evaluation drew this many answers."""
        self.answers += answers
        self.answer_seconds += seconds

    def left(self, end: float, answers: int) -> float | None:
        """Seconds until the clock shows `end` and so many more answers have been drawn; None before the first step."""
        recent = self.steps[self.imitates]
        moved = sum(d for d, _ in recent)
        if moved <= 0:
            return None
        pace = sum(s for _, s in recent) / moved + self.aside / max(self.moved, ASIDE)
        return pace * max(end - self.clock, 0.0) + (
            self.answer_seconds / self.answers * answers if self.answers else 0.0
        )


class Phase:
    """One phase while it goes on. `total` is what there is to do, in `unit`s; None: not known."""

    def __init__(
        self, what: str, total: float | None, unit: str, bars: bool, say: Callable[[str], None], quiet: float = QUIET
    ) -> None:
        self.what, self.total, self.unit, self.bars, self.say, self.quiet = what, total, unit, bars, say, quiet
        self.done = 0.0
        self.begin = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name=f"progress of {what}", daemon=True)

    def advance(self, by: float = 1) -> None:
        """So much more is done."""
        self.done += by

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def eta(self) -> float | None:
        """Seconds left at the pace so far; None where the total is not known, and while nothing is done or, in the first
        minutes, so little that it tells no pace: of answers drawn side by side the first to end says nothing of the others.
        """
        if not self.total or not self.done:
            return None
        if self.done < TELLING * self.total and self.seconds < LONG_PHASE:
            return None
        return self.seconds * max(self.total / self.done - 1, 0.0)

    def text(self) -> str:
        """`evaluating: 120/400 answers  eta 1m20s`."""
        counted = f": {self.done:.0f}/{self.total:.0f} {self.unit}" if self.total else ""
        if self.done and not self.total:
            counted = f": {self.done:.0f} {self.unit}"
        eta = self.eta()
        return f"{self.what}{counted}  " + (
            f"{clock_text(self.seconds)} so far" if eta is None else f"eta {clock_text(eta)}"
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _show(self) -> None:
        """In a thread of its own: a phase that is busy elsewhere (in a library, on a GPU) is shown too."""
        if self._over.wait(self.quiet):
            return
        if self.bars:
            self._show_bar()
            return
        pauses = [*PAUSES]
        while True:
            self.say(self.text())
            if self._over.wait(pauses.pop(0) if len(pauses) > 1 else pauses[0]):
                return

    def _show_bar(self) -> None:
        style = "{desc}: {percentage:3.0f}%|{bar}| {postfix}" if self.total else "{desc}  {postfix}"
        with tqdm(total=self.total, desc=self.what, bar_format=style, leave=False, dynamic_ncols=True) as bar:
            while True:
                bar.n = min(self.done, self.total) if self.total else self.done
                bar.set_postfix_str(self.text().removeprefix(self.what).lstrip(": "))
                if self._over.wait(0.5):
                    return


def on_terminal(enabled: bool | None) -> bool:
    """Whether to draw bars: as the setting `log.progress` says, else where stderr is a terminal."""
    return sys.stderr.isatty() if enabled is None else enabled


@contextmanager
def phase(
    what: str,
    total: float | None = None,
    unit: str = "",
    *,
    shown: bool = True,
    bars: bool | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
    quiet: float = QUIET,
) -> Iterator[Phase]:
    """Shows the progress of what is done within. `shown`: false on ranks other than 0. `quiet`: seconds without a word."""
    current = Phase(what, total, unit, on_terminal(bars), say, quiet)
    if not shown:
        yield current
        return
    current.start()
    try:
        yield current
    finally:
        current.stop()


@contextmanager
def weights_loaded(into: Phase) -> Iterator[None]:
    """transformers' bar over the weights that it loads becomes the progress of a phase."""
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights" or not args:
            return factory(*args, **kwargs)
        return _counted(args[0], into)

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _counted(items: Any, into: Phase) -> Iterator[Any]:
    items = list(items)
    into.total, into.unit, into.done = len(items), "tensors", 0
    for item in items:
        yield item
        into.advance()


class Progress:
    """The steps of a run: a bar with ETA on a terminal, a plain line every `every` steps elsewhere.

    `total` and `done` count steps, the warm-up's included; `warmup` of them come first.
    """

    def __init__(self, total: int, start: int, every: int, enabled: bool | None, warmup: int = 0) -> None:
        self.total, self.every, self.warmup, self.enabled = total, every, warmup, enabled
        self.pace = Pace(start - warmup)
        self.said = -1
        self.bar: tqdm | None = None
        if on_terminal(enabled):
            style = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps  {postfix}"
            self.bar = tqdm(total=total, initial=start, bar_format=style, dynamic_ncols=True)

    def step(
        self,
        clock: float,
        moved: float,
        seconds: float,
        answers_left: int,
        figures: dict[str, float | None],
        aside: float = 0.0,
    ) -> None:
        """A step that took `seconds`, `aside` of them on looks at held-out prompts, has moved the run's clock by `moved` to
        `clock`, and evaluations will draw `answers_left` answers more; `figures` are shown beside the progress."""
        self.pace.step(clock, moved, seconds, aside, figures.get("mu") == 1)
        done = self.warmup + int(clock)
        text = " ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        text = f"{text}  {self.eta(answers_left)}".strip()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif done // self.every > self.said or done == self.total:
            self.said = done // self.every
            self.say(f"step {done}/{self.total}  {text}")

    def eta(self, answers_left: int) -> str:
        """What is left, in words."""
        in_warmup = self.pace.clock <= 0
        left = self.pace.left(0 if in_warmup else self.total - self.warmup, 0 if in_warmup else answers_left)
        if left is None:
            return ""
        if in_warmup:
            return f"warm-up ends in {clock_text(left)}"
        return f"eta {clock_text(left)}" + (" and evaluations" if answers_left and not self.pace.answers else "")

    def evaluated(self, answers: int, seconds: float) -> None:
        """An evaluation of so many answers took so long: those to come are expected to take as long an answer."""
        self.pace.evaluation(answers, seconds)

    @contextmanager
    def phase(self, what: str, total: float | None = None, unit: str = "", quiet: float = QUIET) -> Iterator[Phase]:
        """A phase between the steps, or a step that is longer than `quiet` seconds."""
        with phase(what, total, unit, bars=self.bar is not None, say=self.say, quiet=quiet) as current:
            yield current

    def say(self, text: str) -> None:
        """A line of its own, without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

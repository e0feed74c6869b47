"""`amft-fast watch RUN`: a run on the terminal, beside it or after it; elsewhere a line for each new row."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from amft_fast.report.page import shown_text
from amft_fast.report.reader import finite, splits_of
from amft_fast.run.monitor import Monitor, trend
from amft_fast.run.progress import clock_text

ROWS = (("success", ".1%"), ("reward", ".3g"), ("entropy", ".3g"), ("mu", ".3g"), ("tokens_per_s", ",.0f"))
NAMES = {"mu": "μ", "tokens_per_s": "tokens/s"}
COLORS = {"running": "green", "finished": "cyan", "stopped": "yellow"}


def watch(folder: Path, every: float) -> int:
    """Shows the run in `folder`, looking every so many seconds, until it has ended, or until q or Ctrl-C; returns 0.

    Raises UserError when there is no run.
    """
    monitor, console = Monitor(folder), Console(highlight=False)
    try:
        with interrupts() as interrupted:
            if console.is_terminal and not console.is_dumb_terminal:
                _on_terminal(monitor, console, every, interrupted)
            else:
                _in_lines(monitor, every, interrupted)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # who read it has gone; nothing is left for Python to flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Gives what Ctrl-C sets, beside raising KeyboardInterrupt: that is lost where it comes in a place that ignores exceptions,
    as when an object is thrown away."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def interrupt(*_) -> None:
        told.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield told
    finally:
        signal.signal(signal.SIGINT, before)


def _in_lines(monitor: Monitor, every: float, interrupted: threading.Event) -> None:
    while not interrupted.is_set():
        for line in monitor.lines(monitor.read()):
            print(line, flush=True)
        if not monitor.running:
            print(f"{monitor.state} after {monitor.done} steps", flush=True)
            return
        time.sleep(every)


def _on_terminal(monitor: Monitor, console: Console, every: float, interrupted: threading.Event) -> None:
    monitor.read()
    if monitor.running:
        with keys() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
            while monitor.running and not interrupted.is_set():
                live.update(screen(monitor), refresh=True)
                if "q" in wait(every).lower():
                    return
                monitor.read()
    console.print(Group(*parts(monitor).values()))


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits so many seconds for keys, and returns those that were pressed, q at the end of the input.

    They are not shown, and need no Enter."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)

    def wait(seconds: float) -> str:
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        return os.read(fd, 1024).decode(errors="replace") or "q"

    try:
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def screen(monitor: Monitor) -> Layout:
    """The whole terminal."""
    shown = parts(monitor)
    middle = Layout(name="middle", size=len(ROWS) + 4)
    middle.split_row(Layout(shown["figures"], ratio=8), Layout(shown["news"], ratio=5))
    whole = Layout()
    whole.split_column(Layout(shown["head"], size=4), middle, Layout(shown["completion"]))
    return whole


def parts(monitor: Monitor) -> dict[str, RenderableType]:
    """The panels. Text of the run is text, never markup."""
    return {
        "head": _head(monitor),
        "figures": _figures(monitor),
        "news": _news(monitor),
        "completion": _completion(monitor),
    }


def _head(m: Monitor) -> Panel:
    of = m.record
    words = (
        f"{of.setting('train.method', '?')} on {of.setting('task.name', '?')} · step {m.done} · {clock_text(m.seconds)}"
    )
    eta = m.eta()
    line = Text.assemble((m.state, f"bold {COLORS[m.state]}"), f" · {words}", f" · {eta}" if eta else "")
    keys = Text(" q leaves" if m.running else "", style="dim")
    grid = Table.grid(expand=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(line, keys)
    title = Text(m.folder.resolve().name, style="bold")
    return Panel(Group(grid, ProgressBar(total=1.0, completed=m.share)), title=title, title_align="left")


def _figures(m: Monitor) -> Panel:
    """Each figure's newest value, its mean over the newest 50 steps, and its course."""
    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("")
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("lately", no_wrap=True, ratio=1)
    for name, style in ROWS:
        now, mean = m.record.last(name), m.mean(name)
        values = [y for y in m.record.series(name)[1] if y is not None]
        shown = ("–" if y is None else format(y, style) for y in (now, mean))
        target = m.record.last("entropy_target") if name == "entropy" else None
        label = NAMES.get(name, name) + ("" if target is None else f" (H* {target:.3g})")
        table.add_row(label, *shown, Text(trend(values, 16), style="cyan"))
    return Panel(Group(table, _mu(m)), title="figures", title_align="left")


def _mu(m: Monitor) -> Text:
    """Why μ is where it is: the last look at held-out prompts, or the two parts of its last move."""
    alive, reward = m.record.last("controller/alive"), m.record.last("controller/reward")
    if alive is not None and reward is not None:
        rise = m.record.last("controller/rise_t")
        told = f"held-out reward {reward:.3g}, {alive:.0%} of the prompts alive"
        return Text(told + ("" if rise is None else f", rise {rise:+.1f} standard errors"))
    meta, entropy = m.record.last("controller/mu_meta"), m.record.last("controller/mu_entropy")
    if meta is None or entropy is None:
        return Text("μ follows a schedule" if m.record.done else "", style="dim")
    of = "μ's logit" if m.record.setting("controller.space") == "logit" else "μ"
    return Text(f"{of} moved by utility {meta + 0.0:+.3g}, entropy {entropy + 0.0:+.3g}")


def _news(m: Monitor) -> Panel:
    """The last evaluation, and alarms."""
    lines = []
    if m.evaluation is not None:
        lines.append(Text(f"evaluation at step {m.evaluation['at']}, greedy and sampled", style="dim"))
        for split, figures in splits_of(m.evaluation).items():
            each = (finite(figures.get(name)) for name in ("greedy", "sampled"))
            lines.append(Text(f"{split}  " + "  ".join("–" if y is None else f"{y:.1%}" for y in each)))
    # The newest first: a small terminal shows the upper part.
    lines += [
        Text(f"alarm at step {step}: {shown_text(text, 1000)}", style="bold red") for step, text in m.alarms[::-1]
    ]
    return Panel(
        Group(*lines) if lines else Text("no evaluation and no alarm yet", style="dim"),
        title_align="left",
        title="news",
    )


def _completion(m: Monitor) -> Panel:
    """The last completion that the run kept."""
    s = m.sample
    if s is None:
        return Panel(Text("none kept yet (log.samples_every)", style="dim"), title="completion", title_align="left")
    right = s.get("success") is True
    reward = finite(s.get("reward"))
    mark = "✓ correct" if right else "✗ wrong"
    words = f"{mark} · reward {'–' if reward is None else format(reward, '.3g')} · step {s['step']}"
    lines = [Text(words, style="green" if right else "red")]
    lines.append(Text(shown_text(s.get("prompt"), 600, keep_end=True), style="dim"))
    lines.append(Text(shown_text(s.get("completion"), 3000) or "(empty)"))
    return Panel(Group(*lines), title="completion", title_align="left")

"""`amft-fast watch`: what it reads of a run's folder, on a terminal and elsewhere, beside the run and after it."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
from holders import hold
from pages import lines, result, rl_step
from runs import wait_until

from amft_fast import cli
from amft_fast.config import Config
from amft_fast.config_file import to_toml
from amft_fast.errors import UserError
from amft_fast.run import lock
from amft_fast.run.monitor import Monitor, Tail, trend

LEARNED = {"train": {"method": "amft", "steps": 9, "warmup_steps": 1}, "controller": {"space": "logit"}}


def step(n, **more):
    return rl_step(n) | {"tokens_per_s": 1234.5, "controller/mu_meta": 0.0125, "controller/mu_entropy": -0.25} | more


@pytest.fixture
def going(run_folder):
    """A run that goes on: 4 of 10 steps, held by another process, which is given with the folder."""
    rows = [
        step(0, phase="warmup", mu=1.0),
        step(1),
        step(2, alarms={"truncated": "answers are cut [bold]off[/]"}),
        step(3),
    ]
    sample = {"step": 3, "prompt": "3 5 8", "completion": "3 * [red]8[/]\x1b[2J", "reward": 1.0, "success": True}
    run = run_folder(
        config=LEARNED,
        **{"metrics.jsonl": lines(rows), "samples.jsonl": lines([sample]), "summary.json": None},
    )
    (run / "evals.jsonl").write_text(lines([{"step": -1, "at": 0, "val": result(0.1), "test": result(0.2)}]))
    process, _ = hold(run)
    yield run, process
    process.kill()
    process.wait()
    process.stdout.close()


def add(run, name, *rows):
    with (run / name).open("a") as f:
        f.write(lines(list(rows)))


# ---------------------------------------------------------------------------------------------------- what is read, and how


def test_a_file_is_read_on_as_it_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path, "step")
    assert tail.read() == ([], False)
    path.write_text('{"step": 0}\nnot json\n{"step": 1}\n{"st')
    assert tail.read() == ([{"step": 0}, {"step": 1}], False)
    assert tail.read() == ([], False)
    with path.open("a") as f:
        f.write('ep": 2}\n')
    assert tail.read() == ([{"step": 2}], False)
    # A resumed run puts another file in its place; then lines are dropped from it.
    (tmp_path / "part").write_text('{"step": 0}\n{"step": 7}\n')
    os.replace(tmp_path / "part", path)
    assert tail.read() == ([{"step": 0}, {"step": 7}], True)
    path.write_text('{"step": 0}\n')
    assert tail.read() == ([{"step": 0}], True)


def test_whether_a_run_goes_on_is_what_its_lock_says(tmp_path, run_folder, monkeypatch):
    run = run_folder()
    assert lock.is_held(run) is False and lock.is_held(tmp_path / "nowhere") is False
    process, _ = hold(run)
    assert lock.is_held(run) is True
    process.kill()
    process.wait()
    assert (run / lock.FILE).read_text() and lock.is_held(run) is False, "a killed one left its name"
    (run / lock.FILE).write_text("process 1 on another-machine\n")
    assert lock.is_held(run) is None
    monitor = Monitor(run)
    monitor.read()
    assert monitor.state == "finished"
    (run / "summary.json").unlink()
    monitor.read()
    assert monitor.state == "running", "where the lock tells nothing, the summary does"
    process.stdout.close()


def test_a_run_in_words(going):
    run, process = going
    monitor = Monitor(run)
    said = list(monitor.lines(monitor.read()))
    assert said[:3] == [
        "eval at 0: val 10.0%/10.0%  test 20.0%/20.0%",
        "step 1/10  success 0.1 reward 0.1 entropy 1.5 mu 1 tokens_per_s 1.23e+03",
        "step 2/10  success 0.101 reward 0.101 entropy 1.5 mu 0.5 tokens_per_s 1.23e+03",
    ]
    assert said[4:] == [
        "alarm at step 2: answers are cut [bold]off[/]",
        "step 4/10  success 0.103 reward 0.103 entropy 1.5 mu 0.5 tokens_per_s 1.23e+03  eta 0m06s",
    ]
    assert monitor.state == "running" and monitor.share == pytest.approx(0.4)
    assert list(monitor.lines(monitor.read())) == []
    add(run, "evals.jsonl", {"step": 3, "at": 4, "val": result(0.25)})
    add(run, "metrics.jsonl", step(4))
    assert [line.split("  ")[0] for line in monitor.lines(monitor.read())] == [
        "eval at 4: val 25.0%/25.0%",
        "step 5/10",
    ]
    process.kill()
    process.wait()
    monitor.read()
    assert monitor.state == "stopped" and monitor.eta() == "" and monitor.evaluation["at"] == 4
    # Resumed from step 2 for longer: what is there no more is forgotten.
    config = {"train": {"method": "amft", "steps": 19, "warmup_steps": 1}}
    (run / "config.toml").write_text(to_toml(Config.model_validate(config)))
    (run / "part").write_text(lines([step(0), step(1)]))
    os.replace(run / "part", run / "metrics.jsonl")
    assert [row["step"] for kind, row in monitor.read() if kind == "step"] == [0, 1]
    assert monitor.done == "2/20" and not monitor.alarms


def test_the_time_left_counts_evaluations_and_follows_a_budget_of_tokens(going):
    run, _ = going
    rows = [step(0, phase="warmup", **{"time/eval": 30.0}), *(step(i, **{"time/checkpoint": 1.0}) for i in range(1, 4))]
    (run / "metrics.jsonl").write_text(lines(rows))
    monitor = Monitor(run)
    monitor.read()
    assert monitor.eta() == "eta 0m42s", "6 steps of 2 s, and an evaluation of everything, as at the start, of 30 s"
    # 1,000 tokens of warm-up and 3,000 of 9,000 since.
    config = {"train": {"method": "amft", "steps": 9, "warmup_steps": 1, "token_budget": 10_000}}
    (run / "config.toml").write_text(to_toml(Config.model_validate(config)))
    monitor = Monitor(run)
    monitor.read()
    assert monitor.eta() == "eta 0m42s" and monitor.done == "4" and monitor.share == pytest.approx(0.4)
    (run / "metrics.jsonl").write_text(lines(rows[:1]))
    monitor.read()
    assert monitor.eta() == "warm-up ends in 0m00s"


def test_a_trend_is_a_row_of_blocks():
    assert trend([], 8) == "" and trend([2.0] * 3, 8) == "▄▄▄"
    assert trend([float(i) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert trend([0.0, 0.0, 1.0, 1.0], 2) == "▁█"


def test_mistakes_are_user_errors(tmp_path, capsys):
    with pytest.raises(UserError, match="no run folder"):
        Monitor(tmp_path / "gone")
    with pytest.raises(UserError, match="is not the folder of a run"):
        Monitor(tmp_path)
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert cli.main(["watch", str(tmp_path), "--every", "0"]) == 2
    assert "--every must be at least 0.05, got 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ without a terminal


def start(run, **given):
    command = [sys.executable, "-m", "amft_fast", "watch", str(run), "--every", "0.1"]
    return subprocess.Popen(command, **given)


def test_without_a_terminal_a_line_for_each_row_until_the_run_has_ended(going):
    run, process = going
    with start(run, stdout=subprocess.PIPE, text=True) as watch:
        said = [watch.stdout.readline() for _ in range(6)]
        assert said[-1].startswith("step 4/10")
        add(run, "metrics.jsonl", step(4))
        assert watch.stdout.readline().startswith("step 5/10")
        add(run, "metrics.jsonl", step(5))
        process.kill()  # the last row came before the end
        rest = watch.stdout.read().splitlines()
        assert rest[0].startswith("step 6/10") and rest[1:] == ["stopped after 6/10 steps"]
        assert watch.wait(60) == 0


def test_after_a_run_it_says_all_and_ends(run_folder, capsys):
    assert cli.main(["watch", str(run_folder())]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 + 3 + 1 and said[-1] == "finished after 4/4 steps"


def test_who_reads_only_the_first_line_is_no_error(going):
    run, _ = going
    add(run, "metrics.jsonl", *(step(i) for i in range(4, 2000)))
    with start(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        watch.stdout.readline()
        watch.stdout.close()
        assert watch.wait(60) == 0 and watch.stderr.read() == ""


# ------------------------------------------------------------------------------------------------------------ on a terminal


class Terminal:
    """A pseudo-terminal with `watch` on it."""

    def __init__(self, run):
        self.end, theirs = pty.openpty()
        termios.tcsetwinsize(self.end, (40, 110))
        self.before = termios.tcgetattr(theirs)
        env = os.environ | {"TERM": "xterm-256color"}
        given = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": env, "start_new_session": True}
        self.process, self.theirs, self.got = start(run, **given), theirs, ""

    def until(self, text):
        """Reads until a text has been drawn."""
        end = time.monotonic() + 60
        while text not in self.got:
            if time.monotonic() > end:
                raise TimeoutError(f"{text!r} is not in {self.got[-2000:]!r}")
            if select.select([self.end], [], [], 0.1)[0]:
                self.got += os.read(self.end, 1 << 16).decode(errors="replace")

    def leave(self):
        """Waits for the end; the terminal must be as it was, and show the ordinary screen."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError
            if select.select([self.end], [], [], 0.1)[0]:
                self.got += os.read(self.end, 1 << 16).decode(errors="replace")
        while select.select([self.end], [], [], 0.1)[0]:
            self.got += os.read(self.end, 1 << 16).decode(errors="replace")
        assert termios.tcgetattr(self.theirs) == self.before
        assert self.got.count("\x1b[?1049h") == self.got.count("\x1b[?1049l")
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.end)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    opened = []

    def open_one(run):
        opened.append(Terminal(run))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.mark.parametrize("way", ["q", "Ctrl-C", "the end of the run"])
def test_it_leaves_and_gives_the_terminal_back(going, terminal, way):
    run, holder = going
    shown = terminal(run)
    shown.until("3 * [red]8[/]")
    assert shown.process.poll() is None and "\x1b[?1049h" in shown.got
    if way == "q":
        os.write(shown.end, b"q")
    elif way == "Ctrl-C":
        shown.process.send_signal(signal.SIGINT)
    else:
        holder.kill()
    assert shown.leave() == 0
    rest = shown.got.rpartition("\x1b[?1049l")[2]
    # What it came to stays on the ordinary screen once the run has ended.
    assert ("stopped" in rest) == (way == "the end of the run")
    assert lock.is_held(run) is (way != "the end of the run"), "the run itself is left alone"


def test_what_a_model_writes_moves_no_cursor(going, terminal):
    shown = terminal(going[0])
    shown.until("3 * [red]8[/]")
    assert "3 * [red]8[/]\ufffd[2J" in shown.got
    os.write(shown.end, b"q")
    assert shown.leave() == 0


def test_after_a_run_its_last_state_is_printed(run_folder, terminal):
    shown = terminal(run_folder())
    assert shown.leave() == 0
    assert "\x1b[?1049h" not in shown.got and "finished" in shown.got and "40.0%" in shown.got


def missing(text, parts):
    return [part for part in parts if part not in text]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here")
def test_the_screen_in_tmux(going, tmp_path):
    run, holder = going
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]
    command = f"{sys.executable} -m amft_fast watch {run} --every 0.1; echo left; cat"
    # Without what says how large the terminal is that the tests run in; named, since readline, which pytest loads, puts the two
    # into what is inherited unnamed.
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    subprocess.run([*tmux, "new-session", "-d", "-x", "100", "-y", "36", command], check=True, env=env)

    def screen():
        done = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True)
        return re.sub(r"[ ─]+", " ", done.stdout)

    try:
        # All at once: what is captured may be half of a redraw.
        parts = (
            "running · amft on general_points · step 4/10",
            "0m06s q leaves",
            "success 10.3% 10.2% ▁▃▆█",
            "reward 0.103 0.102",
            "entropy (H* 1.6) 1.5 1.5 █▆▃▁",
            "μ 0.5 0.625 █▁▁▁",
            "tokens/s 1,234 1,234",
            "μ's logit moved by utility +0.0125, entropy -0.25",
            "evaluation at step 0",
            "val 10.0% 10.0%",
            "alarm at step 2: answers are cut",
            "✓ correct · reward 1 · step 3",
            "3 5 8",
            "3 * [red]8[/]",
        )
        wait_until(lambda: not missing(screen(), parts), holder)
        assert len(screen().splitlines()) == 36
        add(run, "metrics.jsonl", step(4, success=1.0))
        wait_until(lambda: "step 5/10" in screen() and "success 100.0%" in screen(), holder)
        subprocess.run([*tmux, "resize-window", "-x", "60", "-y", "24"], check=True)
        wait_until(lambda: "running" in screen() and max(map(len, screen().splitlines())) <= 60, holder)
        subprocess.run([*tmux, "send-keys", "q"], check=True)
        wait_until(lambda: "left" in screen(), holder)
        assert "completion" not in screen()
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True)

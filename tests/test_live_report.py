"""report.html while the run goes: it loads itself anew, keeps the reader's place, and its last version does neither."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from fakes import CopyTask
from pages import Page
from runs import cfg_for

from amft_fast.errors import UserError
from amft_fast.report import page, templates
from amft_fast.run import launch, live_report
from amft_fast.run.live_report import LiveReport

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def is_live(folder):
    """Whether the page in `folder` loads itself anew, by script or, without, by its head; both or neither."""
    text = (folder / "report.html").read_text()
    tags = Page(text).tags
    assert tags.count("script") == tags.count("noscript") == text.count('http-equiv="refresh"') <= 1
    return "script" in tags


def test_the_page_of_a_run_that_goes_on_loads_itself_anew(run_folder):
    run = run_folder(config={"train": {"method": "fixed", "steps": 8, "warmup_steps": 1}}, **{"summary.json": None})
    live = LiveReport(run, pytest.fail)
    live.on_eval({})
    assert is_live(run) and not (run / "report.png").exists()
    text = (run / "report.html").read_text()
    assert "This run goes on: 4 of 9 steps are done" in Page(text).words and "This run is not" not in Page(text).words
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\">" in text, "this script may run, and no other"
    live.on_end(run, False)
    assert not is_live(run) and (run / "report.png").exists()
    assert "script-src" not in (run / "report.html").read_text()


def test_a_run_keeps_its_page_and_leaves_one_that_rests(tmp_path, checkpoint_folder, monkeypatch):
    monkeypatch.setattr(live_report, "SHARE", float("inf"))
    seen = []

    class Look:
        def on_eval(self, record):
            seen.append((record["at"], is_live(tmp_path / "run")))

        def on_checkpoint(self, path):
            seen.append((path.name, is_live(tmp_path / "run")))

    cfg = cfg_for(
        tmp_path / "run",
        checkpoint_folder,
        "--checkpoint.keep_best",
        "false",
        "--checkpoint.background",
        "false",
        "--train.steps",
        "2",
    )
    assert launch.train(cfg, False, CopyTask(), [Look()]) == 0
    assert seen == [(0, True), (2, True), ("step-000002", True), (4, True), ("step-000004", True)]
    assert not is_live(tmp_path / "run")


@pytest.mark.parametrize("error", [UserError("the report cannot be written"), KeyError("x")])
def test_a_page_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, error):
    def fail(folder, live):
        raise error

    said = []
    monkeypatch.setattr(live_report, "write_report", fail)
    live = LiveReport(tmp_path, said.append)
    for _ in range(3):
        live.on_eval({})
    live.on_end(tmp_path, False)
    assert said == [f"report.html is not written while the run goes: {error}"]


def test_writing_the_page_takes_a_small_share_of_a_run(tmp_path, monkeypatch):
    now, written = [0.0], []

    def write(folder, live):
        written.append((now[0], live))
        now[0] += 2.0

    monkeypatch.setattr(live_report, "write_report", write)
    monkeypatch.setattr(live_report.time, "monotonic", lambda: now[0])
    live = LiveReport(tmp_path, pytest.fail)
    for _ in range(30):
        live.on_checkpoint(tmp_path)
        now[0] += 10.0
    live.on_end(tmp_path, False)
    assert written == [(0.0, True), (102.0, True), (204.0, True), (306.0, False)]


# ------------------------------------------------------------------------------------------------------------ in a browser


# The browser reads what it is asked from 3 and answers on 4.
PIPES = """
import fcntl, os, sys
for fd, own in enumerate([fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]], 3):
    os.dup2(own, fd)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium with one page, spoken to through pipes (the DevTools protocol)."""

    def __init__(self, url):
        ours_in, theirs_out = os.pipe()
        theirs_in, self.to = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PIPES, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.messages, self.session, self.count = os.fdopen(ours_in, "rb"), None, 0
        target = self.ask("Target.createTarget", url=url)["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = b""
            while not answer.endswith(b"\0"):
                piece = self.messages.read(1)
                assert piece, "the browser has ended"
                answer += piece
            answer = json.loads(answer[:-1])
            if answer.get("id") == self.count:
                return answer.get("result")

    def value(self, expression):
        """What an expression comes to on the page; None while it is being loaded."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True) or {}
        return result.get("result", {}).get("value")

    def wait(self, expression):
        """Until it is true on a page that is loaded whole."""
        end = time.monotonic() + 120
        while self.value(f"document.readyState === 'complete' && ({expression})") is not True:
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.messages.close()
        os.close(self.to)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_reloads_keeps_the_readers_place_and_stops_with_the_run(run_folder, monkeypatch):
    quick = templates.REFRESH.replace(str(1000 * templates.REFRESH_SECONDS), "300")
    assert quick != templates.REFRESH
    monkeypatch.setattr(templates, "REFRESH", quick)
    run = run_folder(**{"summary.json": None})
    page.write_report(run, live=True)
    browser = Browser((run / "report.html").as_uri())
    try:
        browser.wait("!!document.querySelector('details')")
        place = "Math.round(scrollY) + ' ' + document.querySelector('details').open"
        browser.value("document.querySelector('details').open = true; scrollTo(0, 400); window.read = 1")
        browser.wait("window.read === undefined")
        browser.wait(f"{place} === '400 true'")
        # Who marks text is not disturbed.
        browser.value("getSelection().selectAllChildren(document.querySelector('h1')); window.read = 2")
        time.sleep(1)
        assert browser.value("window.read") == 2
        browser.value("getSelection().removeAllRanges()")
        page.write_report(run)
        browser.wait("document.querySelector('script') === null")
        assert browser.value(f"window.read = 3; {place}") == "400 false", "what is unfolded is kept while the run goes"
        time.sleep(1)
        assert browser.value("window.read") == 3
    finally:
        browser.close()

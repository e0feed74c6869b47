"""A vLLM server as a child process that ends with its parent: `ServerProcess` in the trainer, `main` in the child.

The child is vLLM's own OpenAI server. Around it: it leads a process group of its own, kills that whole group as soon as its
parent is gone (a crash included: then the kernel gives it another parent), and lets nobody through without the key, the
development routes included, which vLLM's own key does not guard. Imports only the standard library; the child imports vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = ("/health", "/ping")


class KeyGuard:
    """ASGI middleware: every path but the health check needs `Authorization: Bearer KEY`, where KEY_VARIABLE holds a key."""

    def __init__(self, app: Any) -> None:
        self.app = app
        key = os.environ.get(KEY_VARIABLE, "")
        self.wanted = hashlib.sha256(f"Bearer {key}".encode()).digest() if key else None

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if self.wanted is None or scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _allowed(self, scope: dict) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(hashlib.sha256(given).digest(), self.wanted)


def watch_parent(parent: int, interval_s: float = 0.5) -> None:
    """Kills this process group as soon as this process has another parent than `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_s)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def as_flags(settings: dict[str, Any]) -> list[str]:
    """vLLM's engine settings as its command line has them."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append("--no-" + name.replace("_", "-"))
        elif value is not None:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


class ServerProcess:
    """One server process. `start` may be called again after `stop`; its output is appended to `log`."""

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        host: str,
        log: Path,
        api_key: str | None,
        environment: dict[str, str] | None = None,
        python: str = "",
    ) -> None:
        self.settings, self.host, self.log, self.python = settings, host, log, python or sys.executable
        # A key even on localhost: other users of the machine can reach that too.
        self.api_key = api_key or secrets.token_hex(16)
        self.environment = environment or {}
        self.port = 0
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Starts the process and returns at once; `settings` are vLLM's engine arguments."""
        self.stop()
        self.port = self.port or free_port(self.host)  # kept over restarts: other ranks know it
        package = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
        environment = os.environ | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1", KEY_VARIABLE: self.api_key}
        command = [self.python, "-m", "amft_fast.rollout.vllm.server", str(os.getpid())]
        command += ["--host", self.host, "--port", str(self.port), "--middleware", f"{__name__}.KeyGuard"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command + as_flags(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment | self.environment,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        return None if self.process is None else self.process.poll()

    def last_words(self) -> str:
        """The last line of the log that says something, for the sentence about a server that would not start."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()[-200:]]
            errors = [line for line in lines if "Error" in line]
            if told := errors or [line for line in lines if line]:
                return told[-1][-300:]
        return ""

    def stop(self) -> None:
        """Ends the whole process group, also when it is stopped or its leader is dead already."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process = None


def main() -> None:
    """`python -m amft_fast.rollout.vllm.server PARENT [flags of vLLM's server]`; PARENT 0: none, for servers of one's own."""
    parent = int(sys.argv[1])
    if parent:
        watch_parent(parent)
        if os.getppid() != parent:  # it ended before the watch began
            sys.exit(1)
    sys.argv = ["vllm", *sys.argv[2:]]
    import runpy

    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()

"""Notices at once when a process of the run has died, says which, and ends the others.

The ranks stand in a ring, each with an open connection to the next. A process that is killed has its connections closed by its
kernel, so its neighbour reads the end of the stream within milliseconds; nothing depends on how busy either of them is. A
machine that vanishes without a word is noticed by TCP keep-alive. Without this the others would wait in a collective for an
answer that never comes (NCCL for ten minutes), and nothing would say whose.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

from amft_fast.engine.world import World

_GOODBYE, _PASS_ON = b"goodbye", b"pass on"
# Seconds of silence, between probes, and probes, after which a peer's machine counts as gone: 15 + 3 · 5.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Watch:
    """Watches the next rank while a run goes on; `leave` ends that without alarm."""

    def __init__(self, world: World) -> None:
        self.world = world
        if world.size == 1:
            return
        server = socket.create_server(("", 0))
        place = (_own_address(), server.getsockname()[1], f"{socket.gethostname()}, process {os.getpid()}")
        places = world.gather([place])
        self.watched = (world.rank + 1) % world.size
        host, port, self.where = places[self.watched]
        self.ahead = socket.create_connection((host, port), timeout=60)
        self.behind, _ = server.accept()
        server.close()
        self.ahead.settimeout(None)
        self.ahead.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                self.ahead.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def _listen(self) -> None:
        try:
            heard = self.ahead.recv(64)
        except OSError:
            heard = b""
        if heard.startswith(_GOODBYE):
            return
        if not heard:
            print(
                f"amft-fast: rank {self.watched} of {self.world.size} ({self.where}) has died in the middle of the run; the "
                "others end too. Go on from the last checkpoint with --resume",
                file=sys.stderr,
                flush=True,
            )
        self._tell(_PASS_ON)
        os._exit(1)

    def explain(self) -> None:
        """After an error that another rank's death may have caused: gives the watch time to say so and end this process."""
        if self.world.size > 1:
            time.sleep(5)

    def leave(self) -> None:
        """This rank ends of its own accord, and says so itself."""
        if self.world.size > 1:
            self._tell(_GOODBYE)

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the one behind may have gone already
            self.behind.sendall(word)


def _own_address() -> str:
    """The address by which the other processes reach this machine: the one that reaches their meeting point."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=10) as s:
            return s.getsockname()[0]
    except OSError:
        return socket.gethostname()

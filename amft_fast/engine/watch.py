"""Notices at once when a process of the run has died, says which, and ends the others.

The ranks stand in a ring, each with an open connection to the next. A process that is killed has its connections closed by its
kernel, so its neighbour reads the end of the stream within milliseconds; nothing depends on how busy either of them is. A
machine that vanishes without a word is noticed by TCP keep-alive. Without this the others would wait in a collective for an
answer that never comes (NCCL for ten minutes), and nothing would say whose.

A rank listens only until its neighbour has come, at the address alone by which the others reach it, and both prove that they
know a secret of the run, which rank 0 draws and the process group carries: a stranger neither takes a place nor holds one up.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from amft_fast.engine.world import World
from amft_fast.errors import UserError

_GOODBYE, _PASS_ON = b"goodbye", b"pass on"
_MEETING_S = 60.0  # for a neighbour to come; all ranks begin at once
# Seconds of silence, between probes, and probes, after which a peer's machine counts as gone: 15 + 3 · 5.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


# What to do after a death: of training, of an evaluation.
RESUME, AGAIN = "Go on from the last checkpoint with --resume", "Give the same command again"


class Watch:
    """Watches the next rank while a run goes on; `leave` ends that without alarm. `advice`: what to do after a death."""

    def __init__(self, world: World, advice: str = RESUME) -> None:
        self.world, self.advice = world, advice
        if world.size == 1:
            return
        secret = world.broadcast(secrets.token_bytes(32))
        self.watched = (world.rank + 1) % world.size
        with _listening(_own_address()) as server:
            place = (*server.getsockname()[:2], f"{socket.gethostname()}, process {os.getpid()}")
            places = world.gather([place])
            self.where = places[self.watched][2]
            self.ahead, self.behind = meet(server, places, world.rank, secret)
        self.ahead.settimeout(None)
        self.behind.settimeout(None)
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
                f"others end too. {self.advice}",
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


@contextmanager
def watched(world: World, advice: str = RESUME) -> Iterator[World]:
    """The ranks watch each other meanwhile."""
    watch = Watch(world, advice)
    try:
        yield world
    except RuntimeError:
        watch.explain()
        raise
    finally:
        watch.leave()


def meet(
    server: socket.socket, places: list[tuple[str, int, str]], rank: int, secret: bytes, seconds: float = _MEETING_S
) -> tuple[socket.socket, socket.socket]:
    """Connections to the next rank and from the one before, both sides proved. `places`: (host, port, name) of each rank.

    Raises UserError when a neighbour cannot be reached or does not come in time.
    """
    size = len(places)
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    host, port, name = places[ahead]
    try:
        up = socket.create_connection((host, port), timeout=seconds)
        up.sendall(_proof(secret, f"{rank} watches {ahead}"))
        down = _accept(server, _proof(secret, f"{behind} watches {rank}"), seconds)
        down.sendall(_proof(secret, f"{rank} is watched by {behind}"))
        answer = _proof(secret, f"{ahead} is watched by {rank}")
        if not hmac.compare_digest(_take(up, len(answer)), answer):
            raise ConnectionError("another process answered")
    except OSError as e:
        raise UserError(
            f"rank {rank} of {size} could not meet its neighbours, rank {ahead} ({name}) at {host}:{port} and rank {behind} "
            f"({places[behind][2]}): {e}; the machines of a run must reach each other on all ports"
        ) from None
    return up, down


def _proof(secret: bytes, words: str) -> bytes:
    """What only a process that knows the secret can say; each proof is for one connection and one direction."""
    return hmac.digest(secret, words.encode(), "sha256")


def _accept(server: socket.socket, wanted: bytes, seconds: float) -> socket.socket:
    """The connection that brings the proof. Others are closed, and one that stays silent holds nobody up."""
    end = time.monotonic() + seconds
    server.setblocking(False)
    heard: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as strangers:
        selector.register(server, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                with contextlib.suppress(OSError):  # one that has gone again
                    if key.fileobj is server:
                        other = server.accept()[0]
                        other.setblocking(False)
                        heard[other] = b""
                        strangers.callback(other.close)
                        selector.register(other, selectors.EVENT_READ)
                        continue
                    other = key.fileobj
                    word = other.recv(len(wanted) - len(heard[other]))
                    heard[other] += word
                    if word and len(heard[other]) < len(wanted):
                        continue
                    selector.unregister(other)
                    if hmac.compare_digest(heard[other], wanted):
                        found = other.dup()
                        found.settimeout(seconds)
                        return found
                    other.close()
    raise TimeoutError(f"nobody came in {seconds:.0f} s who knew the run's secret")


def _take(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer where the other end stops before."""
    got = b""
    while len(got) < size and (more := connection.recv(size - len(got))):
        got += more
    return got


def _listening(host: str) -> socket.socket:
    """A socket that listens at this address alone, at a port that the system picks."""
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


def _own_address() -> str:
    """The address by which the other processes reach this machine: the one that reaches their meeting point."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=10) as s:
            return s.getsockname()[0]
    except OSError:
        return socket.gethostname()

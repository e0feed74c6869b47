"""One process at a time writes to a run's folder. The kernel gives the lock back when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from amft_fast.errors import UserError

FILE = "run.lock"
# A record lock (fcntl), not flock: processes forked from this one do not hold it after its death, and NFS knows it.
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print, patience: float = 0.0) -> Iterator[None]:
    """Holds a run's folder, which is made if missing, for this process; waits `patience` seconds for another to let it go.

    Raises UserError that names the process that holds it, or when the folder cannot be written. On a file system without locks
    `say` tells so, and nothing is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / FILE, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as e:
        raise UserError(f"run.dir {str(folder)!r} cannot be written: {e.strerror}") from None
    with file:
        try:
            _take(file, patience)
        except OSError as e:
            if e.errno in _TAKEN:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise UserError(
                    f"run.dir {str(folder)!r} is in use by {holder}: wait for it or stop it, or take another --run.dir"
                ) from None
            say(
                f"run.dir {str(folder)!r}: no lock on this file system ({e.strerror}); see that no second run takes the folder"
            )
            yield
            return
        with suppress(OSError):  # a full disk: the lock holds without the name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)


def _take(file: TextIO, patience: float) -> None:
    """Locks the file. Raises OSError when it is taken, and stays so."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in _TAKEN or time.monotonic() > end:
                raise
        time.sleep(0.2)


def is_held(folder: Path) -> bool | None:
    """Whether some other process holds a run's folder; None where that cannot be told: no rights, no locks, another machine.

    Never for a folder that this process holds: closing the file again would give its lock back.
    """
    try:
        file = open(folder / FILE, encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            return True if e.errno in _TAKEN else None
        holder = file.read(200).strip()
        # A file system may keep locks to its machine: what another one wrote here holds until it takes it away.
        return None if holder and not holder.endswith(f" on {socket.gethostname()}") else False

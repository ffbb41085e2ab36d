"""The lock of a run folder: one writer at a time, its owner named, a dead owner noticed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import RuntimeFault

_log = logging.getLogger("medrl.runlog")
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """An exclusive lock on ``run.lock`` with the owner's process number, host and start time as JSON.

    The kernel's file lock decides, so that the death of the owner frees the folder; the text in the file says
    who. A file with text that nobody locks is stale: it is reported and taken over. Where the file system
    knows no locks, the process number decides on the same host, and another host's lock is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self, *, wait_s: float = 8.0) -> None:
        """Take the lock.

        Args:
            wait_s: How long to wait for helper processes of a dead owner to end (data-loading workers notice
                the death of their parent within seconds). A living owner is refused at once.

        Raises:
            RuntimeFault: Another living run holds the folder, or the folder cannot be written.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RuntimeFault(
                f"run folder {self.path.parent}",
                why=f"the lock cannot be written: {error.strerror}",
                do="choose another folder with -o, or correct its permissions",
            ) from error
        try:
            kernel = self._lock(fd, time.monotonic() + wait_s)
            owner = _read(fd)
            if owner:
                if not kernel and (owner.get("host") != socket.gethostname() or _alive(owner)):
                    raise self._refused(owner)
                _log.warning(
                    "stale lock in %s: process %s on %s, started %s, ended without releasing it; taken over",
                    self.path.parent,
                    owner.get("pid"),
                    owner.get("host"),
                    owner.get("start"),
                )
            text = json.dumps(
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "start": datetime.now(UTC).isoformat(timespec="seconds"),
                    "ticks": _start_ticks(os.getpid()),
                }
            )
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Empty the file and free the lock; removing the file could race with the next owner."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        _held.discard(self)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        os.close(fd)

    def owner(self) -> dict[str, Any]:
        """Return who holds the lock (pid, host, start); empty for nobody, or a dead process of this host."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return {}
        try:
            owner = _read(fd)
        finally:
            os.close(fd)
        return {} if owner.get("host") == socket.gethostname() and not _alive(owner) else owner

    def _lock(self, fd: int, deadline: float) -> bool:
        """Take the kernel's lock; return False where the file system has none."""
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in _NO_FLOCK:
                    return False
                owner = _read(fd)
                dead = bool(owner) and owner.get("host") == socket.gethostname() and not _alive(owner)
                if not dead or time.monotonic() > deadline:
                    raise self._refused(owner) from error
                time.sleep(0.2)

    def _refused(self, owner: dict[str, Any]) -> RuntimeFault:
        pid = owner.get("pid", "?")
        return RuntimeFault(
            f"run folder {self.path.parent} is in use",
            why=f"process {pid} on {owner.get('host', '?')} has it since {owner.get('start', '?')}",
            do=f"wait for it, or choose another folder with -o; if that run is dead, remove {self.path}",
        )

    def _forget(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _in_child() -> None:
    """Close inherited locks in a forked child, so that a surviving worker cannot keep a folder locked."""
    for lock in list(_held):
        lock._forget()
    _held.clear()


os.register_at_fork(after_in_child=_in_child)


def _read(fd: int) -> dict[str, Any]:
    try:
        value = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the recorded process of this host still runs; a reused process number does not count."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    recorded, now = owner.get("ticks"), _start_ticks(pid)
    return process_alive(pid) and (recorded is None or now is None or recorded == now)


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists and has not ended; a zombie has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (OSError, IndexError):
        return True


def _start_ticks(pid: int) -> int | None:
    """Return the kernel's start time of a process in clock ticks since boot; None where /proc is absent."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None

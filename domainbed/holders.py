"""Who works in a run's directory, as others see it: the newest claim, and whether its process lives."""

import errno
import functools
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

logger = logging.getLogger(__name__)

EXPIRY_S = 60.0  # a heartbeat of another machine that is older may be of a dead process
WIDTH = 1024  # bytes of a claim; all equal, so that no rewrite leaves the end of a longer one

_CLAIM = re.compile(r"claim\.([1-9]\d*)")
_GONE = (errno.ENOENT, errno.ESTALE)

T = TypeVar("T")
Directory = str | os.PathLike[str]


@functools.cache
def machine() -> str:
    """What tells machines apart: processes with equal answers can see whether the other one lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        import uuid

        return f"{socket.gethostname()} {uuid.getnode():x}"


class Process(NamedTuple):
    """What /proc shows of a process."""

    state: str  # a letter
    threads: int
    start: int  # clock ticks after boot

    @property
    def is_over(self) -> bool:
        """Whether it is a zombie without threads: until the last one ends, a killed process keeps files and locks."""
        return self.state in "ZX" and self.threads <= 1


def process(pid: int) -> Process | None:
    """The process of this number; None where /proc doesn't show it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # from the third on; the second, a name in brackets, may hold anything
    return Process(fields[0], int(fields[17]), int(fields[19]))


def _is_alive(pid: int, start: int | None) -> bool:
    """Whether the process that started then still runs; a number that was used again is another process."""
    seen = process(pid)
    if seen is not None:
        return not seen.is_over and start in (None, seen.start)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, of another user
        return True
    return True


def file_system_now(directory: Directory) -> float:
    """The time that a file changed now in this directory would bear: a server's clock may differ from ours.

    Where nothing can be written (a sweep that one may only read), it is our own clock's.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        logger.debug("%s: taking our own clock: %s", directory, error)
        return time.time()


class Holder(NamedTuple):
    """What the newest claim of a directory says; None where it says nothing legible."""

    attempt: int
    heartbeat: float  # unix seconds on the file system's clock
    host: str | None = None
    machine: str | None = None
    pid: int | None = None
    start: int | None = None
    step: int | None = None
    steps: int | None = None
    released: bool = False
    ended: str | None = None  # name of the exception that ended it

    def alive(self, now: float) -> bool:
        """Whether its process works on, as far as one can tell from here without touching the lock.

        Args:
            now: ``file_system_now``. A heartbeat far in the future is one of before a clock was set back; a live
                process would have beaten since.
        """
        if self.released:
            return False
        if self.is_ours():
            assert self.pid is not None
            return _is_alive(self.pid, self.start)
        return abs(now - self.heartbeat) <= EXPIRY_S

    def is_ours(self) -> bool:
        """Whether it was made on this machine."""
        return self.pid is not None and self.machine == machine()


def attempts(names: Iterable[str]) -> list[int]:
    """The numbers N of the claims among a directory's names, in order."""
    return sorted(int(match[1]) for match in map(_CLAIM.fullmatch, names) if match)


def newest(directory: Directory, entries: Iterable[str] | None = None) -> Holder | None:
    """Reads the claim that counts; None if there is none.

    Args:
        entries: the directory's names, if they are known.
    """
    numbers = attempts(os.listdir(directory) if entries is None else entries)
    while numbers:
        holder = _read(os.path.join(directory, f"claim.{numbers[-1]}"), numbers[-1])
        if holder is not None:
            return holder
        numbers = attempts(os.listdir(directory))  # taken over, or done, since the names were read
    return None


def _read(path: str, attempt: int) -> Holder | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)  # NFS promises fresh attributes at an open only
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    with open(descriptor, "rb") as file:
        heartbeat, text = os.fstat(descriptor).st_mtime, file.read(WIDTH)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return Holder(attempt, heartbeat)
    facts: dict[str, Any] = {key: _typed(content, key, str) for key in ("host", "machine", "ended")}
    facts |= {key: _typed(content, key, int) for key in ("pid", "start", "step", "steps")}
    return Holder(attempt, heartbeat, **facts, released=content.get("released") is True)


def _typed(content: dict[str, Any], key: str, kind: type[T]) -> T | None:
    value = content.get(key)
    return value if isinstance(value, kind) else None

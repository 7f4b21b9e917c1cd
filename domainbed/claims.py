"""Who works in a run's directory: one process at a time, on one machine or on several that share a file system.

Two guards. The POSIX lock excludes the processes of a machine and vanishes with its process. ``claim.N`` also excludes
other machines, where locks may not reach; its time of change is the heartbeat of whoever made it.

Why no two machines hold a directory. To hold it is to have made the highest claim. A claim's name is created
exclusively, so of all who saw N, one makes N + 1. Numbers are never used again before the run is done: whoever comes
late with a lower one finds the higher one when it looks once more, and withdraws. N + 1 is made only if N was released,
if its process is known to be dead (same machine), or if its heartbeat looked old and then stood still for CONFIRM_S of
our own monotonic clock. A jump of a clock makes a live heartbeat look old, but it does not make it stand still.

What remains: a machine that sleeps (or is cut off) for longer than EXPIRY_S, is replaced, and wakes. Whoever replaces
it removes its claim before working, so ``check`` just before a write sees the loss; only the microseconds between this
check and that write stay open.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from domainbed import holders, records
from domainbed.holders import WIDTH, Directory, Holder, attempts, file_system_now, newest

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
STOP_FILE = "stop"
EXIT_LOCKED = 73  # another process is running here
BEAT_S = 10.0  # between two heartbeats
CONFIRM_S = 25.0  # an expired heartbeat of another machine is watched for so long: a live one moves

_PARTIAL = "claim.partial-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine sleeps


class RunLocked(RuntimeError):
    """Another process holds this run's directory."""


class Lost(RuntimeError):
    """Another process has taken over the directory that this one held."""


def _run_locked(directory: Directory) -> RunLocked:
    holder = newest(directory)
    if holder is None or not holder.alive(holder.heartbeat):  # an earlier one's: whoever holds it has only begun
        return RunLocked(f"another process is running in {directory}")
    age = max(0.0, file_system_now(directory) - holder.heartbeat)
    who = f"host {holder.host or 'unknown'}, process {holder.pid or 'unknown'}, heartbeat {age:.0f} s ago"
    return RunLocked(f"another process is running in {directory}: {who}")


@contextmanager
def lock(directory: Directory) -> Iterator[None]:
    """Holds the directory for this process among those of this machine; vanishes with the process, however it ends.

    A POSIX record lock, because a flock would survive in forked loader workers. Closing any descriptor of the file
    gives it up: never open it elsewhere in a process that may hold it. It doesn't guard against the process itself.

    Raises:
        RunLocked: another process holds it.
    """
    with open(Path(directory, LOCK_FILE), "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise _run_locked(directory) from error
        yield


def request_stop(directory: Directory) -> None:
    """Asks the process that works here, on whatever machine, to save and end; it sees this at its next heartbeat."""
    path = Path(directory, STOP_FILE)
    path.write_bytes(b"")
    os.utime(path)


def _next_attempt(directory: Directory) -> int:
    """The number of the claim to make, once it is certain that nobody works here.

    Raises:
        RunLocked: somebody does, or may.
    """
    holder = newest(directory)
    if holder is None:
        return 1
    if not holder.released:
        if holder.is_ours():
            # We hold the lock, so its process is dead, unless that process closed the lock file somewhere.
            taken = holder.start is not None and holder.alive(holder.heartbeat)
        else:
            taken = not _is_still(directory, holder)
        if taken:
            raise _run_locked(directory)
    return holder.attempt + 1


def _is_still(directory: Directory, holder: Holder) -> bool:
    """Whether a claim of another machine has been left: its heartbeat is out of time and doesn't move."""
    age = file_system_now(directory) - holder.heartbeat
    if 0 <= age <= holders.EXPIRY_S:
        return False
    logger.warning("%s: host %s was last seen %.0f s ago; watching for %g s", directory, holder.host, age, CONFIRM_S)
    end = time.monotonic() + CONFIRM_S
    while True:
        left = end - time.monotonic()
        if newest(directory) != holder:
            return False
        if left <= 0:
            return True
        time.sleep(min(1.0, left))


def _new_file(path: str, content: bytes) -> int:
    """Creates a file exclusively and returns its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        _remove(path)
        raise
    return descriptor


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _create(directory: Directory, attempt: int, content: bytes) -> int:
    """Makes the claim exclusively, with all of its content, and returns its descriptor."""
    path = os.path.join(directory, f"claim.{attempt}")
    partial = os.path.join(directory, _PARTIAL + os.urandom(8).hex())
    descriptor = _new_file(partial, content)
    try:
        os.link(partial, path)  # exclusive on every NFS, unlike O_EXCL
    except OSError as error:
        if error.errno == errno.EEXIST and os.fstat(descriptor).st_nlink == 2:
            return descriptor  # NFS repeated a request whose answer was lost
        os.close(descriptor)
        if error.errno not in _NO_LINKS:
            raise
        return _new_file(path, content)
    finally:
        _remove(partial)
    return descriptor


def _take(directory: Directory, attempt: int, content: bytes) -> int:
    """Makes the claim and clears what it replaces, or withdraws; returns its descriptor.

    Raises:
        RunLocked: another process was faster.
    """
    try:
        descriptor = _create(directory, attempt, content)
    except (FileExistsError, FileNotFoundError) as error:  # not found: the faster one has cleared our partial file
        raise _run_locked(directory) from error
    names = os.listdir(directory)
    numbers = attempts(names)
    if numbers and numbers[-1] > attempt:
        os.close(descriptor)
        _remove(os.path.join(directory, f"claim.{attempt}"))
        raise _run_locked(directory)
    lower = [f"claim.{number}" for number in numbers if number < attempt]
    for name in (*lower, *(name for name in names if name.startswith(_PARTIAL))):
        _remove(os.path.join(directory, name))
    stop = os.path.join(directory, STOP_FILE)
    with suppress(FileNotFoundError):
        if os.stat(stop).st_mtime_ns < os.fstat(descriptor).st_mtime_ns:  # meant for an earlier process
            os.unlink(stop)
    return descriptor


def _content(attempt: int, step: int | None, steps: int | None, **how_it_ended: Any) -> bytes:
    """A claim's text."""
    own = holders.process(os.getpid())
    facts = {"host": socket.gethostname(), "machine": holders.machine(), "pid": os.getpid()}
    facts |= {"start": own.start if own else None, "attempt": attempt, "step": step, "steps": steps}
    line = json.dumps(facts | how_it_ended)
    assert len(line) < WIDTH
    return line.ljust(WIDTH - 1).encode() + b"\n"


class Claim:
    """A directory held by this process; a thread keeps its heartbeat."""

    def __init__(
        self,
        directory: Directory,
        attempt: int,
        descriptor: int,
        on_stop: Callable[[], None] | None,
        on_lost: Callable[[], None] | None,
    ) -> None:
        self.attempt = attempt
        self.stop_requested = False
        self._directory, self._descriptor = os.fspath(directory), descriptor
        self._on_stop, self._on_lost = on_stop, on_lost
        self._progress: tuple[int | None, int | None] = (None, None)
        self._lost = self._warned = False
        self._looked = time.clock_gettime(_CLOCK)
        self._guard = threading.RLock()  # re-entrant: a signal's handler may check while we do
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def report(self, step: int, steps: int) -> None:
        """Says how far the run is; written at the next heartbeat, and the first time at once."""
        first, self._progress = self._progress == (None, None), (int(step), int(steps))
        if first:
            self._beat()

    def check(self) -> None:
        """Call before each write.

        Raises:
            Lost: the directory is another process's by now.
        """
        if (
            time.clock_gettime(_CLOCK) - self._looked > holders.EXPIRY_S / 2
        ):  # we slept, and the thread may wake after us
            self._beat()
        if not self._lost and self._is_gone():
            self._lose()
        if self._lost:
            raise Lost(f"{self._directory}: another process has taken over; nothing more is written by this one")

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._beat()
            if self._lost:
                return

    def _beat(self) -> None:
        """Renews the heartbeat and looks whether the directory is still ours, and whether somebody asks to stop."""
        with self._guard:
            errors = [error for error in map(_error, (self._write, self._touch)) if error]
            names: list[str] = []
            try:
                names = os.listdir(self._directory)
            except OSError as error:
                errors.append(error)
            lost = self._is_gone() or any(error.errno == errno.ESTALE for error in errors)
            lost = lost or any(number > self.attempt for number in attempts(names))
            self._looked = time.clock_gettime(_CLOCK)
            asked = not lost and STOP_FILE in names and not _error(self._remove_stop)
            first = asked and not self.stop_requested
            self.stop_requested |= asked
        if lost:
            self._lose()
        elif errors and not self._warned:
            self._warned = True
            logger.warning("%s: the heartbeat could not be written: %s", self._directory, errors[0])
        if first and self._on_stop:
            self._on_stop()

    def _write(self, **how_it_ended: Any) -> None:
        os.pwrite(self._descriptor, _content(self.attempt, *self._progress, **how_it_ended), 0)

    def _touch(self) -> None:
        os.utime(self._descriptor)  # also where the disk is full; and NFS sends off at once what it holds back

    def _remove_stop(self) -> None:
        os.unlink(os.path.join(self._directory, STOP_FILE))

    def _is_gone(self) -> bool:
        try:
            return os.fstat(self._descriptor).st_nlink == 0
        except OSError as error:
            return error.errno == errno.ESTALE

    def _lose(self) -> None:
        with self._guard:
            first, self._lost = not self._lost, True
        if first:
            logger.error("%s: another process has taken over, or the directory was removed", self._directory)
            if self._on_lost:
                self._on_lost()

    def _release(self, ended: str | None) -> None:
        """Stops the heartbeat and says that the directory is free; removes the claims of a run that is done."""
        self._ended.set()
        self._thread.join()
        try:
            if self._lost or self._is_gone():
                return
            if not os.path.exists(os.path.join(self._directory, records.DONE_FILE)):
                self._write(released=True, ended=ended)
                return
            for number in attempts(os.listdir(self._directory)):
                if number <= self.attempt:
                    _remove(os.path.join(self._directory, f"claim.{number}"))
        except OSError as error:
            logger.warning("%s: the claim could not be released: %s", self._directory, error)
        finally:
            os.close(self._descriptor)


def _error(act: Callable[[], None]) -> OSError | None:
    """What went wrong with it on the file system, if anything."""
    try:
        act()
    except OSError as error:
        return error
    return None


@contextmanager
def claim(
    directory: Directory, *, on_stop: Callable[[], None] | None = None, on_lost: Callable[[], None] | None = None
) -> Iterator[Claim]:
    """Holds a run's directory against all processes of all machines that share it.

    A claim that another machine left behind is taken over after EXPIRY_S, once it was watched for CONFIRM_S.

    Args:
        directory: exists, and can be written to.
        on_stop: called once, from a thread, when somebody asks to stop (``request_stop``).
        on_lost: called once, from a thread or from ``check``, when another process has taken over.

    Raises:
        RunLocked: another process works here, or may.
    """
    with lock(directory):
        attempt = _next_attempt(directory)
        held = Claim(directory, attempt, _take(directory, attempt, _content(attempt, None, None)), on_stop, on_lost)
        ended: str | None = None
        try:
            yield held
        except BaseException as error:
            ended = type(error).__name__
            raise
        finally:
            held._release(ended)

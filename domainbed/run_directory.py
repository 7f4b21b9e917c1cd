"""The directory of one run: who works in it, whose run it holds, and when it is complete."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domainbed import explanation_records, records

LOCK_FILE = "lock"
EXIT_LOCKED = 73  # another process is running here


class RunLocked(RuntimeError):
    """Another process holds this run's directory."""


def is_done(directory: str | os.PathLike[str]) -> bool:
    return Path(directory, records.DONE_FILE).exists()


def mark_done(directory: str | os.PathLike[str]) -> None:
    """Writes the four bytes that say: complete. The last thing a run does."""
    Path(directory, records.DONE_FILE).write_text("done", encoding="utf-8")


def prepare(directory: str | os.PathLike[str]) -> None:
    """Makes the directory and proves that files can be written in it.

    Raises:
        NotADirectoryError: a file of that name is in the way.
        PermissionError: the directory can't be written to.
    """
    try:
        os.makedirs(directory, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"--output_dir {directory} is a file, or lies below one; name a directory") from error
    except OSError as error:
        raise PermissionError(f"--output_dir {directory} can't be made: {error.strerror}; name another") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {directory} is not writable; change its mode or name another")


@contextmanager
def lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the directory for this process; the lock vanishes with the process, however it ends.

    A POSIX record lock, because a flock would survive in forked loader workers.

    Raises:
        RunLocked: another process on this file system holds it.
    """
    with open(Path(directory, LOCK_FILE), "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RunLocked(f"another process is running in {directory}") from error
        yield


def is_running(directory: str | os.PathLike[str]) -> bool:
    """Whether another process holds the directory's lock (don't ask from the process that holds it)."""
    if not Path(directory, LOCK_FILE).exists():
        return False
    try:
        with lock(directory):
            return False
    except RunLocked:
        return True


def clear(directory: str | os.PathLike[str]) -> None:
    """Removes a run's results, the sign of completeness first."""
    files = (records.DONE_FILE, records.RESULTS_FILE, explanation_records.EXPLANATIONS_FILE)
    for pattern in (*files, "model*.pkl", "model*.pkl.partial"):
        for path in Path(directory).glob(pattern):
            path.unlink()


def is_fresh(directory: str | os.PathLike[str]) -> bool:
    """Whether no run has left a record here."""
    return not (is_done(directory) or Path(directory, records.RESULTS_FILE).exists())


def check_same_run(directory: str | os.PathLike[str], args: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a directory that holds another run's records.

    Args:
        args: the arguments of the run that is to start.
        defaults: what an argument was that the records lack, as DomainBed's lack ours.

    Raises:
        ValueError: names each argument that differs, and --overwrite.
    """
    path = Path(directory, records.RESULTS_FILE)
    stored, skipped = records.read(path) if path.exists() else ([], 0)
    if not stored:
        if skipped > 1:  # one torn line is an own run killed at its first record
            raise ValueError(
                f"{path} holds no run of ours; name another --output_dir, or pass --overwrite to replace it"
            )
        return
    theirs = {**defaults, **stored[0]["args"]}
    differing = [
        f"{key}: {theirs.get(key)!r} there, {args.get(key)!r} now"
        for key in sorted(args.keys() | theirs.keys())
        if key != "output_dir" and theirs.get(key) != args.get(key)
    ]
    if differing:
        raise ValueError(
            f"{directory} holds another run ({'; '.join(differing)}); name another --output_dir, "
            "or pass --overwrite to replace that run"
        )

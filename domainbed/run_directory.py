"""The directory of one run: whose run it holds, when it is complete, and how a file is written whole."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from domainbed import explanation_records, records

FAILED_FILE = "failed"
SNAPSHOT_FILES = ("snapshot.pkl", "snapshot_previous.pkl")


def is_done(directory: str | os.PathLike[str]) -> bool:
    return Path(directory, records.DONE_FILE).exists()


def mark_done(directory: str | os.PathLike[str]) -> None:
    """Writes the four bytes that say: complete. The last thing a run does; then its snapshots are of no use."""
    with whole(Path(directory, records.DONE_FILE)) as file:
        file.write(b"done")
    for name in (*SNAPSHOT_FILES, FAILED_FILE):
        Path(directory, name).unlink(missing_ok=True)


@contextmanager
def whole(path: Path, keep_as: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that is seen whole or not at all, also after a kill or a power cut.

    Args:
        keep_as: where a file that it replaces goes.
    """
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if keep_as is not None and path.exists():
        os.replace(path, keep_as)
    os.replace(partial, path)
    sync(path.parent)


def sync(directory: str | os.PathLike[str]) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def clear(directory: str | os.PathLike[str]) -> None:
    """Removes a run's results, the sign of completeness first."""
    files = (records.DONE_FILE, records.RESULTS_FILE, explanation_records.EXPLANATIONS_FILE, FAILED_FILE)
    for pattern in (*files, "model*.pkl", "snapshot*.pkl", "*.partial"):
        for path in Path(directory).glob(pattern):
            path.unlink()


def is_fresh(directory: str | os.PathLike[str]) -> bool:
    """Whether no run has left a record or a snapshot here."""
    names = (records.DONE_FILE, records.RESULTS_FILE, *SNAPSHOT_FILES)
    return not any(Path(directory, name).exists() for name in names)


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
    refuse_other_run(directory, {**defaults, **stored[0]["args"]}, args)


def refuse_other_run(directory: str | os.PathLike[str], theirs: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Raises ValueError if the run in the directory has other arguments; names each one that differs."""
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

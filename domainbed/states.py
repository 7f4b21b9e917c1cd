"""How far a job has come, told from the files in its directory, whatever ended the process that worked there."""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from domainbed import holders, records, run_directory
from domainbed.claims import EXIT_LOCKED
from domainbed.interruption import EXIT_PREEMPTED

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # as argparse; another try would say the same

FAILED_FILE = run_directory.FAILED_FILE
_TRACES = {FAILED_FILE, records.DONE_FILE, records.RESULTS_FILE, *run_directory.SNAPSHOT_FILES}
_NO_JOBS = {"slurm"}  # directories beside the jobs' own


class State(StrEnum):
    """What becomes of a job."""

    QUEUED = "queued"  # nothing ran here
    RUNNING = "running"
    PREEMPTED = "preempted"  # it ran, was stopped or killed, and can go on
    FAILED = "failed"  # it ended with an error
    DONE = "done"


class Status(NamedTuple):
    """A job's state and what is known beside it; None where it is not."""

    state: State
    host: str | None = None  # of the last process that worked here
    pid: int | None = None
    heartbeat_age_s: float | None = None  # of a running job
    step: int | None = None
    steps: int | None = None
    attempt: int | None = None
    error: str | None = None  # of a failed job, one line
    time: float | None = None  # unix seconds: when it was done, failed, or last gave a sign of life


QUEUED = Status(State.QUEUED)


def read(directory: str | os.PathLike[str]) -> Status:
    """The status of the job in this directory, which need not exist."""
    return _status(os.fspath(directory), lambda: holders.file_system_now(directory))


def code_of(directory: str | os.PathLike[str]) -> int:
    """The exit code that a job's directory speaks for; EXIT_PREEMPTED if it has yet to run, or to go on."""
    known = {State.DONE: 0, State.FAILED: EXIT_FAILED, State.RUNNING: EXIT_LOCKED}
    return known.get(read(directory).state, EXIT_PREEMPTED)


def scan(sweep_dir: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Status]:
    """The statuses of a sweep's jobs by the names of their directories.

    Args:
        names: the jobs to look at, in the order of the answer; those without a directory are queued. None: every
            directory there is.
    """
    sweep = os.fspath(sweep_dir)
    now = functools.cache(lambda: holders.file_system_now(sweep))
    try:
        with os.scandir(sweep) as entries:
            there = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        there = []
    if names is None:
        return {name: _status(f"{sweep}/{name}", now) for name in there if name not in _NO_JOBS}
    present = set(there)
    return {name: _status(f"{sweep}/{name}", now) if name in present else QUEUED for name in names}


def _status(directory: str, now: Callable[[], float]) -> Status:
    done = _done(directory)
    if done:
        return done
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return QUEUED
    if _TRACES.isdisjoint(names) and not holders.attempts(names):
        return QUEUED
    holder = holders.newest(directory, names)
    known: dict[str, Any] = {}
    if holder:
        known = {key: getattr(holder, key) for key in ("host", "pid", "step", "steps", "attempt")}
        known["time"] = holder.heartbeat
        if holder.alive(now()):
            return Status(State.RUNNING, heartbeat_age_s=max(0.0, now() - holder.heartbeat), **known)
    # Nobody works here any more: only now is it certain what the last process left.
    return _done(directory) or _failed(directory, known) or Status(State.PREEMPTED, **known)


def _done(directory: str) -> Status | None:
    try:
        return Status(State.DONE, time=os.stat(f"{directory}/{records.DONE_FILE}").st_mtime)
    except (FileNotFoundError, NotADirectoryError):  # a file of that name is told by whoever runs the job
        return None


def _failed(directory: str, known: dict[str, Any]) -> Status | None:
    path = f"{directory}/{FAILED_FILE}"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            content = json.load(file)
        found = {key: content[key] for key in ("error", "attempt", "time")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        found = {"error": f"(unknown: {path} is damaged)"}
    return Status(State.FAILED, **(known | found))


def write_failure(directory: str | os.PathLike[str], error: str, exit_status: int) -> None:
    """Says in the job's directory that its last process failed. Where even that fails, it is only logged.

    Args:
        error: the message; its lines are joined.
    """
    path = Path(directory, FAILED_FILE)
    try:
        holder = holders.newest(directory)
        failure = {"error": " ".join(error.split()), "exit_status": exit_status}
        failure |= {"attempt": holder.attempt if holder else 0, "time": time.time()}
        with run_directory.whole(path) as file:
            file.write(json.dumps(failure).encode() + b"\n")
    except OSError as problem:
        logger.warning("%s could not be written (%s); the failure was: %s", path, problem, error)

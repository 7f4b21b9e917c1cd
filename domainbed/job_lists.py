"""A sweep's list of jobs, ``jobs.jsonl``, and the mark that it is cancelled: what a sweep knows beside its runs.

One line a job, {"name": its directory, "args": its arguments of train without output_dir}. Launching appends the jobs
that are not listed yet; so whoever has the sweep's directory knows its jobs, those too that have no directory yet.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from domainbed.jobs import Job

logger = logging.getLogger(__name__)

JOBS_FILE = "jobs.jsonl"
CANCELLED_FILE = "cancelled"

_LINE = '{"name": "%s", "args": %s}'
_NAMES = re.compile(
    r'^\{"name": "([^"]+)", "args": \{.*\}\}$', re.MULTILINE
)  # of whole lines, at a tenth of json's time


class Listed(NamedTuple):
    """A job as the list has it."""

    name: str  # of its directory
    args: dict[str, Any]  # of train, without output_dir


def listed(job: Job) -> Listed:
    """The job as the list has it."""
    return Listed(job.name, {key: value for key, value in job.train_args.items() if key != "output_dir"})


def _lines(text: str) -> Iterator[Listed | None]:
    """The jobs, each once, in order; None for a line that holds none, as a kill may leave one."""
    seen = set()
    for line in filter(str.strip, text.split("\n")):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("args"), dict) or "name" not in entry:
            yield None
        elif entry["name"] not in seen:
            seen.add(entry["name"])
            yield Listed(entry["name"], entry["args"])


def _text(sweep_dir: str | os.PathLike[str]) -> str:
    try:
        return Path(sweep_dir, JOBS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def exists(sweep_dir: str | os.PathLike[str]) -> bool:
    """Whether the sweep has a list of its jobs, as one that only DomainBed launched has not."""
    return Path(sweep_dir, JOBS_FILE).exists()


def read(sweep_dir: str | os.PathLike[str]) -> list[Listed]:
    """The listed jobs, none where there is no list; warns of lines that hold none."""
    lines = list(_lines(_text(sweep_dir)))
    if skipped := lines.count(None):
        logger.warning("%s: skipped %d line(s) that hold no job", Path(sweep_dir, JOBS_FILE), skipped)
    return [job for job in lines if job is not None]


def append_missing(sweep_dir: str | os.PathLike[str], jobs: Iterable[Job]) -> int:
    """Appends the jobs that are not listed, in one synced write; returns how many they were.

    Two processes may append the same jobs at once: readers take the first of equal names.
    """
    text = _text(sweep_dir)
    known = set(_NAMES.findall(text))
    lines = [_LINE % (job.name, json.dumps(listed(job).args)) for job in jobs if job.name not in known]
    if lines:
        torn = "\n" if text and not text.endswith("\n") else ""
        _append(Path(sweep_dir, JOBS_FILE), (torn + "\n".join(lines) + "\n").encode())
    return len(lines)


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]  # a full disk or a signal may cut a write short
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cancel(sweep_dir: str | os.PathLike[str]) -> None:
    """Marks the sweep: its launchers and workers stop taking jobs."""
    Path(sweep_dir, CANCELLED_FILE).touch()


def is_cancelled(sweep_dir: str | os.PathLike[str]) -> bool:
    """Whether the sweep is marked as cancelled."""
    return Path(sweep_dir, CANCELLED_FILE).exists()


def reopen(sweep_dir: str | os.PathLike[str]) -> None:
    """Removes the mark, if it is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        Path(sweep_dir, CANCELLED_FILE).unlink()

"""Forks trainings that can be killed anywhere, and tells whether a run differs from another one.

The process that forks has imported everything and runs nothing of torch, so an attempt starts in a tenth of a second.
"""

import io
import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from domainbed import records, training
from domainbed.scripts import train, train_execution

PLACES: dict[str, tuple[Any, str]] = {
    "update": (training, "_update"),
    "measure": (training, "measure"),
    "snapshot": (train_execution.Execution, "save"),
    "record": (records, "append"),
    "model": (training, "save_model"),
    "explain": (train_execution, "explain"),
}
PHASES = ("start", *PLACES, "between")  # start: before any of them; between: after and between them
OPERATIONS = (
    (torch, "save"), (os, "write"), (os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "truncate"),
    (os, "ftruncate"), (os, "unlink"), (os, "link"),
)  # fmt: skip
WRITES = ("save", "write", "pwrite")
UNEQUAL_KEYS = ("step_time", "mem_gb")  # of a record
PATIENCE_S = 300.0


class Page:
    """Memory shared with a child: what that is doing, how often it began to, and how long it took."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self.clear()

    def clear(self) -> None:
        for i in range(1 + 2 * len(PHASES)):
            self._numbers[i] = 0
        self._numbers[1] = 1  # the start has begun

    @property
    def phase(self) -> str:
        return PHASES[int(self._numbers[0])]

    @phase.setter
    def phase(self, name: str) -> None:
        self._numbers[0] = PHASES.index(name)

    def entries(self, phase: str) -> int:
        return int(self._numbers[1 + PHASES.index(phase)])

    def seconds(self, phase: str) -> float:
        return self._numbers[1 + len(PHASES) + PHASES.index(phase)]

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Says that the body is that phase; what is around it is between phases from then on."""
        started, outer = time.perf_counter(), self.phase
        if outer == "start":
            outer = "between"
            self._numbers[1 + len(PHASES)] = started - self.watched_since
        self._begin(phase)
        try:
            yield
        finally:
            self._numbers[1 + len(PHASES) + PHASES.index(phase)] += time.perf_counter() - started
            self._begin(outer)

    def _begin(self, phase: str) -> None:
        self._numbers[1 + PHASES.index(phase)] += 1
        self.phase = phase

    def watch(self) -> None:
        """Lets this process's trainings say where they are."""
        self.watched_since = time.perf_counter()
        for phase, (owner, name) in PLACES.items():
            setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return watched


@dataclass
class Operations:
    """Counts this process's file operations and ends it at one of them.

    Attributes:
        fatal: number of the operation at which it ends; -1: none.
        torn: it ends in the midst of that operation, if that writes, and not right before it.
        log: gets a line for each operation.
        done: how many there were.
    """

    fatal: int = -1
    torn: bool = False
    log: Path | None = None
    done: int = 0

    def watch(self) -> None:
        """Lets this process's trainings be counted."""
        file = open(self.log, "w", buffering=1) if self.log else io.StringIO()  # noqa: SIM115
        for owner, name in OPERATIONS:
            setattr(owner, name, self._watched(name, getattr(owner, name), file))

    def _watched(self, name: str, function: Callable[..., Any], file: TextIO) -> Callable[..., Any]:
        pid = os.getpid()

        def watched(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() == pid:  # not a loader's process
                if self.done == self.fatal:
                    self._die(name, function, args)
                self.done += 1
                file.write(f"{name}\n")
            return function(*args, **kwargs)

        return watched

    def _die(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self.torn and name == "save":
            content, file = args
            buffer = io.BytesIO()
            function(content, buffer)
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
        elif self.torn and name in WRITES:
            descriptor, line, *offset = args
            function(descriptor, line[: len(line) // 2], *offset)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Attempt:
    """A process that trains, the leader of its own group."""

    pid: int
    status: int | None = None  # as subprocess has it: negative after a signal

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> int:
        """Its exit status; RuntimeError if it does not end."""
        end = time.monotonic() + PATIENCE_S
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise RuntimeError(f"a training has not ended in {PATIENCE_S:g} s")
            time.sleep(0.002)
        return status

    def kill(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def start(argv: Sequence[str], log: Path, *watchers: Callable[[], None], modules: Path | None = None) -> Attempt:
    """Forks a training.

    Args:
        log: what it prints is appended here.
        watchers: called in the child first.
        modules: gets the names of all modules that are imported by its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _train_and_exit(argv, log, watchers, modules)
    with suppress(OSError):  # the child does so too; whoever is first
        os.setpgid(pid, pid)
    return Attempt(pid)


def _train_and_exit(
    argv: Sequence[str], log: Path, watchers: Sequence[Callable[[], None]], modules: Path | None
) -> None:
    status = 70
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        for watch in watchers:
            watch()
        status = train.main(argv)
        if modules:
            modules.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def difference(reference: Path, run: Path) -> str:
    """What of a run's directory is not as in another one; "" if nothing is.

    Bytes of models, and of records but for their times, must be equal, and no file may be missing or left over.
    """
    there, here = ({path.name for path in directory.iterdir()} for directory in (reference, run))
    if there != here:
        return f"left over: {sorted(here - there)}, missing: {sorted(there - here)}"
    for name in sorted(there):
        left, right = (_content(directory / name) for directory in (reference, run))
        if left != right:
            return f"{name} differs{_where(left, right)}"
    return ""


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [json.dumps({k: v for k, v in line.items() if k not in UNEQUAL_KEYS}) for line in lines]
    return None if path.suffix == ".txt" else path.read_bytes()


def _where(left: Any, right: Any) -> str:
    if not isinstance(left, list):
        return ""
    if len(left) != len(right):
        return f": {len(right)} lines in place of {len(left)}"
    number, pair = next((i, pair) for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
    there, here = map(json.loads, pair)
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    return f" in line {number}: {', '.join(keys)}"

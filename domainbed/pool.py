"""Commands run several at a time on this machine, beside other launchers, and again where that helps."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from domainbed import job_lists, states
from domainbed.children import Child, ForkServer, ProcessChild, can_fork
from domainbed.claims import EXIT_LOCKED
from domainbed.commands import Command
from domainbed.interruption import EXIT_PREEMPTED, SIGNALS
from domainbed.states import EXIT_BAD_INPUT, EXIT_FAILED, State

_POLL_S = 0.02
_GRACE_S = 60.0  # a training process that is told to end saves its state first
_LOOK_S = 1.0  # between two looks whether the sweep was cancelled
_ELSEWHERE_S = 3.0  # between two looks at jobs that other processes run
_LINE_S = 30.0  # between two lines that say how far it is, where there is no terminal
_SHOWN_FAILURES = 5
_IN_VAIN = 10  # stops in a row without a step between them, until a job counts as failed


class Unavailable(RuntimeError):
    """This machine lacks what a launcher runs commands on."""


@dataclass
class _Task:
    """A command, its place in the list, and what has become of it so far."""

    index: int
    command: str
    failures: int = 0
    stops: int = 0  # in a row, all at this step
    step: int | None = None

    @property
    def directory(self) -> str | None:
        """Where its state can be read; a plain string, DomainBed's kind of command, runs once and that is it."""
        return self.command.output_dir if isinstance(self.command, Command) else None

    def gets_nowhere(self) -> bool:
        """Counts that it was stopped; whether that is too often now, which its directory then says."""
        step = states.read(self.directory or "").step
        self.stops = self.stops + 1 if step == self.step else 1
        self.step = step
        if self.stops < _IN_VAIN:
            return False
        error = f"was stopped {_IN_VAIN} times in a row without getting on"
        states.write_failure(self.directory or "", error, EXIT_PREEMPTED)
        return True


@dataclass
class _Attempt:
    """A task that runs: its process, and the environment it occupies."""

    task: _Task
    child: Child
    environment: dict[str, str]


class _Progress:
    """Counts on stderr: a live bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, desc="jobs", file=sys.stderr, disable=not sys.stderr.isatty(), miniters=1)
        self.total, self.began, self.shown, self.due = total, time.monotonic(), "", _LINE_S

    def show(self, counts: Mapping[str, int], last: bool) -> None:
        ended = counts["done"] + counts["failed"]
        seconds = time.monotonic() - self.began
        text = ", ".join(f"{name}={count}" for name, count in counts.items())
        if not self.bar.disable:
            if text != self.shown or seconds >= self.due:
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(ended - self.bar.n)
                self.bar.refresh()
                self.shown, self.due = text, seconds + 1
        elif last or seconds >= self.due:
            print(f"jobs: {ended}/{self.total} [{tqdm.format_interval(seconds)}, {text}]", file=sys.stderr, flush=True)
            self.due = seconds + _LINE_S


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


class _Sweeps:
    """The directories of the sweeps that tasks belong to, watched for being cancelled."""

    def __init__(self, directories: Iterable[str]):
        self.directories = set(directories)
        self.next_look = 0.0

    def look_now(self) -> None:
        self.next_look = 0.0

    def are_cancelled(self) -> bool:
        """Looks about once a second."""
        if time.monotonic() < self.next_look:
            return False
        self.next_look = time.monotonic() + _LOOK_S
        cancelled = any(map(job_lists.is_cancelled, self.directories))
        if cancelled:
            _say("The sweep was cancelled.")
        return cancelled


class _Elsewhere:
    """The tasks that other processes run, as far as is known."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.next_look = 0.0
        self.has_said = False

    def look(self, idle: bool) -> list[tuple[_Task, int]]:
        """Gives up those that are no longer run, every few seconds, with what their directories say.

        Args:
            idle: whether nothing else is to be done; that is said once.
        """
        if not self.tasks or time.monotonic() < self.next_look:
            return []
        if idle and not self.has_said:
            _say(f"Waiting for {len(self.tasks)} jobs that run elsewhere (Ctrl-C leaves them).")
            self.has_said = True
        self.next_look = time.monotonic() + _ELSEWHERE_S
        found = [(task, states.code_of(task.directory or "")) for task in self.tasks]
        self.tasks = [task for task, code in found if code == EXIT_LOCKED]
        return [(task, code) for task, code in found if code != EXIT_LOCKED]


class _Starter:
    """Starts commands, trainings as forks if that is wanted, and replaces a fork server that is gone."""

    def __init__(self, environment: Mapping[str, str], fork: bool):
        self.environment, self.fork = environment, fork
        self.server: ForkServer | None = None

    def start(self, command: str, environment: Mapping[str, str]) -> Child:
        """Raises Unavailable if the fork server can't start."""
        if not (self.fork and can_fork(command)):
            return ProcessChild(command, environment)
        if self.server is not None and self.server.ended:
            self._bury(self.server)
        if self.server is None:
            self.server = ForkServer(self.environment)
        return self.server.start(command, environment)

    def _bury(self, server: ForkServer) -> None:
        text = f"The fork server has ended ({server.epitaph()})"
        if not server.ready:
            raise Unavailable(f"{text}; --isolation process does without it")
        _say(f"{text}; starting another one.")
        self.close()

    def stop(self) -> None:
        """Lets the server start nothing of what was asked of it."""
        if self.server is not None:
            self.server.stop()

    def close(self) -> None:
        """Ends the server."""
        if self.server is not None:
            self.server.close()
            self.server = None


class Pool:
    """Runs commands, at most one at a time in each environment.

    What another process runs is taken up only if that one leaves it; so any number of launchers share a sweep.

    Args:
        commands: see ``command_launchers.local_launcher``.
        environments: complete, equal but for the GPUs.
        retries: how often a job that failed is tried again.
        fork: whether trainings are forked.
    """

    def __init__(self, commands: Sequence[str], environments: Sequence[dict[str, str]], retries: int, fork: bool):
        self.waiting = deque(_Task(index, command) for index, command in enumerate(commands))
        self.free = deque(environments)
        self.running: list[_Attempt] = []
        self.elsewhere, self.progress = _Elsewhere(), _Progress(len(commands))
        self.codes = [EXIT_PREEMPTED] * len(commands)
        self.counts = {"done": 0, "failed": 0, "running": 0, "elsewhere": 0}
        self.retries, self.began = retries, time.time()
        self.starter = _Starter(environments[0], fork)
        self.sweeps = _Sweeps(os.path.dirname(task.directory) for task in self.waiting if task.directory)

    def run(self) -> list[int]:
        """Returns the exit codes in the commands' order; EXIT_PREEMPTED for what a cancelled sweep leaves undone."""
        with _signals_exit(), self.progress.bar:
            try:
                while (self.waiting or self.running or self.elsewhere.tasks) and not self.sweeps.are_cancelled():
                    self.start()
                    if not self.collect():
                        time.sleep(_POLL_S)
                    self.look_elsewhere()
                    self.show()
            finally:
                self.end()
                self.show(last=True)
        return self.codes

    def show(self, last: bool = False) -> None:
        self.counts |= {"running": len(self.running), "elsewhere": len(self.elsewhere.tasks)}
        self.progress.show(self.counts, last)

    def start(self) -> None:
        """Fills the free environments with what is neither done nor runs elsewhere."""
        while self.waiting and self.free:
            task = self.waiting.popleft()
            status = states.read(task.directory) if task.directory else states.QUEUED
            if status.state is State.RUNNING:
                self.elsewhere.tasks.append(task)
            elif status.state is State.DONE:
                self.finish(task, 0)
            elif status.state is State.FAILED and (status.time or 0) > self.began and not task.failures:
                self.finish(task, EXIT_FAILED)  # another launcher has tried it as often as it was told to
            else:
                if task.directory:
                    _forget_failure(task.directory)
                with _uninterrupted():  # else one that has begun would be in no list of those to end
                    child = self.starter.start(task.command, self.free[0])
                    self.running.append(_Attempt(task, child, self.free.popleft()))

    def collect(self) -> bool:
        """Takes in what has ended; whether anything had."""
        ended = [(attempt, code) for attempt in self.running if (code := attempt.child.poll()) is not None]
        for attempt, code in ended:
            self.running.remove(attempt)
            self.free.append(attempt.environment)
            self.take(attempt, code)
            attempt.child.close()
        return bool(ended)

    def take(self, attempt: _Attempt, code: int) -> None:
        """Decides what becomes of a task that has ended."""
        task = attempt.task
        if task.directory is None:
            self.finish(task, code, attempt.child)
            return
        again = code != EXIT_BAD_INPUT and task.failures < self.retries
        if code not in (0, EXIT_LOCKED, EXIT_PREEMPTED):
            code = _settle(attempt, task.directory, code, again)
        if code == EXIT_LOCKED:
            self.elsewhere.tasks.append(task)
        elif code == EXIT_PREEMPTED and not task.gets_nowhere():
            self.sweeps.look_now()  # whoever stopped it may have cancelled the sweep
            self.waiting.append(task)
        elif code == EXIT_PREEMPTED:
            self.finish(task, EXIT_FAILED)
        elif code and again:
            task.failures += 1
            self.waiting.appendleft(task)
        else:
            self.finish(task, code, attempt.child)

    def finish(self, task: _Task, code: int, child: Child | None = None) -> None:
        self.codes[task.index] = code
        self.counts["failed" if code else "done"] += 1
        if code and self.counts["failed"] <= _SHOWN_FAILURES:
            _say_failed(task, code, child)

    def look_elsewhere(self) -> None:
        """When nothing else waits, takes in what has become of the jobs that other processes run."""
        if self.waiting:
            return
        for task, code in self.elsewhere.look(idle=not self.running):
            if code == EXIT_PREEMPTED:  # whoever had it is gone
                self.waiting.append(task)
            else:
                self.finish(task, code)

    def end(self) -> None:
        """Ends what still runs, gently if there is time for that."""
        self.starter.stop()
        try:
            _end([attempt.child for attempt in self.running])
        finally:
            for attempt in self.running:
                if attempt.child.poll() == 0:
                    self.finish(attempt.task, 0)
                attempt.child.close()
            self.running = []
            self.starter.close()


def _say_failed(task: _Task, code: int, child: Child | None) -> None:
    why = child.last_lines() if child else states.read(task.directory or "").error
    killed = f" ({child.why()})" if child and code < 0 else ""
    _say(f"exit status {code}{killed}: {task.command}\n{why}".rstrip())


def _settle(attempt: _Attempt, directory: str, code: int, again: bool) -> int:
    """The exit code of a failed job, as its directory knows better; says there why it failed, unless train has.

    Args:
        again: whether it is tried again if it has failed.
    """
    status = states.read(directory)
    if status.state is State.DONE:
        return 0
    if status.state is State.RUNNING:
        return EXIT_LOCKED
    if status.state is not State.FAILED and -code in SIGNALS:  # asked to end when it had saved, or had yet to begin
        return EXIT_PREEMPTED
    if status.state is not State.FAILED:
        _note_end(directory, attempt.child, code)
        if not again:
            states.write_failure(directory, attempt.child.why(), code)
    return code


def _forget_failure(directory: str) -> None:
    """Removes what a directory tells of an earlier try; if that can't be, the next one says why."""
    with suppress(OSError):
        Path(directory, states.FAILED_FILE).unlink()


def _note_end(directory: str, child: Child, code: int) -> None:
    """Adds to a job's err.txt how its process ended, which could not say so itself."""
    try:
        os.makedirs(directory, exist_ok=True)
        with open(Path(directory, "err.txt"), "a", encoding="utf-8") as file:
            killed = f": {child.why()}" if code < 0 else ""
            file.write(f"exit status {code}{killed}\n{child.last_lines()}".rstrip() + "\n")
    except OSError as error:
        _say(f"{directory}: how it ended (exit status {code}) can't be written to err.txt: {error.strerror}")


def _end(children: Sequence[Child]) -> None:
    """Asks all to end, then kills what is left after a while, or at once on a second Ctrl-C."""
    if not children:
        return
    _say(f"Ending {len(children)} running commands; again to kill them.")
    deadline = time.monotonic() + _GRACE_S
    untold = list(children)
    try:
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            untold = [child for child in untold if not child.signal_group(signal.SIGTERM)]
            time.sleep(_POLL_S)
    finally:
        for child in children:
            child.signal_group(signal.SIGKILL)
        while any(child.pid is not None and child.poll() is None for child in children):
            time.sleep(_POLL_S)


@contextmanager
def _handled(numbers: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C and what schedulers send."""
    caught: list[int] = []
    try:
        with _handled((signal.SIGINT, *SIGNALS), lambda number, frame: caught.append(number)):
            yield
    finally:
        for number in caught[:1]:
            signal.raise_signal(number)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _signals_exit() -> AbstractContextManager[None]:
    """Lets what schedulers send unwind the stack as Ctrl-C does, so that the children are ended."""
    return _handled(SIGNALS, _exit)

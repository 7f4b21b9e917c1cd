"""What a SLURM task does: train jobs one after the other, see to it that they save in time, and come back for the rest.

How SLURM ends a task, and what makes it go on:

- The time limit, or preemption where the cluster announces it by a signal of the user's: SIGUSR2 some time before.
  submitit's handler calls ``TrainTask.checkpoint``, which waits until the job has saved; then it requeues the task.
- Preemption without that: SIGTERM. submitit passes over it; the job saves, and the task stays until SLURM ends it,
  because SLURM puts back into the queue only what it has ended itself.
- A lost node: SLURM requeues the task by itself.

A task that starts again looks into the jobs' directories, so what was pickled for it never gets old.
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

from domainbed import children, claims, holders, interruption, job_lists, states
from domainbed.commands import program, thread_limits

logger = logging.getLogger(__name__)

STAY_S = 600.0  # after SIGTERM; by then SLURM has ended what it wants to end
POLL_S, REMIND_S = 0.1, 2.0

Job = tuple[tuple[str, ...], str]  # the words of its command, its directory


class TrainTask:
    """Runs jobs one after the other; submitit pickles it, so it consists of words and numbers.

    Args:
        jobs: commands with their directories.
        retries: how often a failed job is tried again.
        threads: CPU threads of a job.
        grace_s: how long a job may take to save before the time limit; what it does not save it repeats.
    """

    def __init__(self, jobs: Sequence[Job], retries: int = 1, threads: int = 1, grace_s: float = 70.0):
        self.jobs, self.retries, self.threads, self.grace_s = list(jobs), retries, threads, grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False  # to end, by a signal

    @property
    def names(self) -> list[str]:
        """The directories' names, by which the sweep knows the jobs."""
        return [os.path.basename(directory) for _, directory in self.jobs]

    def __call__(self) -> None:
        with self._hearing_sigterm():
            for argv, directory in self.jobs:
                self._train(argv, directory)

    def checkpoint(self) -> Any:
        """Has the running job save and end; what submitit calls before it requeues the task."""
        from submitit.helpers import DelayedSubmission

        self._told = True
        self._wait(time.monotonic() + self.grace_s)
        return DelayedSubmission(TrainTask(self.jobs, self.retries, self.threads, self.grace_s))

    @contextmanager
    def _hearing_sigterm(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            self._told = True

        previous = signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _train(self, argv: Sequence[str], directory: str) -> None:
        """Sees a job through, unless it is over: done, or failed since it was submitted."""
        self._outlast(directory)
        if states.read(directory).state in (states.State.DONE, states.State.FAILED):
            return
        code, out_of_memory = 0, False
        for i in range(1, self.retries + 2):
            if self._is_cancelled():
                return
            killed = children.oom_kills()
            code = self._run(argv)
            out_of_memory = children.oom_kills() > killed
            if self._told:
                self._stay()
            if code in (0, claims.EXIT_LOCKED):
                return
            logger.warning("%s: %s (try %d of %d)", directory, failure(code, out_of_memory), i, self.retries + 1)
            if code == states.EXIT_BAD_INPUT:
                break
        told_to_end = (interruption.EXIT_PREEMPTED, *(-number for number in interruption.SIGNALS))
        if code not in told_to_end and not Path(directory, states.FAILED_FILE).exists():
            states.write_failure(directory, failure(code, out_of_memory), code)

    def _outlast(self, directory: str) -> None:
        """Waits, in a task that starts again, until the claim of the node that was lost has expired."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        deadline = time.monotonic() + (holders.EXPIRY_S if restarts else 0)
        while time.monotonic() < deadline and states.read(directory).state == states.State.RUNNING:
            time.sleep(1)

    def _run(self, argv: Sequence[str]) -> int:
        """Runs a command to its end; ``python`` is this interpreter. Train keeps its own stdout."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)  # till their handlers know the process
        try:
            self._process = process = subprocess.Popen(
                program(argv),
                env=os.environ | thread_limits(self.threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda: _ignore_signals(mask),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            self._wait(inf)
        finally:
            self._process = None
            code = process.wait()  # it has ended, also where submitit's handler ends this process
        return code

    def _wait(self, deadline: float) -> None:
        """Waits for the job's end, asks for it as long as that is wanted, and enforces it after the deadline.

        Runs within itself, as a signal's handler may wait for what the interrupted code waits for. So nothing here
        takes the process's status, nor a lock. Asks repeatedly: a process that has just started does not hear yet.
        """
        asked = -inf
        while self._process is not None and not _has_ended(self._process.pid):
            now = time.monotonic()
            if now >= deadline:
                os.kill(self._process.pid, signal.SIGKILL)
            elif self._told and now >= asked + REMIND_S:
                os.kill(self._process.pid, signal.SIGTERM)
                asked = now
            time.sleep(POLL_S)

    def _stay(self) -> None:
        """Waits to be ended; goes on if nobody does."""
        deadline = time.monotonic() + STAY_S
        while time.monotonic() < deadline and not self._is_cancelled():
            time.sleep(POLL_S)
        self._told = False

    def _is_cancelled(self) -> bool:
        return job_lists.is_cancelled(os.path.dirname(self.jobs[0][1]))


def _ignore_signals(mask: set[int | signal.Signals]) -> None:
    """In the new process: SLURM signals every process of a task, also those that have no handler yet."""
    for number in interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; leaves its status to whoever waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # the interrupted code has just taken it
        return True


def failure(code: int, out_of_memory: bool) -> str:
    """What to say of a job that ended with this exit status (negative: by that signal) and could not say it itself."""
    limit = os.environ.get("SLURM_MEM_PER_NODE")
    memory = f"SLURM allows {limit} MB, see --slurm_mem_gb" if limit else "see --slurm_mem_gb"
    if code == -signal.SIGKILL:
        if out_of_memory:
            return f"out of memory: killed by the kernel ({memory})"
        return f"killed by SIGKILL, as where memory runs out ({memory})"
    if code == interruption.EXIT_PREEMPTED:
        return "told to end, has saved"
    return children.killed_by(code) if code < 0 else f"exit status {code}; its log says more"

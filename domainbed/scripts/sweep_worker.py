"""The sweep script's worker: for schedulers that start processes of their own, as Kubernetes' Indexed Jobs do."""

import argparse
from collections.abc import Sequence

from domainbed import command_launchers, job_lists, states
from domainbed.claims import EXIT_LOCKED
from domainbed.interruption import EXIT_PREEMPTED
from domainbed.jobs import Job
from domainbed.scripts import BadInput
from domainbed.scripts.sweep_launch import enlist, find_launcher, hand_over, usable
from domainbed.states import State

LAUNCHER = "local"
_READY = (State.QUEUED, State.PREEMPTED, State.RUNNING)


def work(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Runs the jobs that are neither done nor failed, if nobody else does; or the one of ``--index``.

    Returns:
        0; 1 if a job failed; with ``--index``, the exit code of its training: EXIT_PREEMPTED asks for another start.

    Raises:
        BadInput: there is no job of that index, or the jobs can't be run here.
    """
    args.command_launcher = LAUNCHER
    args.workers = 1 if args.workers is None else args.workers
    launcher = find_launcher(args)
    if args.index is not None and args.index >= len(jobs):
        raise BadInput(f"--index {args.index}: there are {len(jobs)} jobs; name one of 0 to {len(jobs) - 1}")
    if job_lists.is_cancelled(args.output_dir):
        print("The sweep is cancelled; `sweep launch` opens it again.")
        return 0
    if args.index is not None:
        return _work_on_one(jobs[args.index], args, launcher)
    enlist(jobs, args.output_dir)
    return _work_on_all(jobs, launcher)


def _work_on_all(jobs: Sequence[Job], launcher: command_launchers.Launcher) -> int:
    ready = [job for job in jobs if job.status.state in _READY]
    running = sum(job.status.state is State.RUNNING for job in ready)
    print(f"{len(ready)} of {len(jobs)} jobs are to be done; {running} of them are running and are waited for.")
    return hand_over(ready, launcher, "start a worker again") if ready else 0


def _work_on_one(job: Job, args: argparse.Namespace, launcher: command_launchers.Launcher) -> int:
    print(job)
    if job.status.state is State.DONE:
        return 0
    enlist([job], args.output_dir)
    try:
        with usable():
            [code] = launcher([job.command_str])
    except SystemExit:  # we were told to end, and have told the training
        code = states.code_of(job.output_dir)
    except KeyboardInterrupt:
        return 130
    if code not in (0, EXIT_PREEMPTED, EXIT_LOCKED):
        print(f"Failed: {job.output_dir}: {job.last_error()}")
    return int(code) if code >= 0 else 128 - code

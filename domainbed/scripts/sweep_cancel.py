"""The commands of the sweep script that end or remove jobs: cancel, delete_incomplete."""

import argparse
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from domainbed import claims, holders, job_lists, states
from domainbed.jobs import Job
from domainbed.scripts import BadInput, bad_input
from domainbed.scripts.sweep_jobs import ask_for_confirmation, check_output_dir
from domainbed.states import State


def cancel(args: argparse.Namespace) -> int:
    """Ends what runs of a sweep, wherever, once it has saved its work; and lets nobody take another of its jobs.

    Returns:
        0; 1 if a job could not be told.

    Raises:
        BadInput: there is no such directory, or SLURM, which has jobs of the sweep, does not answer.
    """
    sweep = args.output_dir
    with bad_input():
        check_output_dir(sweep)
        if not os.path.isdir(sweep):
            raise FileNotFoundError(f"--output_dir {sweep} does not exist; name the directory of a sweep")
    print(f"About to cancel the sweep in {sweep}: {len(_running(sweep))} jobs are running.")
    if not args.skip_confirmation:
        ask_for_confirmation()
    with bad_input():
        job_lists.cancel(sweep)
        arrays = _cancel_slurm(sweep)
        running = _running(sweep)  # again, for now nobody takes further ones
    told, untold = _stop_all([os.path.join(sweep, name) for name in running])
    print(f"Asked {len(running) - len(untold)} running jobs to save and end; {told} of them on this machine, at once.")
    if arrays:
        print(f"Took the arrays {', '.join(arrays)} from SLURM.")
    print("Nothing is lost: `sweep launch` goes on where they were.")
    for error in untold:
        print(f"Not told, so it runs on: {error}")
    return 1 if untold else 0


def _running(sweep: str) -> list[str]:
    return [name for name, status in states.scan(sweep).items() if status.state is State.RUNNING]


def _stop_all(directories: Sequence[str]) -> tuple[int, list[OSError]]:
    """How many are on this machine, and what went wrong with others."""
    told, untold = 0, []
    for directory in directories:
        try:
            told += stop(directory)
        except OSError as error:
            untold.append(error)
    return told, untold


def stop(directory: str) -> bool:
    """Asks whoever works in the directory to save and end; by a signal too if that is on this machine, then True."""
    with suppress(FileNotFoundError):
        claims.request_stop(directory)
    holder = holders.newest(directory) if os.path.isdir(directory) else None
    if holder is None or holder.pid is None or not holder.is_ours() or not holder.alive(holder.heartbeat):
        return False
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError):  # it has ended meanwhile; or is another user's, who saw the request
        return False
    return True


def _cancel_slurm(sweep: str) -> list[str]:
    """The arrays that were taken from SLURM."""
    if not os.path.isdir(os.path.join(sweep, "slurm")):
        return []
    from domainbed import slurm

    try:
        return slurm.cancel(sweep)
    except slurm.SlurmMissing as error:
        raise BadInput(f"the sweep is marked as cancelled, but SLURM was not told: {error}") from error


def delete_incomplete(jobs: Sequence[Job], skip_confirmation: bool) -> int:
    """Deletes the directories of incomplete jobs that nobody runs."""
    incomplete = [job for job in jobs if job.state == Job.INCOMPLETE]
    print(f"About to delete {len(incomplete)} jobs.")
    if not skip_confirmation:
        ask_for_confirmation()
    if left := len(incomplete) - Job.delete(incomplete):
        print(f"Left {left} jobs that are running or were completed meanwhile.")
    return 0

"""The commands of the sweep script that start jobs: launch, retry_failed, worker, and the launching half of refit."""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from domainbed import command_launchers, job_lists, run_directory
from domainbed.jobs import Job, Outcome
from domainbed.scripts import BadInput, bad_input
from domainbed.scripts.sweep_arguments import LAUNCHER_OPTIONS
from domainbed.scripts.sweep_jobs import ask_for_confirmation
from domainbed.slurm import SlurmMissing
from domainbed.states import State

SHOWN_FAILURES = 5
RUNS_NOTHING = "dummy"
WAITING_LAUNCHERS = ("local", "multi_gpu")  # wait for what runs elsewhere, and take it over if its process dies


def find_launcher(args: argparse.Namespace) -> command_launchers.Launcher:
    """The launcher that the flags name, with their options.

    Raises:
        BadInput: there is none, or it lacks an option.
    """
    with bad_input():
        options = {option: getattr(args, option) for option in LAUNCHER_OPTIONS}
        return command_launchers.find(args.command_launcher, options)


def launch(jobs: Sequence[Job], args: argparse.Namespace, launcher: command_launchers.Launcher) -> int:
    """Launches what is neither done nor failed, nor, by most launchers, running; returns 1 if a job failed.

    Raises:
        BadInput: the output directory can't be used, a job could not run, or the launcher lacks what it runs on.
    """
    fresh = [job for job in jobs if job.state == Job.NOT_LAUNCHED]
    begun = [job for job in jobs if job.state == Job.INCOMPLETE]
    again = [job for job in begun if job.status.state in (State.QUEUED, State.PREEMPTED)]
    running, failed = ([job for job in begun if job.status.state is it] for it in (State.RUNNING, State.FAILED))
    waits = args.command_launcher in WAITING_LAUNCHERS
    print(f"About to launch {len(fresh)} jobs.")
    if begun:
        fate = "waited for" if waits else "left alone"
        print(f"About to start {len(again)} incomplete jobs again; {len(running)} are running and are {fate}.")
    if failed:
        print(f"{len(failed)} failed jobs are left alone: `sweep retry_failed` starts them again.")
    return start(fresh + again + running * waits, jobs, args, launcher)


def retry_failed(jobs: Sequence[Job], args: argparse.Namespace, launcher: command_launchers.Launcher) -> int:
    """Launches the failed jobs again, which go on where they were saved last; returns 1 if one fails again.

    Raises:
        BadInput: as ``launch``.
    """
    failed = [job for job in jobs if job.status.state is State.FAILED]
    print(f"About to start {len(failed)} failed jobs again.")
    return start(failed, jobs, args, launcher)


def start(
    jobs: Sequence[Job], sweep: Sequence[Job], args: argparse.Namespace, launcher: command_launchers.Launcher
) -> int:
    """Asks, puts the whole sweep on its list, and hands the jobs to the launcher; returns 1 if one failed."""
    if not jobs:
        return 0
    job_lists.reopen(args.output_dir)  # first of all: who cancels from now on means this launch
    if args.command_launcher != RUNS_NOTHING:
        importlib.import_module("domainbed.scripts.sweep_checks").check(jobs)
    if not args.skip_confirmation:
        ask_for_confirmation()
    enlist(sweep, args.output_dir)
    return hand_over(jobs, launcher, "launch again")


def hand_over(jobs: Sequence[Job], launcher: command_launchers.Launcher, remedy: str) -> int:
    """Has the jobs run and prints what became of them; returns 1 if one failed, 130 after Ctrl-C."""
    try:
        with usable():
            outcome = Job.launch(jobs, launcher)
    except KeyboardInterrupt:
        print(f"Interrupted; {remedy} to go on.")
        return 130
    return 0 if outcome is None else report(outcome)


@contextmanager
def usable() -> Iterator[None]:
    """Raises BadInput if a launcher lacks what it runs on, or a package, or can't take its options."""
    try:
        yield
    except (command_launchers.Unavailable, SlurmMissing, ImportError, ValueError) as error:
        raise BadInput(str(error)) from error


def enlist(jobs: Sequence[Job], output_dir: str) -> None:
    """Puts the jobs on the sweep's list.

    Raises:
        BadInput: the output directory can't be used.
    """
    with bad_input():
        run_directory.prepare(output_dir)
        job_lists.append_missing(output_dir, jobs)


def report(outcome: Outcome) -> int:
    """Prints what became of the launched jobs and why some failed; returns 1 if any did."""
    elsewhere = f", {len(outcome.elsewhere)} running elsewhere" if outcome.elsewhere else ""
    stopped = f", {len(outcome.stopped)} stopped (launch again to go on)" if outcome.stopped else ""
    for job in outcome.failed[:SHOWN_FAILURES]:
        print(f"Failed: {job.output_dir}: {job.last_error()}")
    if len(outcome.failed) > SHOWN_FAILURES:
        print(f"... and {len(outcome.failed) - SHOWN_FAILURES} more.")
    print(f"{len(outcome.done)} done, {len(outcome.failed)} failed{elsewhere}{stopped}.")
    if outcome.failed:
        print("`sweep retry_failed` starts the failed ones again.")
    return 1 if outcome.failed else 0

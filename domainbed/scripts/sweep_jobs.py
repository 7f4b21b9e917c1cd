"""Which jobs a command of the sweep script is about, how they are listed, and the question before it acts on them."""

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from domainbed import job_lists
from domainbed.jobs import EXTRAS, Job, make_args_list, make_jobs
from domainbed.scripts import bad_input


def more_words(args: argparse.Namespace) -> list[str]:
    """What the jobs' commands say beside the jobs' arguments."""
    words = [] if args.save_every_s is None else ["--save_every_s", f"{args.save_every_s:g}"]
    return words + (["--log_to", *args.log_to] if args.log_to else [])


def _asked(args: argparse.Namespace) -> list[Job]:
    """The jobs that file and flags mean.

    Raises:
        NotImplementedError, ValueError: see ``make_args_list`` and ``make_jobs``.
    """
    args_list = make_args_list(
        args.n_trials,
        args.datasets,
        args.algorithms,
        args.n_hparams_from,
        args.n_hparams,
        args.steps,
        args.data_dir,
        args.task,
        args.holdout_fraction,
        args.single_test_envs,
        args.hparams,
        rows=args.rows,
        test_envs_list=args.test_envs_list,
        budgets=args.budgets,
        official_test_envs=bool(args.official_test_envs),
        controls=args.controls,
        **{key: getattr(args, key) for key in EXTRAS},
    )
    return make_jobs(args_list, args.output_dir, more_words(args))


@contextmanager
def no_collections() -> Iterator[None]:
    """Pauses the garbage collector, which would take a fifth of the time that 20,000 jobs take, for nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_collections()
def sweep_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that file and flags mean, or DomainBed's whole grid, with the states they are in.

    Raises:
        BadInput: they can't be made, or the output directory is a file.
    """
    with bad_input():
        check_output_dir(args.output_dir)
        return _asked(args)


@no_collections()
def listed_jobs(args: argparse.Namespace, needed: bool = True) -> list[Job]:
    """The jobs that file and flags mean; without any, those of the sweep's list.

    Args:
        needed: whether to refuse a sweep without a list; else DomainBed's grid stands in.

    Raises:
        BadInput: they can't be made, or there is no list.
    """
    listed = job_lists.exists(args.output_dir)
    if args.names_jobs or not (needed or listed or not os.path.isdir(args.output_dir)):
        return sweep_jobs(args)
    with bad_input():
        check_output_dir(args.output_dir)
        if not os.path.isdir(args.output_dir):
            raise FileNotFoundError(f"--output_dir {args.output_dir} does not exist; name the directory of a sweep")
        if not job_lists.exists(args.output_dir):
            raise FileNotFoundError(
                f"{args.output_dir} holds no {job_lists.JOBS_FILE}; say by sweep file or flags which jobs are meant"
            )
        return make_jobs([job.args for job in job_lists.read(args.output_dir)], args.output_dir, more_words(args))


def check_output_dir(path: str) -> None:
    """Raises NotADirectoryError if a file is there."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(f"--output_dir {path} is a file; name a directory")


def ask_for_confirmation() -> None:
    """Ends the process unless the answer begins with y."""
    try:
        answer = input("Are you sure? (y/n) ")
    except EOFError:
        print("\nNobody answers (stdin is at its end); pass --skip_confirmation to go on without being asked.")
        answer = "n"
    if not answer.strip().lower().startswith("y"):
        print("Nevermind!")
        sys.exit(0)


def print_jobs(jobs: Sequence[Job]) -> None:
    """Every job, then how many are in which state."""
    counts = [sum(job.state == state for job in jobs) for state in (Job.DONE, Job.INCOMPLETE, Job.NOT_LAUNCHED)]
    summary = "{} jobs: {} done, {} incomplete, {} not launched.".format(len(jobs), *counts)
    print("\n".join([*map(str, jobs), summary]))

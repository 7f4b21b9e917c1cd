"""Launches a grid of training runs, deletes those that did not finish, or trains the chosen draws with fresh seeds.

    python -m domainbed.scripts.sweep launch sweeps/digits.toml --output_dir runs --command_launcher local
    python -m domainbed.scripts.sweep refit sweeps/digits.toml --input_dir runs --output_dir again --seeds 42 8 777

A sweep file is TOML. Its keys are this script's flags, which win over it; ``hparams`` and ``ranges`` may be tables.
Tables ``[[rows]]`` with ``algorithm`` and, as needed, ``partition``, ``label``, ``hparams``, ``ranges``, ``control``
and ``on`` (``sweep_rows.SweepRow``) follow ``algorithms``; ``--algorithms`` on the command line stands in for both.

``refit`` reads the records of a search and launches, per row, dataset and test environments, the draw that is best on
validation, once for each of the seeds. Datasets, algorithms and rows, where they are given, say which of the search's
to take. Whatever else a run was trained with stays, unless a flag or the file says otherwise; what only describes the
search (hparams, ranges, label, numbers of draws and trials, test environments, splits) means nothing to it.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed import command_launchers, refit, run_directory
from domainbed.jobs import EXTRAS, Job, Outcome, all_test_env_combinations, make_args_list, make_jobs
from domainbed.lib import reporting
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.sweep_arguments import LAUNCHER_OPTIONS, OF_THE_SEARCH, default_names, parse
from domainbed.sweep_rows import SweepRow

logger = logging.getLogger(__name__)

__all__ = ["Job", "all_test_env_combinations", "ask_for_confirmation", "main", "make_args_list"]

SHOWN_FAILURES = 5


def __getattr__(name: str) -> list[str]:
    """``DATASETS``, the default datasets, is read from the files when it is asked for."""
    if name == "DATASETS":
        return default_names("datasets")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def more_words(args: argparse.Namespace) -> list[str]:
    """What the jobs' commands say beside the jobs' arguments."""
    return [] if args.save_every_s is None else ["--save_every_s", f"{args.save_every_s:g}"]


def sweep_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments mean, with the states they are in.

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
        official_test_envs=bool(args.official_test_envs),
        controls=args.controls,
        **{key: getattr(args, key) for key in EXTRAS},
    )
    return make_jobs(args_list, args.output_dir, more_words(args))


def refit_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that train the chosen draws of ``args.input_dir`` with fresh seeds; prints what was chosen.

    Raises:
        FileNotFoundError: there is no search, or nothing in it of what is asked for.
        ValueError: see ``refit.choose_draws`` and ``make_jobs``; or the output would go to the search.
    """
    if os.path.realpath(args.input_dir) == os.path.realpath(args.output_dir):
        raise ValueError(f"--output_dir {args.output_dir} holds the search; name another one for its chosen draws")
    records = searched_records(args)
    if len({record["args"]["trial_seed"] for record in records}) > 1:
        logger.warning("the search has several trial seeds: rows may be refit on different splits; see --n_trials 1")
    draws = refit.choose_draws(records, args.criterion, args.controls)
    changes = {key: getattr(args, key) for key in ("steps", "data_dir", *EXTRAS) if key not in OF_THE_SEARCH}
    jobs = make_jobs(refit.refit_args_list(draws, args.seeds, changes), args.output_dir, more_words(args))
    for draw in draws:
        print(f"Chosen by {args.criterion}: {draw}")
    return jobs


def searched_records(args: argparse.Namespace) -> list[refit.Record]:
    """The records of ``args.input_dir`` that the given datasets, algorithms and rows leave; warns of unfinished runs.

    Raises:
        FileNotFoundError: there are none.
    """
    if not os.path.isdir(args.input_dir):
        raise FileNotFoundError(f"--input_dir {args.input_dir} is no directory; name the --output_dir of a sweep")
    records = reporting.load_records(args.input_dir)
    if not len(records):
        raise FileNotFoundError(f"--input_dir {args.input_dir} holds no records; name the --output_dir of a sweep")
    rows = [*map(SweepRow.parse, args.algorithms or ()), *args.rows]
    taken = refit.wanted(records, args.datasets or (), rows)
    if not taken:
        raise FileNotFoundError(f"--input_dir {args.input_dir} holds no records of these datasets and algorithms")
    _warn_of_unfinished(args.input_dir)
    return taken


def _warn_of_unfinished(input_dir: str) -> None:
    unfinished = [path for path in Path(input_dir).iterdir() if path.is_dir() and not run_directory.is_done(path)]
    if unfinished:
        logger.warning("%d runs in %s are not finished; they count as far as they got", len(unfinished), input_dir)


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
    for job in jobs:
        print(job)
    counts = [sum(job.state == state for job in jobs) for state in (Job.DONE, Job.INCOMPLETE, Job.NOT_LAUNCHED)]
    print("{} jobs: {} done, {} incomplete, {} not launched.".format(len(jobs), *counts))


def launch(jobs: Sequence[Job], args: argparse.Namespace, launcher: command_launchers.Launcher) -> int:
    """Launches what is neither done nor running; returns 1 if a job failed.

    Raises:
        BadInput: the output directory can't be used, or the launcher lacks what it runs on.
    """
    fresh = [job for job in jobs if job.state == Job.NOT_LAUNCHED]
    incomplete = [job for job in jobs if job.state == Job.INCOMPLETE]
    again = [job for job in incomplete if not job.is_running()]
    print(f"About to launch {len(fresh)} jobs.")
    if incomplete:
        running = len(incomplete) - len(again)
        print(f"About to start {len(again)} incomplete jobs again; {running} are running and are left alone.")
    if not fresh + again:
        return 0
    if not args.skip_confirmation:
        ask_for_confirmation()
    with bad_input():
        run_directory.prepare(args.output_dir)
    try:
        outcome = Job.launch(fresh + again, launcher)
    except KeyboardInterrupt:
        print("Interrupted; launch again to go on.")
        return 130
    except command_launchers.Unavailable as error:
        raise BadInput(str(error)) from error
    return 0 if outcome is None else report(outcome)


def report(outcome: Outcome) -> int:
    """Prints what became of the launched jobs and why some failed; returns 1 if any did."""
    elsewhere = f", {len(outcome.elsewhere)} running elsewhere" if outcome.elsewhere else ""
    for job in outcome.failed[:SHOWN_FAILURES]:
        print(f"Failed: {job.output_dir}: {job.last_error()}")
    if len(outcome.failed) > SHOWN_FAILURES:
        print(f"... and {len(outcome.failed) - SHOWN_FAILURES} more.")
    print(f"{len(outcome.done)} done, {len(outcome.failed)} failed{elsewhere}.")
    return 1 if outcome.failed else 0


def delete_incomplete(jobs: Sequence[Job], skip_confirmation: bool) -> int:
    """Deletes the directories of incomplete jobs that nobody runs."""
    incomplete = [job for job in jobs if job.state == Job.INCOMPLETE]
    print(f"About to delete {len(incomplete)} jobs.")
    if not skip_confirmation:
        ask_for_confirmation()
    if left := len(incomplete) - Job.delete(incomplete):
        print(f"Left {left} jobs that are running or were completed meanwhile.")
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the script with these arguments; returns its exit status."""
    with bad_input():
        args = parse(argv)
        options = {option: getattr(args, option) for option in LAUNCHER_OPTIONS}
        deletes = args.command == "delete_incomplete"
        launcher = None if deletes else command_launchers.find(args.command_launcher, options)
        if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
            raise NotADirectoryError(f"--output_dir {args.output_dir} is a file; name a directory")
        jobs = refit_jobs(args) if args.command == "refit" else sweep_jobs(args)
    print_jobs(jobs)
    if launcher is None:
        return delete_incomplete(jobs, args.skip_confirmation)
    return launch(jobs, args, launcher)


if __name__ == "__main__":
    run_cli(main)

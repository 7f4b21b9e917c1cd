"""Launches a grid of training runs, or deletes those that did not finish.

    python -m domainbed.scripts.sweep launch sweeps/digits.toml --output_dir runs --command_launcher local

A sweep file is TOML. Its keys are this script's flags, which win over it; ``hparams`` may be a table. Tables
``[[rows]]`` with ``algorithm`` and, as needed, ``partition``, ``label`` and ``hparams`` follow ``algorithms``;
``--algorithms`` on the command line stands in for both.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from domainbed import command_launchers, messages, registry, run_directory
from domainbed.jobs import EXTRAS, Job, Outcome, SweepRow, all_test_env_combinations, make_args_list, make_jobs
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser

__all__ = ["Job", "all_test_env_combinations", "ask_for_confirmation", "main", "make_args_list"]

DOMAINBED_FLAGS = (
    "datasets", "algorithms", "task", "n_hparams_from", "n_hparams", "output_dir", "data_dir", "seed", "n_trials",
    "command_launcher", "steps", "hparams", "holdout_fraction", "single_test_envs", "skip_confirmation",
)  # fmt: skip
SHOWN_FAILURES = 5


def __getattr__(name: str) -> list[str]:
    """``DATASETS``, the default datasets, is read from the files when it is asked for."""
    if name == "DATASETS":
        return default_names("datasets")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def default_names(package: str) -> list[str]:
    """DomainBed's algorithms or datasets, as far as we have them, without the debugging ones."""
    ours = registry.names(package)
    return [name for name in registry.order(package) if name in ours and "Debug" not in name]


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def _environments(text: str) -> list[int]:
    """The environments in "1,2"."""
    try:
        return [int(env) for env in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of environments such as 0 or 1,2") from None


def make_parser() -> DomainBedParser:
    """The parser; whatever a sweep file may set has no default here that would hide it."""
    parser = DomainBedParser(DOMAINBED_FLAGS, description="Launch a grid of training runs, or delete unfinished ones.")
    add = parser.add_argument
    add("command", choices=["launch", "delete_incomplete"])
    add("sweep_file", nargs="?", help="TOML file of flags and [[rows]], right after the command")
    add("--datasets", nargs="+", metavar="NAME", help="default: DomainBed's")
    add("--algorithms", nargs="+", metavar="NAME[:PARTITION]", help="default: DomainBed's")
    add("--task", default="domain_generalization", choices=["domain_generalization", "domain_adaptation"])
    add("--n_hparams_from", type=int, default=0, help="first hparams seed")
    add("--n_hparams", type=int, default=20, help="one beyond the last hparams seed; seed 0 is the default hparams")
    add("--output_dir", help="where the jobs' directories lie; required")
    add("--data_dir", help="required unless all datasets are part of the package")
    add("--seed", type=int, default=0, help="without effect, as in DomainBed")
    add("--n_trials", type=int, default=3, help="number of trial seeds")
    add("--command_launcher", help=f"required to launch; {', '.join(command_launchers.REGISTRY)}")
    add("--steps", type=int, help="default: the dataset's")
    add("--hparams", metavar="JSON", help="overrides for all jobs, a JSON object")
    add("--holdout_fraction", type=float, default=0.2, help="share of each environment that is held out")
    add("--single_test_envs", action="store_true", help="leave out single environments, no pairs")
    add("--skip_confirmation", action="store_true", help="do not ask before launching or deleting")
    add("--test_envs_list", nargs="+", type=_environments, metavar="ENVS", help="one per job: 0 1,2 makes two")
    add("--workers", type=_at_least(1), help="commands at a time (launcher local)")
    add("--threads", type=_at_least(0), help="CPU threads of each command, 0 for no limit (launchers local, multi_gpu)")
    add("--label", help="what the tables call these rows")
    add("--checkpoint_freq", type=_at_least(0), help="updates between two records; default: the dataset's")
    add("--precision", choices=["fp32", "bf16"], help="default: fp32")
    add("--eval_splits", choices=["all", "selection"], help="default: all")
    add("--keep_best", choices=["aa_wga"], help="also keep the model that is best on validation")
    add("--input_pipeline", choices=["pil", "cv2", "device"], help="how image files are opened; default: pil")
    add("--confounders", nargs="+", help="whose product forms the groups, for datasets that know several")
    add("--annotation_budget", type=float, help="share of training images with a known confounder; default: 1")
    add("--no_model_save", dest="skip_model_save", action="store_true", help="store no model.pkl")
    return parser


def read_sweep_file(path: str, flags: Sequence[str]) -> tuple[list[str], list[SweepRow]]:
    """A sweep file as command-line words and rows.

    Args:
        flags: the keys that are allowed beside ``rows``.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no TOML, or holds a key or row that means nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such sweep file; name a TOML file, or give the sweep as flags")
    with open(path, "rb") as file:
        try:
            values = tomllib.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    rows = [_row(path, entry) for entry in values.pop("rows", [])]
    for key in values:
        if key not in flags:
            raise ValueError(f"{path}: {messages.not_found('key', key, [*flags, 'rows'])}")
    return [word for key, value in values.items() for word in _as_words(key, value)], rows


def _row(path: str, entry: Any) -> SweepRow:
    if not isinstance(entry, dict) or not isinstance(entry.get("algorithm"), str):
        raise ValueError(f"{path}: each [[rows]] must be a table that names an algorithm; got {entry}")
    known = [field.name for field in fields(SweepRow)]
    for key in entry:
        if key not in known:
            raise ValueError(f"{path}: {messages.not_found('key of [[rows]]', key, known)}")
    if not isinstance(entry.get("hparams", {}), dict):
        raise ValueError(f"{path}: hparams of a row must be a table; got {entry['hparams']}")
    return SweepRow(**entry)


def _as_words(key: str, value: Any) -> list[str]:
    """A key of a sweep file as it would be typed."""
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, Mapping):
        return [f"--{key}={json.dumps(value, sort_keys=True)}"]
    if isinstance(value, list):
        return [f"--{key}", *(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)]
    return [f"--{key}={value}"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line over sweep file over defaults; ``rows`` are the sweep file's.

    Raises:
        OSError, ValueError: see ``read_sweep_file``; or a required flag is missing.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    rows: list[SweepRow] = []
    if args.sweep_file:
        words, rows = read_sweep_file(args.sweep_file, parser.flags())
        rows = rows if args.algorithms is None else []
        args = parser.parse_args(argv, parser.parse_args([args.command, args.sweep_file, *words]))
    for flag in ("output_dir", *(["command_launcher"] if args.command == "launch" else [])):
        if getattr(args, flag) is None:
            raise ValueError(f"--{flag} is required, on the command line or in the sweep file")
    args.rows = rows
    args.datasets = args.datasets or default_names("datasets")
    args.algorithms = args.algorithms or ([] if rows else default_names("algorithms"))
    return args


def sweep_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments mean, with the states they are in.

    Raises:
        NotADirectoryError: the output directory is a file.
        NotImplementedError, ValueError: see ``make_args_list`` and ``make_jobs``.
    """
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise NotADirectoryError(f"--output_dir {args.output_dir} is a file; name a directory")
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
        **{key: getattr(args, key) for key in EXTRAS},
    )
    return make_jobs(args_list, args.output_dir)


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
        options = {"workers": args.workers, "threads": args.threads}
        launcher = command_launchers.find(args.command_launcher, options) if args.command == "launch" else None
        jobs = sweep_jobs(args)
    print_jobs(jobs)
    if launcher is None:
        return delete_incomplete(jobs, args.skip_confirmation)
    return launch(jobs, args, launcher)


if __name__ == "__main__":
    run_cli(main)

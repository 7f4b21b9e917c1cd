"""Launches a grid of training runs, shows how far it is, tries again what failed, cancels, deletes, or refits.

    python -m domainbed.scripts.sweep plan sweeps/digits.toml
    python -m domainbed.scripts.sweep launch sweeps/digits.toml --output_dir runs --command_launcher local
    python -m domainbed.scripts.sweep status --output_dir runs --watch
    python -m domainbed.scripts.sweep retry_failed --output_dir runs --command_launcher local
    python -m domainbed.scripts.sweep cancel --output_dir runs
    python -m domainbed.scripts.sweep worker sweeps/digits.toml --output_dir runs --index $JOB_COMPLETION_INDEX
    python -m domainbed.scripts.sweep refit sweeps/digits.toml --input_dir runs --output_dir again --seeds 42 8 777

A sweep file is TOML. Its keys are this script's flags, which win over it; ``hparams`` and ``ranges`` may be tables.
Tables ``[[rows]]`` with ``algorithm`` and, as needed, ``partition``, ``label``, ``hparams``, ``ranges``, ``control``
and ``on`` (``sweep_rows.SweepRow``) follow ``algorithms``; ``--algorithms`` on the command line stands in for both.

``launch`` starts what is neither done nor running: what never ran, and what was stopped or killed, which goes on where
it was saved last. For what runs, ``local`` and ``multi_gpu`` wait, and take it over if its process dies. What failed
waits for ``retry_failed``. ``delete_incomplete`` removes what is neither done nor running. A launched sweep has a list
of its jobs, so that ``status``, ``retry_failed``, ``worker`` and ``delete_incomplete`` need nothing but its
``--output_dir``; a sweep file or flags choose among its jobs.

``worker`` asks nothing and does as ``local`` does; with ``--index I`` with the I-th job only, whose exit code it hands
on: 0 done, 75 saved and to be started again, 2 bad input, 73 told to end while another process had it, others failed.

``refit`` reads the records of a search and launches, per row, dataset and test environments, the draw that is best on
validation, once for each of the seeds. Datasets, algorithms and rows, where they are given, say which of the search's
to take. Whatever else a run was trained with stays, unless a flag or the file says otherwise; what only describes the
search (hparams, ranges, label, numbers of draws and trials, test environments, splits) means nothing to it.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from domainbed.jobs import Job, all_test_env_combinations, make_args_list
from domainbed.scripts import bad_input, run_cli, sweep_cancel, sweep_launch
from domainbed.scripts.sweep_arguments import default_names, parse
from domainbed.scripts.sweep_jobs import ask_for_confirmation, listed_jobs, print_jobs, sweep_jobs

__all__ = ["Job", "all_test_env_combinations", "ask_for_confirmation", "main", "make_args_list"]


def __getattr__(name: str) -> list[str]:
    """``DATASETS``, the default datasets, is read from the files when it is asked for."""
    if name == "DATASETS":
        return default_names("datasets")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _launch(args: argparse.Namespace) -> int:
    launcher = sweep_launch.find_launcher(args)
    jobs = sweep_jobs(args)
    print_jobs(jobs)
    return sweep_launch.launch(jobs, args, launcher)


def _refit(args: argparse.Namespace) -> int:
    launcher = sweep_launch.find_launcher(args)
    jobs: list[Job] = _verb("sweep_refit").refit_jobs(args)
    print_jobs(jobs)
    return sweep_launch.launch(jobs, args, launcher)


def _retry_failed(args: argparse.Namespace) -> int:
    launcher = sweep_launch.find_launcher(args)
    return sweep_launch.retry_failed(listed_jobs(args), args, launcher)


def _delete_incomplete(args: argparse.Namespace) -> int:
    jobs = listed_jobs(args, needed=False)
    print_jobs(jobs)
    return sweep_cancel.delete_incomplete(jobs, args.skip_confirmation)


def _status(args: argparse.Namespace) -> int:
    return int(_verb("sweep_status").show(args))


def _worker(args: argparse.Namespace) -> int:
    return int(_verb("sweep_worker").work(listed_jobs(args), args))


def _plan(args: argparse.Namespace) -> int:
    args.output_dir = args.output_dir or ""  # a plan may be made before one knows where
    return int(_verb("sweep_plan").plan(args, sweep_jobs(args)) or 0)


def _verb(module: str) -> Any:
    """What only one command needs is imported there, for all of them should start at once."""
    return importlib.import_module(f"domainbed.scripts.{module}")


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "launch": _launch,
    "delete_incomplete": _delete_incomplete,
    "refit": _refit,
    "status": _status,
    "retry_failed": _retry_failed,
    "cancel": sweep_cancel.cancel,
    "worker": _worker,
    "plan": _plan,
}


def main(argv: Sequence[str]) -> int:
    """Runs the script with these arguments; returns its exit status."""
    with bad_input():
        args = parse(argv)
    return COMMANDS[args.command](args)


if __name__ == "__main__":
    run_cli(main)

"""Accuracy of each group over the training: ``figure curves --input_dir runs/sweep``, or ``--runs runs/erm ...``."""

import argparse
from pathlib import Path
from typing import Any

from domainbed import curve_figures, records
from domainbed.scripts import BadInput, bad_input, sweep_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure curves``."""
    sweep_figures.add_arguments(parser, "curves", needed=False)
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", metavar="RUN", help="directories of runs, in place of a sweep; all are shown")
    add("--env", type=int, nargs="+", metavar="E", help="environments, taken together; default: those tested on")
    add("--split", choices=["in", "out"], default="in", help="of these environments (default: in)")


def draw(args: argparse.Namespace) -> None:
    """Draws the figure.

    Raises:
        BadInput: there are no such records, or they lack groups.
    """
    if (args.input_dir is None) == (args.runs is None):
        raise BadInput("give either --input_dir, a sweep, or --runs, directories of runs")
    with bad_input():
        path = sweep_figures.destination(args)
        found = _of_runs(args.runs) if args.runs else sweep_figures.read_all(args.input_dir)
        found, each_run = sweep_figures.of_datasets(found, args.datasets), args.runs is not None
        sweep_figures.save(curve_figures.curves(found, args.criterion, each_run, args.env, args.split), path)


def _of_runs(directories: list[Path]) -> list[dict[str, Any]]:
    """Every record of the runs.

    Raises:
        FileNotFoundError: one of them has none.
    """
    found: list[dict[str, Any]] = []
    for directory in directories:
        file = directory / records.RESULTS_FILE
        if not file.exists():
            raise FileNotFoundError(f"{directory} holds no {records.RESULTS_FILE}; name the directory of a run")
        found += records.read_checkpoints(file)[0]
    return found

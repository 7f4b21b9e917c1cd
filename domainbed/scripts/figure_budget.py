"""Worst-group accuracy of a sweep's rows against their annotation budgets: ``figure budget --input_dir runs/sweep``."""

import argparse

from domainbed import budget_figures
from domainbed.scripts import bad_input, sweep_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure budget``."""
    sweep_figures.add_arguments(parser, "budget")
    parser.add_argument(
        "--axis",
        choices=budget_figures.AXES,
        default="both",
        help="whose budget differs: of training images, of validation images, or of both alike (default)",
    )


def draw(args: argparse.Namespace) -> None:
    """Draws the figure.

    Raises:
        BadInput: there are no such records, or no two budgets.
    """
    with bad_input():
        path = sweep_figures.destination(args)
        found = sweep_figures.of_datasets(sweep_figures.collect(args.input_dir).records, args.datasets)
        sweep_figures.save(budget_figures.budget(found, args.axis, args.criterion), path)

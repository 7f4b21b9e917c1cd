"""Average against worst-group accuracy of a sweep's rows: ``figure scatter --input_dir runs/sweep``."""

import argparse

from domainbed import record_figures
from domainbed.scripts import bad_input, sweep_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure scatter``."""
    sweep_figures.add_arguments(parser, "scatter")


def draw(args: argparse.Namespace) -> None:
    """Draws the figure.

    Raises:
        BadInput: there are no such records, or they lack groups.
    """
    with bad_input():
        path = sweep_figures.destination(args)
        found = sweep_figures.of_datasets(sweep_figures.collect(args.input_dir).records, args.datasets)
        picture = record_figures.scatter(found, args.criterion)
        sweep_figures.save(picture, path)

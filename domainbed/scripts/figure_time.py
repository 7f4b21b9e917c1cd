"""Training time against worst-group accuracy of a sweep's rows: ``figure time --input_dir runs/sweep``."""

import argparse

from domainbed import record_figures
from domainbed.scripts import bad_input, sweep_figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure time``."""
    sweep_figures.add_arguments(parser, "time")


def draw(args: argparse.Namespace) -> None:
    """Draws the figure.

    Raises:
        BadInput: there are no such records, or they lack groups.
    """
    with bad_input():
        path = sweep_figures.destination(args)
        found = sweep_figures.collect(args.input_dir)
        records = sweep_figures.of_datasets(found.records, args.datasets)
        sweep_figures.save(record_figures.time(records, args.criterion, found.timings), path)

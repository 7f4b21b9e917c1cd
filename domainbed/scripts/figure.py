"""Draws a figure from saved runs: ``python -m domainbed.scripts.figure scatter --input_dir runs/sweep``.

``figure KIND --help`` says what each kind takes; most write ``INPUT_DIR/figures/KIND.png`` unless told otherwise.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from domainbed.scripts import run_cli

KINDS = {  # each is a module here, figure_KIND, with add_arguments(parser) and draw(args)
    "gradcam": "where several runs look: images, heatmaps, learned masks, right and wrong predictions",
    "features": "UMAP of penultimate features by label, confounder and environment, with scores",
    "curves": "accuracy of each group over the training",
    "scatter": "average against worst-group accuracy, with intervals",
    "time": "training time against worst-group accuracy",
    "budget": "worst-group accuracy against the annotations that were granted",
    "ranks": "average ranks over datasets, with the critical difference",
}


def _kind(name: str) -> Any:
    """Only the kind that is drawn is imported, for some need torch."""
    return importlib.import_module(f"domainbed.scripts.figure_{name}")


def main(argv: Sequence[str]) -> int:
    """Draws what was asked for; returns the exit status.

    Raises:
        BadInput: there are no such runs, or they can't be drawn.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    chosen = next((word for word in argv if word in KINDS), None)
    for name, title in KINDS.items():
        command = commands.add_parser(name, help=title, description=title)
        if name == chosen:
            _kind(name).add_arguments(command)
    args = parser.parse_args(argv)
    return int(_kind(args.kind).draw(args) or 0)


if __name__ == "__main__":
    run_cli(main)

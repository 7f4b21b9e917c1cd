"""What the figures that are drawn from a sweep's records share: where records come from, and where a figure goes."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from domainbed import figures, messages, records, run_index
from domainbed.model_selection import CRITERIA
from domainbed.record_figures import Picture
from domainbed.scripts import BadInput


def add_arguments(parser: argparse.ArgumentParser, kind: str, criterion: bool = True, needed: bool = True) -> None:
    """The flags: ``--input_dir``, ``--datasets``, ``--out``, and ``--criterion`` where the figure takes one.

    Args:
        kind: name of the figure, and of its file.
        needed: whether there are no records but those of --input_dir.
    """
    parser.add_argument("--input_dir", type=Path, required=needed, metavar="SWEEP", help="a sweep's output_dir")
    parser.add_argument("--out", type=Path, help=f"PNG, PDF or SVG; default: SWEEP/figures/{kind}.png")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these; default: all of the sweep's")
    parser.set_defaults(default_name=f"{kind}.png")
    if criterion:
        parser.add_argument(
            "--criterion", choices=CRITERIA, default="aa_wga", help="what validation maximises (default: aa_wga)"
        )


def collect(directory: Path) -> run_index.Collected:
    """What is needed of a sweep to choose among its runs.

    Raises:
        BadInput: there are none.
    """
    check_directory(directory)
    found = run_index.collect(directory)
    if not found.total:
        raise no_records(directory)
    return found


def read_all(directory: Path) -> list[dict[str, Any]]:
    """Every record of a sweep.

    Raises:
        BadInput: there are none.
    """
    check_directory(directory)
    found = list(records.iterate(directory))
    if not found:
        raise no_records(directory)
    return found


def of_datasets(found: Sequence[dict[str, Any]], names: Collection[str] | None) -> list[dict[str, Any]]:
    """The records of these datasets; of all without names.

    Raises:
        ValueError: there are none of one of them.
    """
    known = {record["args"]["dataset"] for record in found}
    for name in names or ():
        if name not in known:
            raise ValueError(messages.not_found("dataset", name, sorted(known)))
    return [record for record in found if not names or record["args"]["dataset"] in names]


def check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise BadInput(f"--input_dir {directory} is no directory; name the --output_dir of a sweep")


def no_records(directory: Path) -> BadInput:
    return BadInput(f"--input_dir {directory} holds no records (*/results.jsonl); name the --output_dir of a sweep")


def destination(args: argparse.Namespace) -> Path:
    """The file that the flags mean.

    Raises:
        ValueError: there is none, or its suffix is of no kind that can be written.
    """
    if args.out is None and args.input_dir is None:
        raise ValueError("say by --out where the figure goes; without --input_dir it has no place of its own")
    path: Path = args.out or args.input_dir / "figures" / args.default_name
    figures.check_file(path)
    return path


def save(picture: Picture, path: Path) -> None:
    """Writes the figure with its title and description, and prints where."""
    figures.save(picture.figure, path, picture.title, picture.description)
    print(f"Drew {path}")

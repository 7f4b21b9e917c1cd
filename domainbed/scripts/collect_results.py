"""Prints a sweep's tables, and writes them into its directory."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed import explanation_records, model_selection
from domainbed.control_tables import comparison_tables, control_tables
from domainbed.explanation_tables import explanation_tables
from domainbed.group_tables import group_tables, several_test_envs_tables
from domainbed.lib import reporting
from domainbed.lib.query import Q
from domainbed.screening_tables import screening_table
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.tables import (
    domainbed_tables,
    format_mean,
    results_tables,
    table_text,
)

__all__ = ["format_mean", "merge_records", "print_results_tables", "print_table", "recursive_freeze", "remove_key"]

SELECTION_METHODS = (
    model_selection.IIDAccuracySelectionMethod,
    model_selection.LeaveOneOutSelectionMethod,
    model_selection.OracleSelectionMethod,
)


def print_table(
    table: Sequence[Sequence[Any]],
    header_text: str,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    colwidth: int = 10,
    latex: bool = True,
) -> None:
    """Prints ``tables.table_text``."""
    print(table_text(table, header_text, row_labels, col_labels, colwidth, latex), end="")


def print_results_tables(
    records: Iterable[Mapping[str, Any]], selection_method: type[model_selection.SelectionMethod], latex: bool
) -> None:
    """Prints ``tables.results_tables``."""
    print(results_tables(records, selection_method, latex), end="")


def remove_key(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy without the key."""
    return {k: v for k, v in mapping.items() if k != key}


def recursive_freeze(obj: Any) -> Any:
    """A hashable image of nested dicts and lists; equal for equal contents."""
    if isinstance(obj, Mapping):
        return frozenset((key, recursive_freeze(value)) for key, value in obj.items())
    if isinstance(obj, list | tuple):
        return tuple(map(recursive_freeze, obj))
    return obj


def merge_records(records: Iterable[Mapping[str, Any]]) -> Q:
    """The records of ``train_autolr``'s two stages as one per step.

    The stages differ in args.holdout_fraction only; where both have a key, the earlier record's value stays.
    """
    merged: dict[Any, dict[str, Any]] = {}
    for record in records:
        key = recursive_freeze(remove_key(record["args"], "holdout_fraction")), record["step"]
        merged[key] = {**record, **merged.get(key, {})}
    return Q(merged.values())


def load(input_dir: str) -> Q:
    """The records of a sweep's directory.

    Raises:
        BadInput: no such directory, or no records in it.
    """
    if not Path(input_dir).is_dir():
        raise BadInput(f"--input_dir {input_dir} is no directory; name the --output_dir of a sweep")
    records = reporting.load_records(input_dir)
    if not len(records):
        raise BadInput(f"--input_dir {input_dir} holds no records (*/results.jsonl); name the --output_dir of a sweep")
    return records


def parser() -> DomainBedParser:
    """The arguments of collect_results."""
    parser = DomainBedParser(["input_dir", "latex", "auto_lr"], description=__doc__)
    parser.add_argument("--input_dir", required=True, help="the sweep's output_dir; the tables are written there, too")
    parser.add_argument("--latex", action="store_true", help="LaTeX instead of text")
    parser.add_argument("--auto_lr", action="store_true", help="tables of runs of train_autolr (ERMPlusPlus)")
    parser.add_argument("--screening", action="store_true", help="also WGA in training and validation (screening.txt)")
    parser.add_argument(
        "--compare", nargs=2, metavar=("ROW", "OTHER"), help="also one row minus another, in pairs (comparison.txt)"
    )
    return parser


def own_tables(
    records: Iterable[Mapping[str, Any]],
    validation: type[model_selection.IIDAccuracySelectionMethod],
    args: argparse.Namespace,
) -> dict[str, str]:
    """Our tables by the name of their file; those without anything to show are empty.

    Raises:
        BadInput: the records don't have what was asked for.
    """
    texts = {
        "several_test_envs": several_test_envs_tables(records, validation, args.latex),
        "groups": group_tables(records, args.latex),
        "controls": control_tables(records, args.latex),
        "explanations": explanation_tables(records, explanation_records.iterate(args.input_dir), args.latex),
    }
    with bad_input():
        if args.compare:
            row, other = args.compare
            texts["comparison"] = comparison_tables(records, row, other, args.latex)
        if args.screening:
            texts["screening"] = screening_table(records, args.latex)
    return texts


def main(argv: list[str]) -> int:
    """Prints and writes DomainBed's tables (results.txt or .tex), then ours, each only where there is something in it.

    Ours are, in files of these names: runs with several test environments (several_test_envs), groups, methods minus
    their controls (controls), explanations where some were measured, and, where asked for, two rows (comparison) and a
    screening.

    Raises:
        BadInput: there are no records or not those that were asked for, or the directory can't be written to.
    """
    args = parser().parse_args(argv)
    records = load(args.input_dir)
    methods: Sequence[type[model_selection.SelectionMethod]] = SELECTION_METHODS
    validation = model_selection.IIDAccuracySelectionMethod
    if args.auto_lr:
        validation = model_selection.IIDAutoLRAccuracySelectionMethod
        records, methods = merge_records(records), [validation]
    texts = {"results": domainbed_tables(records, methods, args.latex), **own_tables(records, validation, args)}
    suffix = "tex" if args.latex else "txt"
    with bad_input():
        for name, text in texts.items():
            print(text, end="")
            if text:
                Path(args.input_dir, f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)

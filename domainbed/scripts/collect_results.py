"""Prints a sweep's tables, and writes them into its directory."""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed import explanation_records, model_selection, run_index
from domainbed.budget_tables import budget_tables
from domainbed.control_tables import comparison_tables, comparisons_tables, control_tables
from domainbed.efficiency_tables import check_reference, efficiency_tables
from domainbed.explanation_tables import explanation_tables
from domainbed.group_tables import group_tables, several_test_envs_tables
from domainbed.lib import reporting
from domainbed.lib.query import Q
from domainbed.paper_tables import paper_tables
from domainbed.per_group_tables import per_group_tables
from domainbed.rank_tables import rank_tables
from domainbed.records import FULL_DATA
from domainbed.run_index import Collected
from domainbed.screening_tables import screening_tables
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.selection_tables import selection_tables
from domainbed.table_formats import SUFFIXES, Table, render, with_intervals
from domainbed.tables import (
    domainbed_data,
    domainbed_tables,
    format_mean,
    results_tables,
    table_text,
)

__all__ = ["format_mean", "merge_records", "print_results_tables", "print_table", "recursive_freeze", "remove_key"]

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

REFERENCE = "ERM"  # of ratios

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
        key = _without_holdout(record), record["step"]
        merged[key] = {**record, **merged.get(key, {})}
    return Q(merged.values())


def _without_holdout(record: Record) -> Any:
    return recursive_freeze(remove_key(record["args"], "holdout_fraction"))


def with_full_data(record: Record) -> dict[str, Any] | None:
    """A merged record whose test environments' in-splits are as the second stage measured them; None without one."""
    starts = tuple(f"env{env}_in_" for env in record["args"]["test_envs"])
    second = {k.removeprefix(FULL_DATA): v for k, v in record.items() if k.startswith(FULL_DATA)}
    second = {key: value for key, value in second.items() if key.startswith(starts)}
    return {k: v for k, v in record.items() if not k.startswith(starts)} | second if second else None


@dataclass(frozen=True)
class Merged:
    """As ``run_index.Collected`` of a sweep of ``train_autolr``, whose two stages are merged: every record."""

    records: Q
    explanations: Sequence[Record]

    @property
    def several(self) -> Q:
        """All records, too."""
        return self.records

    @property
    def grouped(self) -> Q:
        """Those that have both stages, as one record in which the test environments' numbers are the second's."""
        return Q(found for found in map(with_full_data, self.records) if found is not None)

    @property
    def total(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Sweep:
    """What tables are made of.

    Attributes:
        args: of the command.
        found: in the directory.
        methods: DomainBed's selection methods.
        validation: the method for plain accuracies.
    """

    args: argparse.Namespace
    found: Collected | Merged
    methods: Sequence[type[model_selection.SelectionMethod]] = SELECTION_METHODS
    validation: type[model_selection.IIDAccuracySelectionMethod] = model_selection.IIDAccuracySelectionMethod


def load(args: argparse.Namespace) -> Sweep:
    """What is in the sweep's directory.

    Raises:
        BadInput: no such directory, or no records in it.
    """
    if not Path(args.input_dir).is_dir():
        raise BadInput(f"--input_dir {args.input_dir} is no directory; name the --output_dir of a sweep")
    with bad_input():
        sweep = _both_stages(args) if args.auto_lr else Sweep(args, _collected(args.input_dir))
    if not sweep.found.total:
        head = f"--input_dir {args.input_dir} holds no records (*/results.jsonl)"
        raise BadInput(f"{head}; name the --output_dir of a sweep")
    return sweep


def _collected(input_dir: str) -> Collected:
    found = run_index.collect(input_dir)
    if found.skipped:
        lines, files = sum(found.skipped.values()), list(found.skipped)
        more = f" and {len(files) - 1} more file(s)" if len(files) > 1 else ""
        logger.warning("skipped %d line(s) that hold no record, in %s%s", lines, files[0], more)
    return found


def _both_stages(args: argparse.Namespace) -> Sweep:
    """Every record, with the stages of ``train_autolr`` merged."""
    records = merge_records(reporting.load_records(args.input_dir))
    validation = model_selection.IIDAutoLRAccuracySelectionMethod
    first = {_without_holdout(record): record["args"] for record in records}
    lines = explanation_records.iterate(args.input_dir)  # of the second stage's model
    found = Merged(records, [{**line, "args": first.get(_without_holdout(line), line["args"])} for line in lines])
    return Sweep(args, found, [validation], validation)


def _explanations(sweep: Sweep) -> list[Table]:
    return explanation_tables(sweep.found.records, sweep.found.explanations) if sweep.found.explanations else []


def _efficiency(sweep: Sweep) -> list[Table]:
    if sweep.args.reference != REFERENCE:
        check_reference(sweep.found.grouped, sweep.args.reference)
    timings = sweep.found.timings if isinstance(sweep.found, Collected) else None
    return efficiency_tables(sweep.found.grouped, sweep.args.reference, timings)


Make = Callable[[Sweep], list[Table]]

# Our tables: name of the file -> title of the whole, and what makes them. The first are made in any case, ...
ALWAYS: dict[str, tuple[str, Make]] = {
    "several_test_envs": (
        "Several test environments",
        lambda sweep: several_test_envs_tables(sweep.found.several, sweep.validation),
    ),
    "groups": ("Average and worst-group accuracy", lambda sweep: group_tables(sweep.found.grouped)),
    "controls": ("Method minus control", lambda sweep: control_tables(sweep.found.grouped)),
    "explanations": ("Explanations", _explanations),
}
# ... these where --tables names them, ...
NAMED: dict[str, tuple[str, Make]] = {
    "paper": ("Average and worst-group accuracy by dataset", lambda sweep: paper_tables(sweep.found.grouped)),
    "per_group": ("Accuracy of each group", lambda sweep: per_group_tables(sweep.found.grouped)),
    "selection": ("What each model selection chooses", lambda sweep: selection_tables(sweep.found.grouped)),
    "efficiency": ("Efficiency", _efficiency),
    "budgets": ("Worst-group accuracy by annotation budget", lambda sweep: budget_tables(sweep.found.grouped)),
    "ranks": ("Average ranks", lambda sweep: rank_tables(sweep.found.grouped)),
}
# ... and these where a flag of their own asks for them.
FLAGGED: dict[str, tuple[str, Make]] = {
    "comparison": ("Two rows", lambda sweep: comparison_tables(sweep.found.grouped, *sweep.args.compare)),
    "comparisons": ("Rows against one", lambda sweep: comparisons_tables(sweep.found.grouped, sweep.args.compare_all)),
    "screening": ("Screening", lambda sweep: screening_tables(sweep.found.grouped)),
}
EVERY = "all"
NEEDS = {
    "": "it needs runs on datasets with groups",
    "budgets": "it needs runs at two annotation budgets or more, on datasets with groups",
    "ranks": "it needs two rows or more, and a dataset with groups on which each of them has a WGA",
}
RESULTS = "results"
TITLES = {RESULTS: "DomainBed's tables"} | {name: title for name, (title, _) in (ALWAYS | NAMED | FLAGGED).items()}


def parser() -> DomainBedParser:
    """The arguments of collect_results."""
    parser = DomainBedParser(["input_dir", "latex", "auto_lr"], description=__doc__)
    parser.add_argument("--input_dir", required=True, help="the sweep's output_dir; the tables are written there, too")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--format", choices=list(SUFFIXES), default="text", help="of the tables")
    latex = "LaTeX instead of text, as --format latex"
    written.add_argument(
        "--latex", dest="format", action="store_const", const="latex", default=argparse.SUPPRESS, help=latex
    )
    parser.add_argument("--auto_lr", action="store_true", help="tables of runs of train_autolr (ERMPlusPlus)")
    parser.add_argument(
        "--tables", nargs="+", default=[], choices=[*NAMED, EVERY], help="more tables, each in a file of its name"
    )
    parser.add_argument("--intervals", action="store_true", help="our tables show 95% t intervals of the means, too")
    parser.add_argument(
        "--reference",
        default=REFERENCE,
        metavar="ROW",
        help="the row that the ratios of --tables efficiency are taken to",
    )
    parser.add_argument("--screening", action="store_true", help="also WGA in training and validation (screening.txt)")
    parser.add_argument(
        "--compare", nargs=2, metavar=("ROW", "OTHER"), help="also one row minus another, in pairs (comparison.txt)"
    )
    parser.add_argument(
        "--compare_all", metavar="ROW", help="also every other row minus this one, in pairs (comparisons.txt)"
    )
    return parser


def own_tables(sweep: Sweep) -> dict[str, list[Table]]:
    """Our tables by the name of their file; those without anything to show are left out.

    Raises:
        BadInput: the records don't have what was asked for.
    """
    args = sweep.args
    named = {name: make for name, make in NAMED.items() if {name, EVERY} & {*args.tables}}
    flags = {"comparison": args.compare, "comparisons": args.compare_all, "screening": args.screening}
    flagged = {name: make for name, make in FLAGGED.items() if flags[name]}
    with bad_input():
        found = {name: make(sweep) for name, (_, make) in (ALWAYS | named | flagged).items()}
    for name in named:
        if not found[name]:
            logger.warning("--tables %s: nothing to show; %s", name, NEEDS.get(name, NEEDS[""]))
    return {name: with_intervals(tables) if args.intervals else tables for name, tables in found.items() if tables}


def results(sweep: Sweep) -> str | list[Table]:
    """DomainBed's tables: its own text in the formats that it has, else as data."""
    source = sweep.found if isinstance(sweep.found, Collected) else sweep.found.records
    if sweep.args.format in ("text", "latex"):
        return domainbed_tables(source, sweep.methods, sweep.args.format == "latex")
    return domainbed_data(source, sweep.methods)


def main(argv: list[str]) -> int:
    """Prints and writes DomainBed's tables (results.txt, .tex ...), then ours, each only if there is something in it.

    Ours are, in files of these names: runs with several test environments (several_test_envs), groups, methods minus
    their controls (controls), explanations where some were measured, and, where asked for, those of NAMED and FLAGGED.

    Raises:
        BadInput: there are no records or not those that were asked for, or the directory can't be written to.
    """
    args = parser().parse_args(argv)
    sweep = load(args)
    own = own_tables(sweep)
    texts = {
        name: tables
        if isinstance(tables, str)
        else render(tables, args.format, TITLES[name], f"Total records: {sweep.found.total}")
        for name, tables in {RESULTS: results(sweep), **own}.items()
    }
    try:
        print(printed(texts, args.format), end="")  # first: a directory that can't be written to can be read
    finally:  # also where nobody reads on, as with "| head"
        with bad_input():
            for name, text in texts.items():
                Path(args.input_dir, f"{name}.{SUFFIXES[args.format]}").write_text(text, encoding="utf-8")
    if args.format == "latex" and own:
        logger.info("the other tables are in %s: %s", args.input_dir, ", ".join(f"{name}.tex" for name in own))
    return 0


def printed(texts: Mapping[str, str], format: str) -> str:
    """The files as one text.

    CSV has an empty line between files, JSON is one object of the files by their names, and LaTeX is DomainBed's
    document alone, so that each can be read as what it is.
    """
    if format == "json":
        return json.dumps({name: json.loads(text) for name, text in texts.items()}, indent=1, ensure_ascii=False) + "\n"
    if format == "latex":
        return texts[RESULTS]
    return ("\n" if format == "csv" else "").join(texts.values())


if __name__ == "__main__":
    run_cli(main)

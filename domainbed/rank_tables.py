"""Our table of ranks: how rows rank over datasets by worst-group accuracy, and whether the ranks tell them apart."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from domainbed import records as keys
from domainbed.group_tables import cell_titles, protocol_notes, selected_by
from domainbed.model_selection import choose
from domainbed.ranks import LEVEL, Ranks, average_ranks
from domainbed.rows import Cell, Run, meeting, row_names, runs
from domainbed.table_formats import Cell as TableCell
from domainbed.table_formats import Table
from domainbed.tables import line_names

Record = Mapping[str, Any]

CRITERION = "aa_wga"
LEAST_DATASETS = 5  # to say that ranks differ; the tests are rough below ten
NOTES = (
    "Ranks by the mean WGA over seeds on each dataset's test environments; 1 is best, ties share their mean rank.",
    "Friedman: are all rows alike? Nemenyi: mean ranks that differ by less than the critical difference are not told "
    "apart. Datasets count as independent, seeds only through their means.",
)


def ranked(records: Iterable[Record]) -> tuple[list[str], Ranks]:
    """Names of the rows in the order of tables, and their ranks over the datasets where each of them has results.

    Both are of nothing where fewer than two rows share a dataset.
    """
    names, scores = _scores(runs(record for record in records if keys.has_groups(record)))
    return names, average_ranks([list(row.values()) for row in scores.values()])


def _scores(by_run: Mapping[Run, list[Record]]) -> tuple[list[str], dict[Cell, dict[str, float]]]:
    """Names in order; the mean WGA of each name in each dataset where no row lacks it."""
    met = meeting(by_run)
    names = row_names(met.values())
    found: dict[Cell, dict[str, list[float]]] = {cell: {} for cell in cell_titles(met)}
    for choice in choose([record for checkpoints in by_run.values() for record in checkpoints], CRITERION):
        found[choice.run.cell].setdefault(names[choice.run.row], []).append(choice.test.wga)
    order = line_names({name: row.algorithm for row, name in names.items()})
    means = {
        cell: {name: float(np.mean(values[name])) for name in order}
        for cell, values in found.items()
        if values.keys() >= set(order)
    }
    complete = {cell: scores for cell, scores in means.items() if not any(map(math.isnan, scores.values()))}
    return (order, complete) if complete and len(order) > 1 else ([], {})


def rank_tables(records: Iterable[Record]) -> list[Table]:
    """One table: a line for each row, the best mean rank first; none without two rows that share a dataset."""
    by_run = runs(record for record in records if keys.has_groups(record))
    names, scores = _scores(by_run)
    if not names:
        return []
    ranks = average_ranks([list(row.values()) for row in scores.values()])
    titles = cell_titles(meeting(by_run))
    lines = sorted(zip(ranks.mean, names, strict=True), key=lambda line: line[0])  # stable: ties in the tables' order
    rows: list[list[TableCell | str]] = [
        [name, TableCell(f"{mean:.2f}", {"value": mean, "n": ranks.n})] for mean, name in lines
    ]
    left_out = [title for cell, title in titles.items() if cell not in scores]
    notes = [*NOTES, f"Datasets: {', '.join(titles[cell] for cell in scores)}.", *protocol_notes(by_run)]
    notes += [f"Left out, as some row has no WGA there: {', '.join(left_out)}."] if left_out else []
    title = f"Average ranks over {ranks.n} dataset{'s' if ranks.n > 1 else ''} by WGA, {selected_by(CRITERION)}"
    return [Table(title, notes, ["Row", "Mean rank"], rows, [verdict(ranks)])]


def verdict(ranks: Ranks) -> str:
    """What the ranks allow one to say, in a sentence."""
    few = f"Too few datasets ({ranks.n}; at least {LEAST_DATASETS}) to tell rows apart by their ranks"
    if ranks.friedman_p is None:
        return "No row ever differs." if len(set(ranks.mean)) == 1 else f"{few}."
    p = "p < 0.001" if ranks.friedman_p < 0.001 else f"p = {ranks.friedman_p:.3f}"
    test = f"Friedman: {p}; Nemenyi's critical difference at {LEVEL}: {ranks.critical_difference:.2f}."
    if ranks.n < LEAST_DATASETS:
        return f"{few}. {test}"
    if ranks.friedman_p >= LEVEL:
        return f"No significant difference between the rows. {test}"
    return f"The rows differ. {test}"

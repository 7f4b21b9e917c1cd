"""Our table in the layout of the eX2L paper's tables 2 and 7: algorithm, sampling, AA and WGA of each dataset."""

from collections.abc import Iterable, Mapping
from typing import Any

from domainbed import records as keys
from domainbed.group_tables import (
    LINE_HEADER,
    METRICS,
    budget_notes,
    cell_titles,
    line_cells,
    lines_of,
    mean_cell,
    percent_note,
    protocol_notes,
    selected_by,
    trials_of,
)
from domainbed.model_selection import choose
from domainbed.rows import meeting, row_names, runs
from domainbed.table_formats import Table, marked

Record = Mapping[str, Any]

CRITERION = "aa_wga"  # the paper's
SHOWN = ("AA", "WGA")


def percent(fraction: float) -> str:
    """With two decimals, as the paper prints them."""
    return f"{100 * fraction:.2f}"


def paper_tables(records: Iterable[Record]) -> list[Table]:
    """A line for each row, AA and WGA of each dataset as mean ± sd, the best and second best of each column marked.

    Source: eX2L, arXiv 2605.06368, tables 2 and 7.
    """
    grouped = [record for record in records if keys.has_groups(record)]
    if not grouped:
        return []
    by_run = runs(grouped)
    met = meeting(by_run)
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    trials = trials_of(choose(grouped, CRITERION), names)
    most = max(map(len, trials.values()), default=0)
    lines = lines_of(names)
    places = [(cell, metric) for cell in titles for metric in SHOWN]
    columns = []
    for cell, metric in places:
        found = [[METRICS[metric](choice) for choice in trials.get((line, cell), [])] for line in lines]
        known = [[value for value in values if value is not None] for values in found]
        columns.append(marked([mean_cell(values, most, percent) for values in known]))
    rows = [[*line_cells(line), *cells] for line, *cells in zip(lines, *columns, strict=True)]
    title = f"Average (AA) and worst-group (WGA) accuracy by dataset, {selected_by(CRITERION)}"
    notes = [percent_note(most), *protocol_notes(by_run), *budget_notes(names)]
    return [Table(title, notes, [*LINE_HEADER, *(f"{titles[cell]} {metric}" for cell, metric in places)], rows)]

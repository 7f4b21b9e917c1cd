"""Our tables of single groups: the accuracy of each on the test environments, and how many images it has there."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from domainbed import records as keys
from domainbed import table_formats
from domainbed.group_tables import (
    LINE_HEADER,
    budget_notes,
    cell_titles,
    group_name,
    line_cells,
    lines_of,
    mean_cell,
    percent_note,
    protocol_notes,
    selected_by,
    trials_of,
)
from domainbed.model_selection import Choice, choose
from domainbed.rows import Cell, Row, meeting, row_names, runs
from domainbed.table_formats import MISSING, Table

Record = Mapping[str, Any]

CRITERION = "aa_wga"
IMAGES = "Test images"
IMAGES_NOTE = f"{IMAGES}: of each group, in the test environments' in-splits; a range where trials split differently."


def per_group_tables(records: Iterable[Record]) -> list[Table]:
    """A table for each dataset and its test environments: a line for each row, a column for each group and the worst.

    The checkpoints are those that (AA + WGA) / 2 on validation chooses. Datasets whose groups are too many to be
    written one by one have none.
    """
    grouped = [record for record in records if keys.has_groups(record)]
    by_run = runs(grouped)
    met = meeting(by_run)
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    chosen: dict[Cell, list[Choice]] = defaultdict(list)
    for choice in choose(grouped, CRITERION):
        chosen[choice.run.cell].append(choice)
    tables = []
    for cell, title in titles.items():
        own = {row: names[row] for row in met[cell]}
        table = _table(title, cell, chosen[cell], own, protocol_notes(run for run in by_run if run.cell == cell))
        tables += [table] if table else []
    return tables


def _table(
    title: str, cell: Cell, chosen: Sequence[Choice], names: Mapping[Row, str], protocol: Sequence[str]
) -> Table | None:
    groups = {c.run: keys.pooled_groups(c.record, [(env, "in") for env in c.run.test_envs]) for c in chosen}
    shown = sorted({g for found in groups.values() for g in found.n})
    if not shown:
        return None
    trials = trials_of(chosen, names)
    most = max(map(len, trials.values()))
    rows: list[list[table_formats.Cell | str]] = []
    for line in lines_of(names):
        some = trials.get((line, cell), [])
        of_group = [[groups[c.run].acc[g] for c in some if g in groups[c.run].acc] for g in shown]
        worst = mean_cell([choice.test.wga for choice in some], most)
        rows.append([*line_cells(line), *(mean_cell(accs, most) for accs in of_group), worst])
    images = [_images([found.n[g] for found in groups.values() if g in found.n]) for g in shown]
    rows.append([IMAGES, "", *images, MISSING])
    args = chosen[0].record["args"]
    header = [*LINE_HEADER, *(group_name(args, g) for g in shown), "WGA"]
    notes = [percent_note(most), *protocol, IMAGES_NOTE, *budget_notes(names)]
    return Table(f"{title}: accuracy of each group, {selected_by(CRITERION)}", notes, header, rows)


def _images(counts: Sequence[int]) -> table_formats.Cell:
    low, high = min(counts), max(counts)
    return table_formats.Cell(str(low) if low == high else f"{low} to {high}", {"images": low, "most images": high})

"""Our tables of worst-group accuracy against the annotations that were granted."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from domainbed import records as keys
from domainbed.group_tables import (
    LINE_HEADER,
    cell_titles,
    line_cells,
    lines_of,
    mean_cell,
    percent_note,
    protocol_notes,
    selected_by,
)
from domainbed.model_selection import Choice, choose
from domainbed.rows import Cell, Row, Run, row_names, runs
from domainbed.table_formats import Table

Record = Mapping[str, Any]

CRITERION = "aa_wga"
BUDGET_KEYS = ("annotation_budget", "validation_budget")
NOTE = (
    "Columns: the share of the images whose confounder was granted; one number where it is the same for training and "
    "validation images, else training / validation. Runs are chosen by what is granted alone."
)


class Budget(NamedTuple):
    """Shares of the training and of the validation images whose confounder is granted."""

    training: float
    validation: float

    @property
    def title(self) -> str:
        """``5 %``, or ``5 / 100 %`` where training and validation differ."""
        numbers = dict.fromkeys(f"{100 * share:g}" for share in self)
        return f"{' / '.join(numbers)} %"


def split_budget(row: Row) -> tuple[Row, Budget]:
    """A row without its budgets, and these."""
    given = {key: json.loads(value) for key, value in row.extras if key in BUDGET_KEYS}
    rest = tuple(pair for pair in row.extras if pair[0] not in BUDGET_KEYS)
    return replace(row, extras=rest), Budget(*(float(given.get(key, 1.0)) for key in BUDGET_KEYS))


class Chosen(NamedTuple):
    """The chosen checkpoints of a sweep by dataset, row without budgets, and budget.

    Attributes:
        names: of the rows, as tables have them.
        trials: one checkpoint per trial.
    """

    names: dict[Row, str]
    trials: dict[tuple[Cell, Row, Budget], list[Choice]]

    @property
    def budgets(self) -> list[Budget]:
        """Ascending, those that are alike for training and validation first."""
        found = {budget for _, _, budget in self.trials}
        return sorted(found, key=lambda budget: (budget.training != budget.validation, budget))


def chosen_by_budget(records: Iterable[Record], criterion: str = CRITERION, partition: bool = False) -> Chosen:
    """What the criterion chooses on the validation annotations that each run's budget grants.

    Args:
        partition: names state partitions that are not an algorithm's own.
    """
    grouped = [record for record in records if keys.has_groups(record)]
    met: dict[Cell, set[Row]] = defaultdict(set)
    for run in runs(grouped):
        met[run.cell].add(split_budget(run.row)[0])
    trials: dict[tuple[Cell, Row, Budget], list[Choice]] = defaultdict(list)
    for choice in choose(grouped, criterion):
        trials[choice.run.cell, *split_budget(choice.run.row)].append(choice)
    return Chosen(row_names(met.values(), partition=partition), dict(trials))


def budget_tables(records: Iterable[Record]) -> list[Table]:
    """A table of WGA for each dataset whose rows were trained at several budgets; none without."""
    records = list(records)
    chosen = chosen_by_budget(records)
    titles = cell_titles({cell for cell, _, _ in chosen.trials})
    found = list(runs(records))
    tables = [_table(cell, title, chosen, [run for run in found if run.cell == cell]) for cell, title in titles.items()]
    return [table for table in tables if len(table.header) > len(LINE_HEADER) + 1]


def _table(cell: Cell, title: str, chosen: Chosen, own: Iterable[Run]) -> Table:
    here = {place[1:]: trials for place, trials in chosen.trials.items() if place[0] == cell}
    budgets = [budget for budget in chosen.budgets if any(budget == other for _, other in here)]
    names = {row: chosen.names[row] for row, _ in here}
    by_line = {((names[row], row.partition), budget): trials for (row, budget), trials in here.items()}
    most = max(map(len, here.values()))
    rows = [
        [
            *line_cells(line),
            *(mean_cell([choice.test.wga for choice in by_line.get((line, budget), [])], most) for budget in budgets),
        ]
        for line in lines_of(names)
    ]
    head = f"{title}: worst-group accuracy by annotation budget, {selected_by(CRITERION)}"
    notes = [percent_note(most), *protocol_notes(own), NOTE]
    return Table(head, notes, [*LINE_HEADER, *(budget.title for budget in budgets)], rows)

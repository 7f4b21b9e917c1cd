"""Our tables of what each way to choose a checkpoint would have chosen, and what it would have scored."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from domainbed import records as keys
from domainbed import table_formats
from domainbed.group_tables import (
    CRITERION_TITLES,
    LINE_HEADER,
    Line,
    budget_notes,
    cell_titles,
    line_cells,
    lines_of,
    mean_cell,
    percent_note,
    protocol_notes,
)
from domainbed.model_selection import CRITERIA, Checkpoint, choose, choose_by_accuracy, choose_oracle
from domainbed.rows import Cell, Run, meeting, row_names, runs
from domainbed.scores import Pooled
from domainbed.table_formats import MISSING, Table

Record = Mapping[str, Any]

ACCURACY = "accuracy on validation"
LAST = "last step"
ORACLE = "ORACLE"
NOTES = (
    "accuracy on validation: the mean over the validating splits, as DomainBed's training-domain validation.",
    "last step: no step is chosen; draws that compete are compared by (AA + WGA) / 2 on validation at their last one.",
    "ORACLE: by (AA + WGA) / 2 on the test environments themselves: no method, but a bound on what choosing can do.",
    "Draw, Step: of the chosen checkpoints; X where the trials differ.",
)


class Chosen(NamedTuple):
    """A checkpoint, and what it scores on the run's test environments."""

    checkpoint: Checkpoint
    test: Pooled


def selection_tables(records: Iterable[Record]) -> list[Table]:
    """A table for each dataset and its test environments: a line for each row and each way to choose.

    Runs without groups are left out.
    """
    by_run = runs(record for record in records if keys.has_groups(record))
    met = meeting(by_run)
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    places: dict[tuple[Cell, Line, str], list[Chosen]] = defaultdict(list)
    for way, checkpoints in _ways(by_run).items():
        for checkpoint in checkpoints:
            test = keys.pooled(checkpoint.record, [(env, "in") for env in checkpoint.run.test_envs])
            row = checkpoint.run.row
            if test is not None:
                places[checkpoint.run.cell, (names[row], row.partition), way].append(Chosen(checkpoint, test))
    most = max(map(len, places.values()), default=0)
    tables = []
    for cell, title in titles.items():
        lines = lines_of({row: names[row] for row in met[cell]})
        rows = [
            [*line_cells(line), way, *_cells(some, most)]
            for line in lines
            for way in _titles()
            if (some := places.get((cell, line, way)))
        ]
        notes = [percent_note(most), *protocol_notes(run for run in by_run if run.cell == cell), *NOTES]
        header = [*LINE_HEADER, "Chosen by", "AA", "WGA", "Draw", "Step"]
        head = f"{title}: test accuracies by what each model selection would have chosen"
        tables += [Table(head, [*notes, *budget_notes(met[cell])], header, rows)] if rows else []
    return tables


def _titles() -> list[str]:
    return [ACCURACY, *(f"{CRITERION_TITLES[name]} on validation" for name in CRITERIA), LAST, ORACLE]


def _ways(by_run: Mapping[Run, Sequence[Record]]) -> dict[str, Sequence[Checkpoint]]:
    """What each way chooses, one checkpoint per trial, in the order of the titles."""
    every = [record for checkpoints in by_run.values() for record in checkpoints]
    last = [max(checkpoints, key=lambda record: record["step"]) for checkpoints in by_run.values()]
    found: list[Sequence[Checkpoint]] = [choose_by_accuracy(every), *(choose(every, name) for name in CRITERIA)]
    found += [choose(last), choose_oracle(every)]
    return dict(zip(_titles(), found, strict=True))


def _cells(some: Sequence[Chosen], most: int) -> list[table_formats.Cell | str]:
    aa, wga = [one.test.aa for one in some], [one.test.wga for one in some]
    draws = {one.checkpoint.run.hparams_seed for one in some}
    steps = {one.checkpoint.step for one in some}
    return [mean_cell(aa, most), mean_cell(wga, most), _agreed(draws), _agreed(steps)]


def _agreed(numbers: set[int]) -> table_formats.Cell | str:
    """The number, if there is but one."""
    return table_formats.Cell(str(*numbers), {"value": min(numbers)}) if len(numbers) == 1 else MISSING

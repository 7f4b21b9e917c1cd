"""Our tables of what an epoch costs: time, WGA and both against one row, and memory."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from domainbed import messages, table_formats
from domainbed import records as keys
from domainbed.condensing import Timing
from domainbed.group_tables import (
    LINE_HEADER,
    Line,
    budget_notes,
    cell_titles,
    line_cells,
    lines_of,
    mean_cell,
    protocol_notes,
    selected_by,
    trials_of,
)
from domainbed.model_selection import Choice, choose
from domainbed.rows import Cell, Row, Run, meeting, row_names, runs
from domainbed.table_formats import MISSING, Table
from domainbed.tables import in_order, line_names

Record = Mapping[str, Any]

CRITERION = "aa_wga"
NOTES = (
    "Mean ± sample sd (ddof 1) over {most} chosen run(s) of a line; (n=...) where fewer; X: not known.",
    "s/epoch: the mean step_time over a run's records but the first, whose update also warms up, times the updates of "
    "an epoch (step / epoch); evaluation and saving are not in it. Times compare only where the machine, its load and "
    "the data are the same.",
    "WGA: percent. Memory: the largest mem_gb of a run, GB on the accelerator; X on a CPU.",
)
RATIO_NOTE = "Ratios of the means to {reference}, trained on the same data."
NO_REFERENCE_NOTE = "No ratios: the row to compare with, {reference}, was not trained on these data."


class Cost(NamedTuple):
    """What a run took: seconds of an epoch, and GB of the accelerator's memory; None: not known."""

    epoch_s: float | None
    mem_gb: float | None

    @classmethod
    def of(cls, timing: Timing) -> "Cost":
        step_time_s, steps_per_epoch = timing.step_time_s, timing.steps_per_epoch
        return cls(step_time_s * steps_per_epoch if step_time_s and steps_per_epoch else None, timing.mem_gb or None)


def efficiency_tables(
    records: Iterable[Record], reference: str | None = None, timings: Mapping[Run, Timing] | None = None
) -> list[Table]:
    """A table for each dataset and its test environments, of the runs that (AA + WGA) / 2 on validation chooses.

    Args:
        records: of the runs.
        reference: name of the row that ratios are taken to, as DomainBed's tables have it (``rows.row_names``), or of
            an algorithm, of whose rows the first one is meant; None: no ratios.
        timings: of the runs, where the records are not all there are (``run_index.Collected.timings``).

    Source: eX2L, arXiv 2605.06368, appendix D.
    """
    by_run = runs(record for record in records if keys.has_groups(record))
    met = meeting(by_run)
    names, full, titles = row_names(met.values(), partition=False), row_names(met.values()), cell_titles(met)
    chosen = choose([record for checkpoints in by_run.values() for record in checkpoints], CRITERION)
    costs = {choice.run: _cost(choice.run, by_run, timings) for choice in chosen}
    tables = []
    for cell, title in titles.items():
        own = {row: names[row] for row in met[cell]}
        base = _reference({row: full[row] for row in own}, reference) if reference else None
        trials = trials_of((choice for choice in chosen if choice.run.cell == cell), own)
        notes = [note.format(most=max(map(len, trials.values()), default=0)) for note in NOTES]
        notes += protocol_notes(run for run in by_run if run.cell == cell)
        if reference:
            notes.append(
                (RATIO_NOTE if base else NO_REFERENCE_NOTE).format(reference=full[base] if base else reference)
            )
        rows = _rows(cell, own, trials, costs, (own[base], base.partition) if base else None)
        header = [*LINE_HEADER, "s/epoch", "time ratio", "WGA", "WGA ratio", "Memory (GB)"]
        head = f"{title}: time of an epoch and worst-group accuracy, {selected_by(CRITERION)}"
        tables.append(Table(head, [*notes, *budget_notes(own)], header, rows))
    return tables


def check_reference(records: Iterable[Record], reference: str) -> None:
    """Whether there is such a row or algorithm.

    Raises:
        ValueError: there is not.
    """
    names = row_names(meeting(runs(records)).values())
    rows = line_names({name: row.algorithm for row, name in names.items()})
    known = dict.fromkeys([*rows, *in_order("algorithms", (row.algorithm for row in names))])
    if reference not in known:
        raise ValueError(messages.not_found("row", reference, map(repr, known)))


def _reference(names: Mapping[Row, str], wanted: str) -> Row | None:
    """The row of that name, else the algorithm's first row in the order of the tables."""
    named = [row for row, name in names.items() if name == wanted]
    own = {row: row.titled({key for key, _ in row.extras}, partition=False) for row in names if row.algorithm == wanted}
    return next(iter(named), None) or next((row for line in lines_of(own) for row in own if _is(row, line, own)), None)


def _is(row: Row, line: Line, names: Mapping[Row, str]) -> bool:
    return (names[row], row.partition) == line


def _cost(run: Run, by_run: Mapping[Run, Sequence[Record]], timings: Mapping[Run, Timing] | None) -> Cost:
    if timings is None:
        return cost(by_run[run])
    return Cost.of(timings[run])


def cost(checkpoints: Iterable[Record]) -> Cost:
    """Of a run whose records are all there."""
    found = list(checkpoints)
    columns = ([record.get(key) for record in found] for key in ("step_time", "mem_gb", "epoch"))
    return Cost.of(Timing.of([record["step"] for record in found], *columns))


def _rows(
    cell: Cell,
    names: Mapping[Row, str],
    trials: Mapping[tuple[Line, Cell], Sequence[Choice]],
    costs: Mapping[Run, Cost],
    reference: Line | None,
) -> list[list[table_formats.Cell | str]]:
    def times(line: Line | None) -> list[float]:
        return _known(costs[choice.run].epoch_s for choice in (line and trials.get((line, cell))) or [])

    def wga(line: Line | None) -> list[float]:
        return [choice.test.wga for choice in (line and trials.get((line, cell))) or []]

    most = max(map(len, trials.values()), default=0)
    rows = []
    for line in lines_of(names):
        memory = _known(costs[choice.run].mem_gb for choice in trials.get((line, cell), []))
        rows.append(
            [
                *line_cells(line),
                mean_cell(times(line), most, "{:.2f}".format),
                _ratio(times(line), times(reference)),
                mean_cell(wga(line), most),
                _ratio(wga(line), wga(reference)),
                mean_cell(memory, most, "{:.2f}".format),
            ]
        )
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ratio(values: Sequence[float], reference: Sequence[float]) -> table_formats.Cell | str:
    if not values or not reference or not fmean(reference):
        return MISSING
    ratio = fmean(values) / fmean(reference)
    return table_formats.Cell(f"{ratio:.2f}", {"value": ratio})

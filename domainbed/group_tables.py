"""Our tables of many rows: average and worst-group accuracy; the accuracy on several test environments."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from domainbed import records as keys
from domainbed.model_selection import (
    CRITERIA,
    Checkpoint,
    Choice,
    IIDAccuracySelectionMethod,
    choose,
    choose_by_accuracy,
    validation_envs,
    with_several_test_envs,
)
from domainbed.rows import Cell, Row, meeting, row_names, runs
from domainbed.tables import MISSING, document, environment_names, in_order, line_names, wide_table

Record = Mapping[str, Any]

CRITERION_TITLES = {"aa_wga": "(AA + WGA) / 2", "wga": "WGA"}
SAMPLING = {  # the paper's words for the partitions, in its order
    "random": "Random",
    "environment": "Uniform Env.",
    "group": "Uniform Group",
    "confounder": "Uniform Confounder",
}
METRICS: dict[str, Callable[[Choice], float | None]] = {  # the columns of a dataset
    "AA": lambda choice: choice.test.aa,
    "adjusted AA": lambda choice: choice.test_means.adjusted,
    "group mean": lambda choice: choice.test_means.group_mean,
    "WGA": lambda choice: choice.test.wga,
}
METRIC_NOTES = {  # metrics that a table shows only where some run has them, and what its caption then says
    "adjusted AA": "adjusted AA: groups weighted by their shares of each run's training images.",
    "group mean": "group mean: non-empty groups weighted equally.",
}
BUDGET_NOTE = (
    "budget: the share of the training images whose confounder labels were kept; 1 where none is stated. "
    "Validation keeps all."
)

Line = tuple[str, str]  # name, partition
LINE_HEADER = ("Algorithm", "Sampling")
C = TypeVar("C", bound=Checkpoint)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def mean_cell(values: Sequence[float], most: int, number: Callable[[float], str] = percent) -> str:
    """Mean and sd (ddof 1), each written by ``number``; the number of trials where it is less than the table's most."""
    if not values:
        return MISSING
    cell = number(float(np.mean(values)))
    if len(values) > 1:
        cell += f" ± {number(float(np.std(values, ddof=1)))}"
    return cell if len(values) == most else f"{cell} (n={len(values)})"


def percent_note(most: int) -> str:
    """What ``mean_cell`` shows.

    Args:
        most: number of trials of the cells that have most of them.
    """
    spread = f"mean ± sample sd (ddof 1) over {most} seeds" if most > 1 else "one seed"
    return f"Percent; {spread}; (n=...) where fewer; X: none. Rows with unfinished runs are counted as they are."


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """By dataset in the registry's order, then by test environments."""
    cells = sorted(cells)
    return [cell for dataset in in_order("datasets", (d for d, _ in cells)) for cell in cells if cell[0] == dataset]


def lines_of(names: Mapping[Row, str]) -> list[Line]:
    """The lines in order: by name as in DomainBed's tables, then as the paper has the partitions."""
    by_name = line_names({name: row.algorithm for row, name in names.items()})
    partitions = [*SAMPLING, *sorted({row.partition for row in names} - SAMPLING.keys())]
    present = {(name, row.partition) for row, name in names.items()}
    return [(name, partition) for name in by_name for partition in partitions if (name, partition) in present]


def line_cells(line: Line) -> list[str]:
    """What stands under LINE_HEADER."""
    name, partition = line
    return [name, SAMPLING.get(partition, partition)]


def trials_of(chosen: Iterable[C], names: Mapping[Row, str]) -> dict[tuple[Line, Cell], list[C]]:
    """The chosen checkpoints, one per trial, of each line and cell."""
    trials = defaultdict(list)
    for choice in chosen:
        row = choice.run.row
        trials[(names[row], row.partition), choice.run.cell].append(choice)
    return dict(trials)


def _own_table(
    title: str,
    notes: Iterable[str],
    header: Sequence[str],
    values: Mapping[Line, Sequence[Sequence[float]]],
    most: int,
    latex: bool,
) -> str:
    """A line for each row.

    Args:
        header: of the columns after the two that say what a line is.
        values: of each of these columns, one per trial.
        most: number of trials of the cells that have most of them.
    """
    body = [[*line_cells(line), *(mean_cell(trials, most) for trials in cells)] for line, cells in values.items()]
    return wide_table(title, [percent_note(most), *notes], [*LINE_HEADER, *header], body, latex)


def budget_notes(rows: Iterable[Row]) -> list[str]:
    return [BUDGET_NOTE] if any(key == "annotation_budget" for row in rows for key, _ in row.extras) else []


def group_tables(records: Iterable[Record], latex: bool = False) -> str:
    """A table of the accuracies over groups on the test environments for each group-aware criterion.

    Each dataset has the columns of METRICS; adjusted AA and group mean only where some of its runs has them. Empty
    text without groups.
    """
    grouped = [record for record in records if keys.has_groups(record)]
    if not grouped:
        return ""
    text = "".join(_group_table(grouped, criterion, latex) for criterion in CRITERIA)
    return document(text, "Average and worst-group accuracy", f"Total records: {len(grouped)}") if latex else text


def _group_table(records: Sequence[Record], criterion: str, latex: bool) -> str:
    met = meeting(runs(records))
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    trials = trials_of(choose(records, criterion), names)
    shown = [(cell, metric) for cell in titles for metric in METRICS if _is_shown(metric, cell, trials)]
    lines = {
        line: [_values(metric, trials.get((line, cell), [])) for cell, metric in shown] for line in lines_of(names)
    }
    title = "Average (AA) and worst-group (WGA) accuracy, model selection: "
    title += f"{CRITERION_TITLES[criterion]} on validation"
    notes = [note for metric, note in METRIC_NOTES.items() if any(metric == other for _, other in shown)]
    header = [f"{titles[cell]} {metric}" for cell, metric in shown]
    most = max(map(len, trials.values()), default=0)
    return _own_table(title, notes + budget_notes(names), header, lines, most, latex)


def cell_titles(cells: Iterable[Cell]) -> dict[Cell, str]:
    """Titles by dataset and test environments, which are named where a dataset was tested on several."""
    places = ordered(cells)
    several = {dataset for dataset, _ in places if sum(dataset == other for other, _ in places) > 1}
    return {
        (dataset, envs): f"{dataset}[{','.join(map(str, envs))}]" if dataset in several else dataset
        for dataset, envs in places
    }


def _values(metric: str, chosen: Iterable[Choice]) -> list[float]:
    """The metric of each trial that has it."""
    return [value for choice in chosen if (value := METRICS[metric](choice)) is not None]


def _is_shown(metric: str, cell: Cell, trials: Mapping[tuple[Line, Cell], Sequence[Choice]]) -> bool:
    if metric not in METRIC_NOTES:
        return True
    return any(_values(metric, chosen) for (_, place), chosen in trials.items() if place == cell)


def several_test_envs_tables(
    records: Iterable[Record],
    method: type[IIDAccuracySelectionMethod] = IIDAccuracySelectionMethod,
    latex: bool = False,
) -> str:
    """A table for each dataset and set of several test environments: the accuracy on each of them, and their mean.

    The runs are those of ``model_selection.with_several_test_envs``, as where a method trains on one domain and is
    tested on every other. Empty text without such runs.
    """
    several = with_several_test_envs(records)
    if not several:
        return ""
    met = meeting(runs(several))
    names = row_names(met.values(), partition=False)
    trials = trials_of(choose_by_accuracy(several, method), names)
    text = ""
    for cell in ordered(met):
        chosen = {line: trials.get((line, cell), []) for line in lines_of({row: names[row] for row in met[cell]})}
        lines = {
            line: [*([c.test[env] for c in some] for env in cell[1]), [c.mean for c in some]]
            for line, some in chosen.items()
        }
        trained, tested = _environments(cell, several)
        title = f"{cell[0]}, trained on {', '.join(trained)}, tested on {', '.join(tested)}: accuracy"
        title += f", model selection: {method.name}"
        most = max(map(len, chosen.values()))
        text += _own_table(title, budget_notes(met[cell]), [*tested, "Mean"], lines, most, latex)
    return document(text, "Several test environments", f"Total records: {len(several)}") if latex else text


def _environments(cell: Cell, records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """Names of the environments that the runs of a cell are trained and tested on."""
    dataset, test_envs = cell
    known = dict(enumerate(environment_names(dataset, records)))
    trained = [name for env, name in known.items() if env not in {*test_envs, *validation_envs(dataset)}]
    return trained, [known.get(env, f"env{env}") for env in test_envs]

"""Our tables of many rows: average and worst-group accuracy; the accuracy on several test environments."""

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from domainbed import records as keys
from domainbed import table_formats
from domainbed.intervals import t_interval
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
from domainbed.rows import Cell, Row, Run, declared, meeting, pseudo_confounders, row_names, runs
from domainbed.table_formats import MISSING, Table
from domainbed.tables import environment_names, in_order, line_names

Record = Mapping[str, Any]

CRITERION_TITLES = {"aa_wga": "(AA + WGA) / 2", "wga": "WGA"}
SAMPLING = {  # the paper's words for its partitions, in its order; then ours
    "random": "Random",
    "environment": "Uniform Env.",
    "group": "Uniform Group",
    "confounder": "Uniform Confounder",
    "label": "Uniform Label",
    "group_subset": "Group Subset",
    "label_subset": "Label Subset",
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
BUDGET_NOTE = "budget: the share of the training images whose confounder labels were kept; 1 where none is stated."
FULL_VALIDATION = "Validation keeps all."
VALIDATION_NOTE = (
    "val_budget: the share of the validation images whose confounder labels selection may use; 1 where none is stated. "
    "Validation WGA is over these images, AA over all; with none, selection goes by AA alone."
)

MOST_SEEDS = 5  # that a note lists one by one

Line = tuple[str, str]  # name, partition
LINE_HEADER = ("Algorithm", "Sampling")
C = TypeVar("C", bound=Checkpoint)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def mean_cell(values: Sequence[float], most: int, number: Callable[[float], str] = percent) -> table_formats.Cell | str:
    """Mean and sd (ddof 1), each written by ``number``; the number of trials where it is less than the table's most.

    The numbers behind it are mean, sd, n, and low and high of the 95% t interval of the mean.
    """
    if not values:
        return MISSING
    n, mean = len(values), float(np.mean(values))
    sd = float(np.std(values, ddof=1)) if n > 1 else None
    interval = t_interval(values)
    text = number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"
    return table_formats.Cell(
        text if n == most else f"{text} (n={n})",
        {"mean": mean, "sd": sd, "n": n, **dict(zip(("low", "high"), interval or (None, None), strict=True))},
        interval="[{}, {}]".format(*map(number, interval)) if interval else "",
        trials=tuple(map(float, values)),
    )


@functools.cache
def _group_names(dataset: str) -> tuple[Sequence[str], Sequence[str]]:
    """What the dataset's class calls its labels and confounder values; empty where it does not say."""
    labels, confounders = (declared("datasets", dataset, name) or () for name in ("CLASSES", "CONFOUNDERS"))
    return labels, confounders


def group_name(args: Mapping[str, Any], group: int) -> str:
    """``g3: waterbird, water`` where the class of a run's dataset names its confounders, else ``g3``."""
    labels, confounders = _group_names(args["dataset"])
    own = args.get("confounders") and not pseudo_confounders(args)
    if own or not confounders:  # of the user's own choice, the class knows no names
        return f"g{group}"
    y, c = divmod(group, len(confounders))
    if labels and y >= len(labels):
        return f"g{group}"
    return f"g{group}: {labels[y] if labels else f'y={y}'}, {confounders[c]}"


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


def budget_notes(rows: Iterable[Row]) -> list[str]:
    """What the names of rows with a budget, for training or validation, mean."""
    stated = {key for row in rows for key, _ in row.extras}
    on_validation = [VALIDATION_NOTE] if "validation_budget" in stated else []
    if "annotation_budget" not in stated:
        return on_validation
    return [BUDGET_NOTE, *on_validation] if on_validation else [f"{BUDGET_NOTE} {FULL_VALIDATION}"]


def protocol_notes(found: Iterable[Run]) -> list[str]:
    """How the runs of a table came by their hparams: a search, one draw each, or some of both."""
    found = list(found)
    draws = defaultdict(set)
    for run in found:
        draws[run.row, run.cell, run.trial_seed].add(run.hparams_seed)
    searched = {(row, cell) for (row, cell, _), seeds in draws.items() if len(seeds) > 1}
    several = sorted({len(seeds) for (row, cell, _), seeds in draws.items() if (row, cell) in searched})
    single = [run for run in found if (run.row, run.cell) not in searched]
    notes = [f"the best of {_span(several)} draws of the hparams per trial (search)"] if several else []
    if single:
        kind = "fixed, refit, or a search that is not finished" if several else "fixed or refit"
        notes.append(f"one draw of the hparams, {' or '.join(_seeds(single))} ({kind})")
    return [f"Protocol: {'; for other lines '.join(notes)}."] if notes else []


def _seeds(single: Iterable[Run]) -> list[str]:
    """The seeds of runs that no search chose among: of each row and cell those in which its own runs differ.

    A run without another of its row and cell is listed as the others are.
    """
    lines: dict[tuple[Row, Cell], set[Run]] = defaultdict(set)
    for run in single:
        lines[run.row, run.cell].add(run)
    several = any(len({run.trial_seed for run in some}) > 1 for some in lines.values())
    found: dict[str, set[int]] = {"trial_seed": set(), "seed": set()}
    for some in lines.values():
        by_trial = several if len(some) == 1 else len({run.trial_seed for run in some}) > 1
        name = "trial_seed" if by_trial else "seed"
        found[name] |= {getattr(run, name) for run in some}
    return [_listed(name, seeds) for name, seeds in found.items() if seeds]


def _listed(name: str, seeds: Collection[int]) -> str:
    return f"{len(seeds)} {name}s" if len(seeds) > MOST_SEEDS else f"{name} {', '.join(map(str, sorted(seeds)))}"


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def group_tables(records: Iterable[Record]) -> list[Table]:
    """A table of the accuracies over groups on the test environments for each group-aware criterion.

    Each dataset has the columns of METRICS; adjusted AA and group mean only where some of its runs has them. None
    without groups.
    """
    by_run = runs(record for record in records if keys.has_groups(record))
    return [_group_table(by_run, criterion) for criterion in CRITERIA] if by_run else []


def _group_table(by_run: Mapping[Run, Sequence[Record]], criterion: str) -> Table:
    met = meeting(by_run)
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    chosen = choose([record for checkpoints in by_run.values() for record in checkpoints], criterion)
    trials = trials_of(chosen, names)
    shown = [(cell, metric) for cell in titles for metric in METRICS if _is_shown(metric, cell, trials)]
    most = max(map(len, trials.values()), default=0)
    rows = [
        [
            *line_cells(line),
            *(mean_cell(_values(metric, trials.get((line, cell), [])), most) for cell, metric in shown),
        ]
        for line in lines_of(names)
    ]
    title = f"Average (AA) and worst-group (WGA) accuracy, {selected_by(criterion)}"
    notes = [note for metric, note in METRIC_NOTES.items() if any(metric == other for _, other in shown)]
    header = [*LINE_HEADER, *(f"{titles[cell]} {metric}" for cell, metric in shown)]
    return Table(title, [percent_note(most), *protocol_notes(by_run), *notes, *budget_notes(names)], header, rows)


def selected_by(criterion: str) -> str:
    """How a title says it."""
    return f"model selection: {CRITERION_TITLES[criterion]} on validation"


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
    records: Iterable[Record], method: type[IIDAccuracySelectionMethod] = IIDAccuracySelectionMethod
) -> list[Table]:
    """A table for each dataset and set of several test environments: the accuracy on each of them, and their mean.

    The runs are those of ``model_selection.with_several_test_envs``, as where a method trains on one domain and is
    tested on every other.
    """
    several = with_several_test_envs(records)
    by_run = runs(several)
    met = meeting(by_run)
    names = row_names(met.values(), partition=False)
    trials = trials_of(choose_by_accuracy(several, method), names) if several else {}
    found = []
    for cell in ordered(met):
        chosen = {line: trials.get((line, cell), []) for line in lines_of({row: names[row] for row in met[cell]})}
        most = max(map(len, chosen.values()))
        rows = [
            [
                *line_cells(line),
                *(mean_cell([c.test[env] for c in some], most) for env in cell[1]),
                mean_cell([c.mean for c in some], most),
            ]
            for line, some in chosen.items()
        ]
        trained, tested = _environments(cell, several)
        title = f"{cell[0]}, trained on {', '.join(trained)}, tested on {', '.join(tested)}: accuracy"
        title += f", model selection: {method.name}"
        notes = [*protocol_notes(run for run in by_run if run.cell == cell), *budget_notes(met[cell])]
        found.append(Table(title, [percent_note(most), *notes], [*LINE_HEADER, *tested, "Mean"], rows))
    return found


def _environments(cell: Cell, records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """Names of the environments that the runs of a cell are trained and tested on."""
    dataset, test_envs = cell
    known = dict(enumerate(environment_names(dataset, records)))
    trained = [name for env, name in known.items() if env not in {*test_envs, *validation_envs(dataset)}]
    return trained, [known.get(env, f"env{env}") for env in test_envs]

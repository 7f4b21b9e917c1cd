"""Our table of a screening: worst-group accuracy in training and validation, and the rows that come out best."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from domainbed import messages, table_formats
from domainbed import records as keys
from domainbed.group_tables import (
    LINE_HEADER,
    Line,
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
from domainbed.model_selection import Choice, choose, validation_envs
from domainbed.pairs import is_control
from domainbed.rows import Cell, meeting, row_names, runs
from domainbed.table_formats import Table, marked
from domainbed.tables import environment_names

Record = Mapping[str, Any]
Place = tuple[Line, Cell]

CRITERION = "aa_wga"  # the paper's
FINALISTS = 3
SPLITS_NOTE = (
    "Train: in-splits of the training environments; Val: the splits that validate; each pooled over environments."
)


def screening_tables(records: Iterable[Record]) -> list[Table]:
    """WGA on training and validation images of each row and dataset, with no look at test environments: one table.

    Below it stand the best three algorithms of each dataset by validation WGA: each counts once, with its best row,
    and rows whose penalty is switched off, or whose validation budget is 0, don't count.

    Raises:
        ValueError: there are no groups, or the training images were not measured.

    Source: eX2L, arXiv 2605.06368, section 4.4 and appendix A.
    """
    grouped = [record for record in records if keys.has_groups(record)]
    if not grouped:
        raise ValueError(
            "a screening goes by worst-group accuracy, but no record has groups; sweep datasets with confounders"
        )
    by_run = runs(grouped)
    met = meeting(by_run)
    names, titles = row_names(met.values(), partition=False), cell_titles(met)
    trials = trials_of(choose(grouped, CRITERION), names)
    most = max(map(len, trials.values()), default=0)
    train = _train_wga(trials, {cell: _trained_on(cell, grouped) for cell in titles})
    lines = lines_of(names)
    columns = [column for cell in titles for column in _columns(cell, lines, trials, train, most)]
    rows = [[*line_cells(line), *cells] for line, *cells in zip(lines, *columns, strict=True)]
    header = [*LINE_HEADER, *(f"{title} {split} WGA" for title in titles.values() for split in ("Train", "Val"))]
    notes = [percent_note(most), *protocol_notes(by_run), SPLITS_NOTE, *budget_notes(names)]
    return [Table(f"Screening, {selected_by(CRITERION)}", notes, header, rows, _finalists(titles, lines, trials))]


def _trained_on(cell: Cell, records: Iterable[Record]) -> list[int]:
    dataset, test_envs = cell
    others = {*test_envs, *validation_envs(dataset)}
    return [env for env in range(len(environment_names(dataset, records))) if env not in others]


def _train_wga(
    trials: Mapping[Place, Sequence[Choice]], trained_on: Mapping[Cell, Sequence[int]]
) -> dict[Place, list[float]]:
    """WGA on the training images of each trial.

    Raises:
        ValueError: some runs did not measure it.
    """
    found: dict[Place, list[float]] = {}
    lacking = []
    for place, chosen in trials.items():
        line, cell = place
        pooled = [keys.pooled(choice.record, [(env, "in") for env in trained_on[cell]]) for choice in chosen]
        found[place] = [accuracy.wga for accuracy in pooled if accuracy is not None]
        if len(found[place]) < len(pooled):
            lacking.append(f"{_described(line)} on {cell[0]}")
    if lacking:
        head = "a screening shows WGA on training images, which these runs did not measure (--eval_splits selection); "
        raise ValueError(messages.listed(f"{head}sweep again with --eval_splits all, the default:", lacking))
    return found


def _columns(
    cell: Cell,
    lines: Sequence[Line],
    trials: Mapping[Place, Sequence[Choice]],
    train: Mapping[Place, Sequence[float]],
    most: int,
) -> list[list[table_formats.Cell | str]]:
    """Train WGA and Val WGA of the lines; the best of the latter are marked."""
    val = [_val_wgas(trials.get((line, cell), [])) for line in lines]
    return [
        [mean_cell(train.get((line, cell), []), most) for line in lines],
        marked([mean_cell(wga, most) for wga in val]),
    ]


def _finalists(
    titles: Mapping[Cell, str], lines: Sequence[Line], trials: Mapping[Place, Sequence[Choice]]
) -> list[str]:
    """A sentence for each dataset: its best algorithms, each with its best row."""
    sentences = []
    for cell, title in titles.items():
        ranked = [(line, trials[line, cell]) for line in lines if (line, cell) in trials]
        ranked = [(line, some) for line, some in ranked if _val_wgas(some) and not is_control(some[0].run.row)]
        ranked.sort(key=lambda entry: -_val_wga(entry[1]))  # stable: ties in the order of the lines
        best = {chosen[0].run.row.algorithm: (line, chosen) for line, chosen in reversed(ranked)}
        finalists = sorted(best.values(), key=ranked.index)[:FINALISTS]
        words = [f"{_described(line)} {100 * _val_wga(chosen):.1f}" for line, chosen in finalists]
        sentences += [f"{title}: best algorithms by Val WGA: {', '.join(words)}"] if words else []
    return sentences


def _described(line: Line) -> str:
    name, sampling = line_cells(line)
    return f"{name} ({sampling})"


def _val_wgas(chosen: Iterable[Choice]) -> list[float]:
    """Of the trials whose validation budget grants some confounders."""
    return [choice.validation.wga for choice in chosen if choice.validation.wga is not None]


def _val_wga(chosen: Iterable[Choice]) -> float:
    return float(np.mean(_val_wgas(chosen)))

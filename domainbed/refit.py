"""A finished search -> the draws that validation chose, and the arguments that train them again with fresh seeds.

A search has one seed per draw, so that its tables show luck along with merit: the second phase of the protocol takes
the chosen draw of each row and gives it seeds of its own. A control gets its method's draw with the method switched
off, not the draw that suits the control best: the two then differ in nothing else.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domainbed.jobs import EXCLUSIVE, check_exclusive, given
from domainbed.model_selection import Choice, choose
from domainbed.pairs import control_of, is_control, is_same
from domainbed.rows import ALWAYS_NAMED, Cell, Row, declared, meeting, row_names, runs
from domainbed.sweep_rows import SweepRow, control_label, no_controls

Record = Mapping[str, Any]
Place = tuple[Row, Cell]


@dataclass(frozen=True)
class Draw:
    """The hparams that a row gets on one dataset and its test environments.

    Attributes:
        name: what the search's tables call the row.
        choice: the checkpoint that won; a control's is its method's, if that is known.
        hparams: all of them.
    """

    name: str
    choice: Choice
    hparams: Mapping[str, Any]

    def __str__(self) -> str:
        run = self.choice.run
        where = f"{self.name}, {run.dataset}, test_envs {list(run.test_envs)}"
        draw = f"trial_seed {run.trial_seed}, hparams_seed {run.hparams_seed}, step {self.choice.step}"
        return f"{where}: {self.choice.score:.4f} ({draw})"


def wanted(records: Iterable[Record], datasets: Collection[str] = (), rows: Collection[SweepRow] = ()) -> list[Record]:
    """The records of some datasets, and of the algorithms and partitions of some rows; without any, all."""
    lines = {(row.algorithm, row.partition or row.own_partition) for row in rows}
    found = [record for record in records if not datasets or record["args"]["dataset"] in datasets]
    return [record for record in found if not lines or _line(Row.of(record["args"])) in lines]


def _line(row: Row) -> tuple[str, str]:
    return row.algorithm, row.partition


def choose_draws(records: Sequence[Record], criterion: str = "aa_wga", controls: bool = False) -> list[Draw]:
    """The draw per row, dataset and test environments that is best on validation, over all draws and trials.

    Steps and ties as in ``model_selection.choose``, then the smallest trial seed; several seeds of a draw count each
    for itself. A control whose method was searched too takes the method's draw.

    Args:
        criterion: a name in ``model_selection.CRITERIA``.
        controls: add the controls of the methods that were searched without.

    Raises:
        ValueError: no run can be judged, or there are no controls to add.
    """
    chosen = _best_over_trials(choose(records, criterion))
    if not chosen:
        raise ValueError(
            f"none of {len(records)} records has what {criterion} goes by, groups on validation; search on a dataset "
            "that knows its confounder, with training environments that are partly held out"
        )
    if controls and not any(_control_hparams(row) for row, _ in chosen):
        raise no_controls(row.algorithm for row, _ in chosen)
    names = _names(meeting(runs(records)))
    draws = [_draw(place, chosen, names) for place in chosen]
    draws += [_added_control(place, chosen, names) for place in chosen if controls and _lacks_control(place, chosen)]
    return sorted(draws, key=lambda draw: (draw.choice.run.cell, draw.name))


def _best_over_trials(choices: Iterable[Choice]) -> dict[Place, Choice]:
    best: dict[Place, Choice] = {}
    for choice in sorted(choices, key=lambda c: (-c.score, c.run.trial_seed, c.run.hparams_seed, c.run.seed)):
        best.setdefault((choice.run.row, choice.run.cell), choice)
    return best


def _names(met: Mapping[Cell, Collection[Row]]) -> dict[Row, str]:
    """The rows' names without what the tables add to every name."""
    bare = {row: _bare(row) for rows in met.values() for row in rows}
    names = row_names([{bare[row] for row in rows} for rows in met.values()])
    return {row: names[bare[row]] for row in bare}


def _bare(row: Row) -> Row:
    return replace(row, extras=tuple((key, value) for key, value in row.extras if key not in ALWAYS_NAMED))


def _control_hparams(row: Row) -> dict[str, Any]:
    return dict(declared("algorithms", row.algorithm, "CONTROL", {}))


def _draw(place: Place, chosen: Mapping[Place, Choice], names: Mapping[Row, str]) -> Draw:
    row, cell = place
    if not is_control(row):
        return Draw(names[row], chosen[place], chosen[place].record["hparams"])
    choice = chosen[_method(row, cell, chosen), cell]
    return Draw(names[row], choice, {**choice.record["hparams"], **_control_hparams(row)})


def _method(control: Row, cell: Cell, chosen: Mapping[Place, Choice]) -> Row:
    """The row that a control belongs to: the one it is named after, else the plainest; itself if there is none."""

    def distance(row: Row) -> tuple[bool, int, str]:
        own_name = control_label(row.label or _bare(row).describe(()))
        return control.label != own_name, len(row.extras), row.name

    methods = [row for row, there in chosen if there == cell and (off := control_of(row)) and is_same(off, control)]
    return min(methods, key=distance, default=control)


def _lacks_control(place: Place, chosen: Collection[Place]) -> bool:
    row, cell = place
    control = control_of(row)
    present = [other for other, there in chosen if there == cell]
    return control is not None and not any(is_same(other, control) for other in present)


def _added_control(place: Place, chosen: Mapping[Place, Choice], names: Mapping[Row, str]) -> Draw:
    row, choice = place[0], chosen[place]
    return Draw(control_label(names[row]), choice, {**choice.record["hparams"], **_control_hparams(row)})


def _read(draw: Draw) -> dict[str, Any]:
    """The draw's hparams without those that the algorithm does not read, which train would warn of."""
    unread = declared("algorithms", draw.choice.run.row.algorithm, "UNREAD_HPARAMS", ())
    return {name: value for name, value in draw.hparams.items() if name not in unread}


def refit_args_list(
    draws: Iterable[Draw], seeds: Sequence[int], changes: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The arguments of the jobs that train each draw with each seed: as the chosen run, but with explicit hparams.

    Args:
        seeds: of initial weights, order of the data and all else that is not the draw or the splits (``trial_seed``,
            which stays the chosen run's).
        changes: arguments of train that replace the run's; None and False replace nothing.

    Raises:
        ValueError: two of the changes answer the same question.
    """
    new = given(changes or {})
    check_exclusive(new)
    answered = {one for pair in EXCLUSIVE for one in pair if new.keys() & set(pair)}
    dropped = {"output_dir", "ranges", *answered}
    return [
        {
            **{key: value for key, value in given(draw.choice.record["args"]).items() if key not in dropped},
            "label": draw.name,
            "hparams": json.dumps(_read(draw), sort_keys=True),
            "hparams_seed": 0,
            "seed": seed,
            **new,
        }
        for draw in draws
        for seed in seeds
    ]

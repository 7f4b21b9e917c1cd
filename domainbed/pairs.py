"""Rows -> which is the control of which; chosen checkpoints of two rows -> pairs."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from domainbed.model_selection import CRITERIA, Choice, choose, choose_oracle
from domainbed.rows import Cell, Row, declared, runs

Record = Mapping[str, Any]
Place = tuple[Row, Cell]

LAST_STEP = "last step"  # the view in which nothing is selected
ORACLE = "oracle"  # the view that looks at the test environments


def control_of(row: Row) -> Row | None:
    """The row with its algorithm's CONTROL, the hparams that switch its penalty off, laid over its own; no label.

    Returns:
        None if the algorithm declares none, or the row is itself a control.
    """
    extras = dict(row.extras)
    off = declared("algorithms", row.algorithm, "CONTROL", {})
    changed = {key: value for key, value in off.items() if key not in extras or json.loads(extras[key]) != value}
    control = extras | {key: json.dumps(value, sort_keys=True) for key, value in changed.items()}
    return replace(row, label=None, extras=tuple(sorted(control.items()))) if changed else None


def is_same(row: Row, other: Row) -> bool:
    """Whether two rows differ in nothing but their labels and in how they write a number (0 and 0.0)."""
    values = [{key: json.loads(text) for key, text in each.extras} for each in (row, other)]
    return values[0] == values[1] and replace(row, label=None, extras=()) == replace(other, label=None, extras=())


def is_control(row: Row) -> bool:
    """Whether the row's algorithm has a penalty, and it is switched off."""
    return bool(declared("algorithms", row.algorithm, "CONTROL", {})) and control_of(row) is None


def with_controls(met: Mapping[Cell, Collection[Row]]) -> list[tuple[Row, Row, Cell]]:
    """Each row and its control, where both were trained on the same data.

    Labels may differ. Of several controls those with the row's own label count alone, if there are any.
    """
    found = []
    for cell, rows in met.items():
        for row in rows:
            control = control_of(row)
            candidates = [other for other in rows if control and is_same(other, control)]
            same_label = [other for other in candidates if other.label == row.label]
            found += [(row, other, cell) for other in same_label or candidates]
    return found


@dataclass(frozen=True)
class View:
    """One way to choose the checkpoint of each trial.

    Attributes:
        name: a name in CRITERIA, LAST_STEP or ORACLE.
        chosen: of a row and cell, one per trial.
        draws: the hparams seeds of each row and cell that this way can choose for.
    """

    name: str
    chosen: Mapping[Place, Sequence[Choice]]
    draws: Mapping[Place, Collection[int]]


def _by_place(choices: Iterable[Choice]) -> dict[Place, list[Choice]]:
    found = defaultdict(list)
    for choice in choices:
        found[choice.run.row, choice.run.cell].append(choice)
    return dict(found)


def views(records: Iterable[Record]) -> list[View]:
    """What each criterion chooses, the last step of each run where a row has a single draw, and the best on test."""
    by_run = runs(records)
    draws: dict[Place, set[int]] = defaultdict(set)
    for run in by_run:
        draws[run.row, run.cell].add(run.hparams_seed)
    every = [record for checkpoints in by_run.values() for record in checkpoints]
    selected = [View(criterion, _by_place(choose(every, criterion)), draws) for criterion in CRITERIA]
    fixed = {place: seeds for place, seeds in draws.items() if len(seeds) == 1}
    last = [
        max(checkpoints, key=lambda record: record["step"])
        for run, checkpoints in by_run.items()
        if (run.row, run.cell) in fixed
    ]
    oracle = View(ORACLE, _by_place(choose_oracle(every)), draws)
    return [*selected, View(LAST_STEP, _by_place(choose(last)), fixed), oracle]


@dataclass(frozen=True)
class Pairing:
    """The trials of two rows on the same data, side by side.

    Attributes:
        pairs: the checkpoints of trials that both rows have, the first row's first.
        unpaired: number of trials of either row without a partner.
    """

    first: Row
    second: Row
    cell: Cell
    pairs: tuple[tuple[Choice, Choice], ...]
    unpaired: int

    def differing(self, attribute: str) -> int:
        """The number of pairs whose runs differ in one of the seeds, or whose checkpoints differ in the step."""

        def value(choice: Choice) -> int:
            return choice.step if attribute == "step" else int(getattr(choice.run, attribute))

        return sum(value(first) != value(second) for first, second in self.pairs)


def pair(view: View, first: Row, second: Row, cell: Cell, any_seed: bool = False) -> Pairing | None:
    """The pairs of two rows; None if the view can't choose for both.

    Where each row has a single draw, runs of equal seeds are pairs. Where draws compete, the trial is what both share:
    validation may choose another draw, and so another seed, for each; then trials of equal trial seed and replicate
    (``rows.replicates``) are pairs.

    Args:
        any_seed: pair by trial seed and replicate also where a trial's runs have a single draw but no seed in common,
            as with two algorithms, whose jobs' seeds differ.
    """
    places = (first, cell), (second, cell)
    if any(place not in view.draws for place in places):
        return None
    one_draw = all(len(view.draws[place]) == 1 for place in places)
    ours, theirs = ([c.run.trial_seed for c in view.chosen.get(place, [])] for place in places)
    pairs: list[tuple[Choice, Choice]] = []
    for trial_seed in sorted({*ours, *theirs}):
        mine, other = ([c for c in view.chosen.get(place, []) if c.run.trial_seed == trial_seed] for place in places)
        by_seed = one_draw and not (any_seed and _no_seed_in_common(mine, other))
        pairs += _matched(mine, other, by_seed, any_seed)
    return Pairing(first, second, cell, tuple(pairs), len(ours) + len(theirs) - 2 * len(pairs))


def _no_seed_in_common(mine: Iterable[Choice], other: Iterable[Choice]) -> bool:
    return not {c.run.seed for c in mine} & {c.run.seed for c in other}


def _matched(
    mine: Iterable[Choice], other: Iterable[Choice], by_seed: bool, any_draw: bool
) -> list[tuple[Choice, Choice]]:
    """The checkpoints of one trial seed that belong together, in the order of their seeds or replicates."""

    def key(choice: Choice) -> tuple[int, ...]:
        if not by_seed:
            return (choice.replicate,)
        return (choice.run.seed,) if any_draw else (choice.run.seed, choice.run.hparams_seed)

    ours, theirs = {key(c): c for c in mine}, {key(c): c for c in other}
    return [(ours[k], theirs[k]) for k in sorted(ours.keys() & theirs.keys())]

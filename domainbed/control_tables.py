"""Our tables of pairs: a method minus its control, seed by seed, and the same for any two rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed import messages, paired, table_formats
from domainbed import records as keys
from domainbed.group_tables import cell_titles, protocol_notes, selected_by
from domainbed.model_selection import Choice
from domainbed.paired import Difference
from domainbed.pairs import LAST_STEP, ORACLE, Pairing, pair, views, with_controls
from domainbed.rows import Cell, Row, Run, meeting, row_names, runs
from domainbed.table_formats import MISSING, Table
from domainbed.tables import line_names

Record = Mapping[str, Any]

LEAST_PAIRS = 3  # to say anything
SIGNIFICANT = 0.05
METRICS: dict[str, Callable[[Choice], float]] = {"AA": lambda c: c.test.aa, "WGA": lambda c: c.test.wga}
NUMBERS_NOTE = (
    "Percent, differences in percentage points; means over n pairs [95% t interval of the mean difference]; X: none. "
    "Rows with unfinished runs are counted as they are."
)
TESTS_NOTE = (
    "p: two-sided paired t-test; signed ranks: p of Wilcoxon's test, from 6 pairs on; Holm: p of WGA corrected for the "
    "lines of this table with at least 3 pairs. The last column goes by that, at 0.05."
)
CONTROL_NOTE = (
    "Control: the same row with the method's penalty switched off; runs of equal seeds share data, first weights and "
    "draws."
)
UNPAIRED_NOTE = "unpaired: trials of either row without a partner, which are left out."


@dataclass(frozen=True)
class _Kind:
    """What a table of pairs is called, and which pairs it may form."""

    title: str
    columns: tuple[str, str]
    other: str  # the word before the second row's numbers
    notes: tuple[str, ...]
    any_seed: bool = False


CHOSEN = {
    LAST_STEP: "last step, nothing selected",
    ORACLE: "ORACLE: selected by (AA + WGA) / 2 on the test environments themselves",
}
CONTROLS = _Kind("Method minus control, in pairs", ("Method", "Control"), "control", (CONTROL_NOTE,))


def control_tables(records: Iterable[Record]) -> list[Table]:
    """A table for each view of ``pairs.views``: a line for each row with a control on the same data."""
    by_run = _grouped(records)
    met = meeting(by_run)
    return _tables(by_run, with_controls(met), row_names(met.values()), CONTROLS)


def comparison_tables(records: Iterable[Record], first: str, second: str) -> list[Table]:
    """As ``control_tables``, for two rows by their names in DomainBed's tables (``rows.row_names``).

    Raises:
        ValueError: there is no such row, or the two have no pair.
    """
    by_run, names = _named(records, [first, second])
    one_algorithm = len({row.algorithm for row, name in names.items() if name in (first, second)}) == 1
    kind = _comparison(f"{first} minus {second}", one_algorithm)
    wanted = _pairs_of(meeting(by_run), lambda a, b: (names[a], names[b]) == (first, second))
    tables = _tables(by_run, wanted, names, kind) if first != second else []
    if not tables:
        raise ValueError(f"{first} and {second} have no pair: two rows with trials of the same dataset and test_envs")
    return tables


def comparisons_tables(records: Iterable[Record], reference: str) -> list[Table]:
    """As ``comparison_tables``, for every other row minus one; all lines of a table are corrected together.

    Raises:
        ValueError: there is no such row, or no other one has a pair with it.
    """
    by_run, names = _named(records, [reference])
    wanted = _pairs_of(meeting(by_run), lambda a, b: names[b] == reference != names[a])
    tables = _tables(by_run, wanted, names, _comparison(f"Every other row minus {reference}", one_algorithm=False))
    if not tables:
        raise ValueError(f"no row has a pair with {reference}: trials of the same dataset and test_envs")
    return tables


def _named(records: Iterable[Record], wanted: Iterable[str]) -> tuple[dict[Run, list[Record]], dict[Row, str]]:
    """The records by run, and the name of each row.

    Raises:
        ValueError: a wanted name is not among them.
    """
    by_run = _grouped(records)
    names = row_names(meeting(by_run).values())
    for name in wanted:
        if name not in names.values():
            raise ValueError(messages.not_found("row", name, map(repr, _sorted_names(names))))
    return by_run, names


def _pairs_of(met: Mapping[Cell, Iterable[Row]], is_wanted: Callable[[Row, Row], bool]) -> list[tuple[Row, Row, Cell]]:
    return [(a, b, cell) for cell, rows in met.items() for a in rows for b in rows if is_wanted(a, b)]


def _comparison(title: str, one_algorithm: bool) -> _Kind:
    notes = [
        "Pairs have equal trials and seeds; where draws compete or no seed is common, equal trials and ranks of seeds."
    ]
    if not one_algorithm:
        notes.append("Across algorithms pairs share splits and draws only, not the weights they start from.")
    return _Kind(title, ("Row", "Other"), "other", tuple(notes), any_seed=True)


def _grouped(records: Iterable[Record]) -> dict[Run, list[Record]]:
    return runs(record for record in records if keys.has_groups(record))


def _sorted_names(names: Mapping[Row, str]) -> list[str]:
    return line_names({name: row.algorithm for row, name in names.items()})


def _tables(
    by_run: Mapping[Run, Sequence[Record]],
    wanted: Sequence[tuple[Row, Row, Cell]],
    names: Mapping[Row, str],
    kind: _Kind,
) -> list[Table]:
    """A table for each view in which some of the wanted rows have pairs."""
    titles, order = cell_titles(meeting(by_run)), _sorted_names(names)
    places = list(titles)
    wanted = sorted(wanted, key=lambda w: (places.index(w[2]), order.index(names[w[0]]), order.index(names[w[1]])))
    rows = {row for first, second, _ in wanted for row in (first, second)}
    own = {run: checkpoints for run, checkpoints in by_run.items() if run.row in rows}
    protocol = protocol_notes(own)
    tables = []
    for view in views(record for checkpoints in own.values() for record in checkpoints):
        found = [pair(view, *rows_and_cell, kind.any_seed) for rows_and_cell in wanted]
        pairings = [pairing for pairing in found if pairing is not None]
        if any(pairing.pairs for pairing in pairings):
            tables.append(_table(pairings, view.name, names, titles, kind, protocol))
    return tables


def _table(
    pairings: Sequence[Pairing],
    view: str,
    names: Mapping[Row, str],
    titles: Mapping[Cell, str],
    kind: _Kind,
    protocol: Sequence[str],
) -> Table:
    measured = [{name: _difference(pairing, metric) for name, metric in METRICS.items()} for pairing in pairings]
    corrected = _corrected([found["WGA"] for found in measured])
    columns = _columns(pairings, measured, kind)
    columns["Holm"] = [_p(p) for p in corrected]
    columns = {name: cells for name, cells in columns.items() if any(cell != MISSING for cell in cells)}
    columns["WGA is"] = [_verdict(found["WGA"], p) for found, p in zip(measured, corrected, strict=True)]
    labels = [(titles[p.cell], names[p.first], names[p.second], _count(p)) for p in pairings]
    rows = [[*label, *cells] for label, *cells in zip(labels, *columns.values(), strict=True)]
    notes = [NUMBERS_NOTE, TESTS_NOTE, *protocol, *kind.notes, *_pairing_notes(pairings, view)]
    title = f"{kind.title}; {CHOSEN.get(view) or selected_by(view)}"
    return Table(title, notes, ["Dataset", *kind.columns, "n", *columns], rows)


def _difference(pairing: Pairing, metric: Callable[[Choice], float]) -> Difference | None:
    first, second = ([metric(pair[side]) for pair in pairing.pairs] for side in (0, 1))
    return paired.difference(first, second) if pairing.pairs else None


def _columns(
    pairings: Sequence[Pairing], measured: Sequence[Mapping[str, Difference | None]], kind: _Kind
) -> dict[str, list[table_formats.Cell | str]]:
    """The numbers of each metric, by the column's header."""
    columns = {}
    for name, metric in METRICS.items():
        found = [differences[name] for differences in measured]
        columns[name] = [_mean(metric(a) for a, _ in pairing.pairs) for pairing in pairings]
        columns[f"{kind.other} {name}"] = [_mean(metric(b) for _, b in pairing.pairs) for pairing in pairings]
        columns[f"{name} difference"] = [_difference_cell(d) for d in found]
        columns[f"{name} p"] = [_p(d.t_p if d else None) for d in found]
        columns[f"{name} signed ranks"] = [_p(d.signed_rank_p if d else None) for d in found]
    return columns


def _mean(values: Iterable[float]) -> table_formats.Cell | str:
    some = list(values)
    if not some:
        return MISSING
    return table_formats.Cell(f"{100 * np.mean(some):.1f}", {"mean": float(np.mean(some)), "n": len(some)})


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # adding zero turns -0.0 into 0.0


def _difference_cell(found: Difference | None) -> table_formats.Cell | str:
    if found is None:
        return MISSING
    interval = found.interval and f" [{_points(found.interval[0])}, {_points(found.interval[1])}]"
    names = ("low", "high", "bootstrap_low", "bootstrap_high")
    bounds = (*(found.interval or (None, None)), *(found.bootstrap or (None, None)))
    values = {"mean": found.mean, "n": found.n, **dict(zip(names, bounds, strict=True))}
    return table_formats.Cell(_points(found.mean) + (interval or ""), values)


def _p(p: float | None) -> table_formats.Cell | str:
    if p is None:
        return MISSING
    return table_formats.Cell("<0.001" if p < 0.001 else f"{p:.3f}", {"value": p})


def _count(pairing: Pairing) -> table_formats.Cell:
    n = len(pairing.pairs)
    text = f"{n} ({pairing.unpaired} unpaired)" if pairing.unpaired else str(n)
    return table_formats.Cell(text, {"value": n, "unpaired": pairing.unpaired})


def _corrected(found: Sequence[Difference | None]) -> list[float | None]:
    """Holm's p of each line that has a p and enough pairs; a line whose pairs all differ alike counts with p = 1."""
    tested = [i for i, d in enumerate(found) if d is not None and d.n >= LEAST_PAIRS]
    raw = [1.0 if (d := found[i]) is None or d.t_p is None else d.t_p for i in tested]
    corrected = dict(zip(tested, paired.holm(raw), strict=True))
    return [None if d is None or d.t_p is None else corrected.get(i) for i, d in enumerate(found)]


def _verdict(found: Difference | None, corrected: float | None) -> str:
    if found is None or found.n < LEAST_PAIRS:
        return "too few seeds"
    if corrected is None:
        return "equal in all pairs" if abs(found.mean) <= paired.TOLERANCE else "the same difference in all pairs"
    if corrected >= SIGNIFICANT:
        return "no significant difference"
    return "better" if found.mean > 0 else "worse"


def _pairing_notes(pairings: Sequence[Pairing], view: str) -> list[str]:
    """What the pairs at hand do not share, with numbers."""
    total = sum(len(pairing.pairs) for pairing in pairings)
    draws, seeds, steps = (sum(p.differing(name) for p in pairings) for name in ("hparams_seed", "seed", "step"))
    notes = []
    if draws:
        notes.append(f"{draws} of {total} pairs have different draws of the hparams, as validation chose for each row.")
    elif seeds:
        notes.append(f"{seeds} of {total} pairs have different seeds.")
    if steps and view == LAST_STEP:
        notes.append(f"{steps} of {total} pairs end at different steps.")
    return notes + ([UNPAIRED_NOTE] if any(pairing.unpaired for pairing in pairings) else [])

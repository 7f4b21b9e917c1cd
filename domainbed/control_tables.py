"""Our tables of pairs: a method minus its control, seed by seed, and the same for any two rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed import messages, paired
from domainbed import records as keys
from domainbed.group_tables import CRITERION_TITLES, cell_titles
from domainbed.model_selection import Choice
from domainbed.paired import Difference
from domainbed.pairs import LAST_STEP, ORACLE, Pairing, pair, views, with_controls
from domainbed.rows import Cell, Row, Run, meeting, row_names, runs
from domainbed.tables import MISSING, document, line_names, wide_table

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


def control_tables(records: Iterable[Record], latex: bool = False) -> str:
    """A table for each view of ``pairs.views``: a line for each row with a control on the same data.

    Empty text without pairs.
    """
    by_run = _grouped(records)
    met = meeting(by_run)
    text = _tables(by_run, with_controls(met), row_names(met.values()), CONTROLS, latex)
    return document(text, CONTROLS.title, f"Total records: {_total(by_run)}") if latex and text else text


def comparison_tables(records: Iterable[Record], first: str, second: str, latex: bool = False) -> str:
    """As ``control_tables``, for two rows by their names in DomainBed's tables (``rows.row_names``).

    Raises:
        ValueError: there is no such row, or the two have no pair.
    """
    by_run = _grouped(records)
    met = meeting(by_run)
    names = row_names(met.values())
    for name in (first, second):
        if name not in names.values():
            raise ValueError(messages.not_found("row", name, map(repr, _sorted_names(names))))
    wanted = [
        (a, b, cell) for cell in met for a in met[cell] for b in met[cell] if (names[a], names[b]) == (first, second)
    ]
    one_algorithm = len({row.algorithm for row, name in names.items() if name in (first, second)}) == 1
    text = _tables(by_run, wanted, names, _comparison(first, second, one_algorithm), latex) if first != second else ""
    if not text:
        raise ValueError(f"{first} and {second} have no pair: two rows with trials of the same dataset and test_envs")
    return document(text, "Two rows", f"Total records: {_total(by_run)}") if latex else text


def _comparison(first: str, second: str, one_algorithm: bool) -> _Kind:
    notes = [
        "Pairs have equal trials and seeds; where draws compete or no seed is common, equal trials and ranks of seeds."
    ]
    if not one_algorithm:
        notes.append("Across algorithms pairs share splits and draws only, not the weights they start from.")
    return _Kind(f"{first} minus {second}", ("Row", "Other"), "other", tuple(notes), any_seed=True)


def _grouped(records: Iterable[Record]) -> dict[Run, list[Record]]:
    return runs(record for record in records if keys.has_groups(record))


def _total(by_run: Mapping[Run, Sequence[Record]]) -> int:
    return sum(map(len, by_run.values()))


def _sorted_names(names: Mapping[Row, str]) -> list[str]:
    return line_names({name: row.algorithm for row, name in names.items()})


def _tables(
    by_run: Mapping[Run, Sequence[Record]],
    wanted: Sequence[tuple[Row, Row, Cell]],
    names: Mapping[Row, str],
    kind: _Kind,
    latex: bool,
) -> str:
    """A table for each view in which some of the wanted rows have pairs."""
    titles, order = cell_titles(meeting(by_run)), _sorted_names(names)
    places = list(titles)
    wanted = sorted(wanted, key=lambda w: (places.index(w[2]), order.index(names[w[0]]), order.index(names[w[1]])))
    rows = {row for first, second, _ in wanted for row in (first, second)}
    text = ""
    for view in views(record for run, checkpoints in by_run.items() if run.row in rows for record in checkpoints):
        found = [pair(view, *rows_and_cell, kind.any_seed) for rows_and_cell in wanted]
        pairings = [pairing for pairing in found if pairing is not None]
        if any(pairing.pairs for pairing in pairings):
            text += _table(pairings, view.name, names, titles, kind, latex)
    return text


def _table(
    pairings: Sequence[Pairing],
    view: str,
    names: Mapping[Row, str],
    titles: Mapping[Cell, str],
    kind: _Kind,
    latex: bool,
) -> str:
    chosen = CHOSEN.get(view) or f"model selection: {CRITERION_TITLES[view]} on validation"
    measured = [{name: _difference(pairing, metric) for name, metric in METRICS.items()} for pairing in pairings]
    corrected = _corrected([found["WGA"] for found in measured])
    columns = _columns(pairings, measured, kind)
    columns["Holm"] = [MISSING if p is None else _p(p) for p in corrected]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    columns["WGA is"] = [_verdict(found["WGA"], p) for found, p in zip(measured, corrected, strict=True)]
    labels = [(titles[p.cell], names[p.first], names[p.second], _count(p)) for p in pairings]
    body = [[*label, *cells] for label, *cells in zip(labels, *columns.values(), strict=True)]
    notes = [NUMBERS_NOTE, TESTS_NOTE, *kind.notes, *_pairing_notes(pairings, view)]
    return wide_table(f"{kind.title}; {chosen}", notes, ["Dataset", *kind.columns, "n", *columns], body, latex)


def _difference(pairing: Pairing, metric: Callable[[Choice], float]) -> Difference | None:
    first, second = ([metric(pair[side]) for pair in pairing.pairs] for side in (0, 1))
    return paired.difference(first, second) if pairing.pairs else None


def _columns(
    pairings: Sequence[Pairing], measured: Sequence[Mapping[str, Difference | None]], kind: _Kind
) -> dict[str, list[str]]:
    """The numbers of each metric, by the column's header."""
    columns = {}
    for name, metric in METRICS.items():
        found = [differences[name] for differences in measured]
        columns[name] = [_mean(metric(a) for a, _ in pairing.pairs) for pairing in pairings]
        columns[f"{kind.other} {name}"] = [_mean(metric(b) for _, b in pairing.pairs) for pairing in pairings]
        columns[f"{name} difference"] = [_difference_cell(d) for d in found]
        columns[f"{name} p"] = [MISSING if d is None or d.t_p is None else _p(d.t_p) for d in found]
        signed = [MISSING if d is None or d.signed_rank_p is None else _p(d.signed_rank_p) for d in found]
        columns[f"{name} signed ranks"] = signed
    return columns


def _mean(values: Iterable[float]) -> str:
    some = list(values)
    return f"{100 * np.mean(some):.1f}" if some else MISSING


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # adding zero turns -0.0 into 0.0


def _difference_cell(found: Difference | None) -> str:
    if found is None:
        return MISSING
    interval = found.interval and f" [{_points(found.interval[0])}, {_points(found.interval[1])}]"
    return _points(found.mean) + (interval or "")


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _count(pairing: Pairing) -> str:
    return f"{len(pairing.pairs)} ({pairing.unpaired} unpaired)" if pairing.unpaired else str(len(pairing.pairs))


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

"""Records -> DomainBed's tables, as text and as data."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed import records as keys
from domainbed import registry
from domainbed.console import format_row
from domainbed.lib.query import Q
from domainbed.model_selection import SelectionMethod
from domainbed.rows import Run, declared, for_domainbed, meeting, replicates, row_names
from domainbed.run_index import Collected
from domainbed.table_formats import LATEX_PLUS_MINUS, MISSING, Cell, Table, document, escape, tabular

Record = Mapping[str, Any]


def table_text(
    table: Sequence[Sequence[Any]],
    header_text: str,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    colwidth: int = 10,
    latex: bool = True,
) -> str:
    """A table in DomainBed's layout, after an empty line.

    Args:
        table: the cells, without labels.
        header_text: title of the text table.
        col_labels: one more than the columns of ``table``; the first one stands over the row labels.
        colwidth: characters of a column; longer cells are cut (not in LaTeX).
    """
    body = [[label, *row] for label, row in zip(row_labels, table, strict=True)]
    if latex:
        lines = tabular(list(col_labels), body, colwidth)
    else:
        lines = [f"-------- {header_text}", *(format_row(row, colwidth) for row in [col_labels, *body])]
    return "\n".join(["", *lines, ""])


def format_mean(data: Iterable[float], latex: bool) -> tuple[float | None, float | None, str]:
    """Mean and standard error (population sd over sqrt(n)) in percent, and both as a cell; "X" for no data."""
    values = np.array(list(data), dtype=float)
    if not len(values):
        return None, None, MISSING
    mean, error = 100 * values.mean(), 100 * np.std(values / np.sqrt(len(values)))
    return float(mean), float(error), f"{mean:.1f} {LATEX_PLUS_MINUS if latex else '+/-'} {error:.1f}"


def _row_average(means: Sequence[float | None]) -> str:
    known = [mean for mean in means if mean is not None]
    return f"{sum(known) / len(known):.1f}" if known and len(known) == len(means) else MISSING


def in_order(package: str, present: Iterable[str]) -> list[str]:
    """Names of "algorithms" or "datasets": DomainBed's order, then our own, then unknown ones as they appear."""
    found = list(dict.fromkeys(present))
    known = dict.fromkeys([*registry.order(package), *registry.names(package)])
    return [name for name in known if name in found] + [name for name in found if name not in known]


def environment_names(dataset: str, records: Iterable[Record]) -> Sequence[str]:
    """Of all environments; a dataset without a class has env0, env1, ... as far as its records know environments."""
    names = _declared_names(dataset)
    if names is not None:
        return names
    own = [record for record in records if record["args"]["dataset"] == dataset]
    known = [env for record in own for split in ("in", "out") for env in keys.environments(record, split)]
    return [f"env{env}" for env in range(max(known, default=-1) + 1)]


def _declared_names(dataset: str) -> Sequence[str] | None:
    names: Sequence[str] | None = registry.domainbed_environments(dataset)
    return names or declared("datasets", dataset, "ENVIRONMENTS")


def columns(dataset: str, records: Iterable[Record]) -> dict[int, str]:
    """The test environments that a dataset's table shows, with their names (``environment_names``).

    All environments of DomainBed's datasets, and of others without TEST_ENVS; else these and what else was tested on.
    """
    own = [record for record in records if record["args"]["dataset"] == dataset]
    tested = {env for record in own for env in record["args"]["test_envs"]}
    return _columns(dataset, environment_names(dataset, own), tested)


def _columns(dataset: str, names: Sequence[str], tested: Iterable[int]) -> dict[int, str]:
    whole = registry.domainbed_environments(dataset) is not None  # DomainBed's tables have a column for each
    shown = None if whole else declared("datasets", dataset, "TEST_ENVS")
    envs = dict.fromkeys([*(range(len(names)) if shown is None else shown), *sorted(tested)])
    return {env: names[env] if env < len(names) else f"env{env}" for env in envs}


# (row name, dataset) -> trial, test environment, accuracy, in the order in which jobs come: means of floats depend on
# the order, and DomainBed takes them as they come.
Accs = dict[tuple[str, str], list[tuple[Any, int, float]]]
Place = tuple[Any, str, str, int]  # trial, dataset, row name, test environment


@dataclass(frozen=True)
class _Results:
    """What DomainBed's tables are made of.

    Attributes:
        total: number of records.
        names: of the lines, in order.
        columns: of each dataset, in order: test environments and their names.
        accs: the chosen accuracies by a selection method.
    """

    total: int
    names: Sequence[str]
    columns: Mapping[str, Mapping[int, str]]
    accs: Callable[[type[SelectionMethod]], Accs]


def _results(source: Iterable[Record] | Collected) -> _Results:
    return _of_collected(source) if isinstance(source, Collected) else _of_records(source)


def _of_records(records: Iterable[Record]) -> _Results:
    renamed, algorithms = for_domainbed(records)
    datasets = in_order("datasets", (record["args"]["dataset"] for record in renamed))
    groups: dict[Place, list[Record]] = defaultdict(list)
    for record in renamed:
        args = record["args"]
        for env in args["test_envs"]:
            groups[args["trial_seed"], args["dataset"], args["algorithm"], env].append(record)
    shown = {dataset: columns(dataset, renamed) for dataset in datasets}
    return _Results(
        len(renamed),
        line_names(algorithms),
        shown,
        lambda method: _by_line((place, method.sweep_acc(Q(group))) for place, group in groups.items()),
    )


def _of_collected(collected: Collected) -> _Results:
    """As of all records, of which few are looked at: mostly each run's own choice is known."""
    names, replicate = row_names(meeting(collected.runs).values()), replicates(collected.runs)
    groups: dict[Place, list[Run]] = defaultdict(list)
    tested: dict[str, set[int]] = defaultdict(set)
    for run, parts in collected.runs.items():
        tested[run.dataset].update(run.test_envs)
        for env in parts[0].summary.test_envs:
            groups[(run.trial_seed, replicate[run]), run.dataset, names[run.row], env].append(run)
    shown = {}
    for dataset in in_order("datasets", tested):
        own = _declared_names(dataset)
        if own is None:
            own = environment_names(dataset, collected.load(run for run in collected.runs if run.dataset == dataset))
        shown[dataset] = _columns(dataset, own, tested[dataset])
    return _Results(
        collected.total,
        line_names({names[run.row]: run.row.algorithm for run in collected.runs}),
        shown,
        lambda method: _by_line((place, collected.sweep_acc(method, group)) for place, group in groups.items()),
    )


def _by_line(found: Iterable[tuple[Place, float | None]]) -> Accs:
    accs: Accs = defaultdict(list)
    for (trial, dataset, name, env), acc in found:
        if acc is not None:
            accs[name, dataset].append((trial, env, acc))
    return accs


def _env_accs(accs: Accs, name: str, dataset: str, envs: Iterable[int]) -> list[list[float]]:
    """The accuracies of a line of a dataset's table: of each environment, one per trial."""
    found = accs.get((name, dataset), [])
    return [[acc for _, other, acc in found if other == env] for env in envs]


def _trial_means(accs: Accs, name: str, dataset: str) -> list[float]:
    """The mean over environments of each trial."""
    found = accs.get((name, dataset), [])
    trials = sorted({trial for trial, _, _ in found})
    return [float(np.mean([acc for other, _, acc in found if other == trial])) for trial in trials]


def _text_row(line: Iterable[Sequence[float]], latex: bool) -> list[str]:
    """The cells of a line and their average."""
    cells = [format_mean(accs, latex) for accs in line]
    return [*(cell for _, _, cell in cells), _row_average([mean for mean, _, _ in cells])]


def line_names(algorithms: Mapping[str, str]) -> list[str]:
    """Row names in the order of their algorithms; the plain name first, then by name."""
    rank = {name: position for position, name in enumerate(in_order("algorithms", algorithms.values()))}
    return sorted(algorithms, key=lambda name: (rank[algorithms[name]], name != algorithms[name], name))


def results_tables(records: Iterable[Record] | Collected, method: type[SelectionMethod], latex: bool) -> str:
    """DomainBed's tables of one selection method: one per dataset, then the averages.

    Lines are rows (``rows.row_names``), so that runs with other settings are never averaged together.
    """
    return _method_tables(_results(records), method, latex)


def _method_tables(results: _Results, method: type[SelectionMethod], latex: bool) -> str:
    accs, names = results.accs(method), results.names
    text = ""
    for dataset, envs in results.columns.items():
        text += f"\n\\subsubsection{{{escape(dataset)}}}\n" if latex else ""
        header = f"Dataset: {dataset}, model selection method: {method.name}"
        cells = [_text_row(_env_accs(accs, name, dataset, envs), latex) for name in names]
        text += table_text(cells, header, names, ["Algorithm", *envs.values(), "Avg"], 20, latex)
    text += "\n\\subsubsection{Averages}\n" if latex else ""
    header = f"Averages, model selection method: {method.name}"
    averages = [_text_row([_trial_means(accs, name, dataset) for dataset in results.columns], latex) for name in names]
    return text + table_text(averages, header, names, ["Algorithm", *results.columns, "Avg"], 25, latex)


def domainbed_tables(
    records: Iterable[Record] | Collected, methods: Iterable[type[SelectionMethod]], latex: bool
) -> str:
    """All that DomainBed's collector prints: the number of records, then the tables of each method."""
    results = _results(records)
    count = f"Total records: {results.total}"
    tables = {method.name: _method_tables(results, method, latex) for method in methods}
    if not latex:
        return f"{count}\n" + "".join(tables.values())
    body = "".join(f"\n\\subsection{{Model selection: {name}}}\n{text}" for name, text in tables.items())
    return document(body, "Full DomainBed results", count)


DATA_NOTE = "Percent; mean and standard error (population sd over the root of n, as DomainBed has it) over n trials."


def domainbed_data(records: Iterable[Record] | Collected, methods: Iterable[type[SelectionMethod]]) -> list[Table]:
    """The tables of ``domainbed_tables`` with their numbers, for other formats than text and LaTeX."""
    results = _results(records)
    names, found = results.names, []
    for method in methods:
        accs = results.accs(method)
        for dataset, envs in results.columns.items():
            body = [_env_accs(accs, name, dataset, envs) for name in names]
            found.append(_data_table(f"Dataset: {dataset}", method, names, [*envs.values()], body))
        body = [[_trial_means(accs, name, dataset) for dataset in results.columns] for name in names]
        found.append(_data_table("Averages", method, names, [*results.columns], body))
    return found


def _data_table(
    title: str,
    method: type[SelectionMethod],
    names: Sequence[str],
    labels: Sequence[str],
    body: Sequence[Sequence[Sequence[float]]],
) -> Table:
    """A table of the accuracies of each line, column and trial."""
    rows = []
    for name, trials in zip(names, body, strict=True):
        means = [format_mean(accs, latex=False)[0] for accs in trials]
        rows.append([name, *map(_data_cell, trials), _average_cell(means)])
    header = ["Algorithm", *labels, "Avg"]
    return Table(f"{title}, model selection method: {method.name}", [DATA_NOTE], header, rows)


def _data_cell(accs: Sequence[float]) -> Cell | str:
    mean, error, text = format_mean(accs, latex=False)
    if mean is None or error is None:
        return MISSING
    return Cell(text, {"mean": mean / 100, "standard error": error / 100, "n": len(accs)})


def _average_cell(means: Sequence[float | None]) -> Cell | str:
    text = _row_average(means)
    known = [mean for mean in means if mean is not None]
    return MISSING if text == MISSING else Cell(text, {"mean": float(np.mean(known)) / 100})

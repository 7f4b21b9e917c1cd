"""Records -> text: DomainBed's tables; those of several test environments, and of average and worst-group accuracy."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from domainbed import records as keys
from domainbed import registry
from domainbed.console import format_row
from domainbed.lib.query import Q
from domainbed.lib.reporting import get_grouped_records
from domainbed.model_selection import (
    CRITERIA,
    Checkpoint,
    Choice,
    IIDAccuracySelectionMethod,
    SelectionMethod,
    choose,
    choose_by_accuracy,
    validation_envs,
    with_several_test_envs,
)
from domainbed.rows import Cell, Row, declared, for_domainbed, meeting, row_names, runs

Record = Mapping[str, Any]

MISSING = "X"
LATEX_PLUS_MINUS = r"$\pm$"
LATEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\~{}",
    "^": r"\^{}",
    "±": LATEX_PLUS_MINUS,
}


def escape(text: object) -> str:
    """The text as LaTeX shows it."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in str(text))


def document(body: str, title: str, comment: str) -> str:
    """A LaTeX file that compiles as it is."""
    head = [r"\documentclass{article}", r"\usepackage{booktabs}", r"\usepackage{adjustbox}", r"\begin{document}"]
    return "\n".join([*head, rf"\section{{{title}}}", f"% {comment}", body + r"\end{document}", ""])


def _latex_line(cells: Iterable[object], colwidth: int) -> str:
    """As ``console.format_row``, but no cell is cut, which could lose a brace."""
    return " & ".join(str(cell).ljust(colwidth) for cell in cells) + " \\\\"


def _tabular(header: Sequence[str], body: Sequence[Sequence[str]], colwidth: int) -> list[str]:
    """A LaTeX table scaled to the page; the body's first column holds plain text, the others LaTeX."""
    return [
        r"\begin{center}",
        r"\adjustbox{max width=\textwidth}{%",
        rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
        r"\toprule",
        _latex_line([rf"\textbf{{{escape(label)}}}" for label in header], colwidth),
        r"\midrule",
        *(_latex_line([escape(label), *cells], colwidth) for label, *cells in body),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{center}",
    ]


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
        lines = _tabular(list(col_labels), body, colwidth)
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
    names: Sequence[str] | None = registry.domainbed_environments(dataset)
    names = names or declared("datasets", dataset, "ENVIRONMENTS")
    if names is not None:
        return names
    own = [record for record in records if record["args"]["dataset"] == dataset]
    known = [env for record in own for split in ("in", "out") for env in keys.environments(record, split)]
    return [f"env{env}" for env in range(max(known, default=-1) + 1)]


def columns(dataset: str, records: Iterable[Record]) -> dict[int, str]:
    """The test environments that a dataset's table shows, with their names (``environment_names``).

    All environments of a dataset without TEST_ENVS; else these and what else was tested on.
    """
    own = [record for record in records if record["args"]["dataset"] == dataset]
    names = environment_names(dataset, own)
    shown = declared("datasets", dataset, "TEST_ENVS")
    tested = sorted({env for record in own for env in record["args"]["test_envs"]})
    envs = dict.fromkeys([*(range(len(names)) if shown is None else shown), *tested])
    return {env: names[env] if env < len(names) else f"env{env}" for env in envs}


Accs = dict[tuple[str, str], dict[Any, dict[int, float]]]  # (row name, dataset) -> trial -> test environment -> acc


def _sweep_accs(records: Q, method: type[SelectionMethod]) -> Accs:
    accs: Accs = {}
    for group in get_grouped_records(records):
        acc = method.sweep_acc(group["records"])
        if acc is not None:
            trials = accs.setdefault((group["algorithm"], group["dataset"]), {})
            trials.setdefault(group["trial_seed"], {})[group["test_env"]] = acc
    return accs


def _dataset_rows(accs: Accs, names: Sequence[str], dataset: str, envs: Iterable[int], latex: bool) -> list[list[str]]:
    rows = []
    for name in names:
        trials = accs.get((name, dataset), {}).values()
        cells = [format_mean([trial[env] for trial in trials if env in trial], latex) for env in envs]
        rows.append([*(cell for _, _, cell in cells), _row_average([mean for mean, _, _ in cells])])
    return rows


def _average_rows(accs: Accs, names: Sequence[str], datasets: Sequence[str], latex: bool) -> list[list[str]]:
    rows = []
    for name in names:
        trials = [accs.get((name, dataset), {}).values() for dataset in datasets]
        cells = [format_mean([float(np.mean(list(trial.values()))) for trial in some], latex) for some in trials]
        rows.append([*(cell for _, _, cell in cells), _row_average([mean for mean, _, _ in cells])])
    return rows


def _line_names(algorithms: Mapping[str, str]) -> list[str]:
    """Row names in the order of their algorithms; the plain name first, then by name."""
    rank = {name: position for position, name in enumerate(in_order("algorithms", algorithms.values()))}
    return sorted(algorithms, key=lambda name: (rank[algorithms[name]], name != algorithms[name], name))


def results_tables(records: Iterable[Record], method: type[SelectionMethod], latex: bool) -> str:
    """DomainBed's tables of one selection method: one per dataset, then the averages.

    Lines are rows (``rows.row_names``), so that runs with other settings are never averaged together.
    """
    return _method_tables(*for_domainbed(records), method, latex)


def _method_tables(
    renamed: Sequence[Record], algorithms: Mapping[str, str], method: type[SelectionMethod], latex: bool
) -> str:
    """``results_tables`` of records whose rows are named already (``rows.for_domainbed``)."""
    names = _line_names(algorithms)
    datasets = in_order("datasets", (record["args"]["dataset"] for record in renamed))
    accs = _sweep_accs(Q(renamed), method)
    text = ""
    for dataset in datasets:
        envs = columns(dataset, renamed)
        text += f"\n\\subsubsection{{{escape(dataset)}}}\n" if latex else ""
        header = f"Dataset: {dataset}, model selection method: {method.name}"
        cells = _dataset_rows(accs, names, dataset, envs, latex)
        text += table_text(cells, header, names, ["Algorithm", *envs.values(), "Avg"], 20, latex)
    text += "\n\\subsubsection{Averages}\n" if latex else ""
    header = f"Averages, model selection method: {method.name}"
    averages = _average_rows(accs, names, datasets, latex)
    return text + table_text(averages, header, names, ["Algorithm", *datasets, "Avg"], 25, latex)


def domainbed_tables(records: Iterable[Record], methods: Iterable[type[SelectionMethod]], latex: bool) -> str:
    """All that DomainBed's collector prints: the number of records, then the tables of each method."""
    renamed, algorithms = for_domainbed(records)
    count = f"Total records: {len(renamed)}"
    tables = {method.name: _method_tables(renamed, algorithms, method, latex) for method in methods}
    if not latex:
        return f"{count}\n" + "".join(tables.values())
    body = "".join(f"\n\\subsection{{Model selection: {name}}}\n{text}" for name, text in tables.items())
    return document(body, "Full DomainBed results", count)


# Our own tables.

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
C = TypeVar("C", bound=Checkpoint)


def _cell(values: Sequence[float], most: int, latex: bool) -> str:
    """Mean and sd (ddof 1) in percent; the number of trials where it is less than the table's most."""
    if not values:
        return MISSING
    cell = f"{100 * np.mean(values):.1f}"
    if len(values) > 1:
        cell += f" {LATEX_PLUS_MINUS if latex else '±'} {100 * np.std(values, ddof=1):.1f}"
    return cell if len(values) == most else f"{cell} (n={len(values)})"


def _ordered(cells: Iterable[Cell]) -> list[Cell]:
    """By dataset in the registry's order, then by test environments."""
    cells = sorted(cells)
    return [cell for dataset in in_order("datasets", (d for d, _ in cells)) for cell in cells if cell[0] == dataset]


def _lines(names: Mapping[Row, str]) -> list[Line]:
    """The lines in order: by name as in DomainBed's tables, then as the paper has the partitions."""
    by_name = _line_names({name: row.algorithm for row, name in names.items()})
    partitions = [*SAMPLING, *sorted({row.partition for row in names} - SAMPLING.keys())]
    present = {(name, row.partition) for row, name in names.items()}
    return [(name, partition) for name in by_name for partition in partitions if (name, partition) in present]


def _trials(chosen: Iterable[C], names: Mapping[Row, str]) -> dict[tuple[Line, Cell], list[C]]:
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
    lines: Mapping[Line, Sequence[Sequence[float]]],
    most: int,
    latex: bool,
) -> str:
    """A table with columns as wide as they need, under its title and sentences on what its numbers are.

    Args:
        header: of the columns after the two that say what a line is.
        lines: the values of each of these columns, one per trial.
        most: number of trials of the cells that have most of them.
    """
    spread = f"mean ± sample sd (ddof 1) over {most} seeds" if most > 1 else "one seed"
    percent = f"Percent; {spread}; (n=...) where fewer; X: none. Rows with unfinished runs are counted as they are."
    header = ["Algorithm", "Sampling", *header]
    body = [
        [name, SAMPLING.get(partition, partition), *(_cell(trials, most, latex) for trials in columns)]
        for (name, partition), columns in lines.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    if latex:
        text = [escape(" ".join([f"{title}.", percent, *notes])), *_tabular(header, body, max(widths))]
    else:
        rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *body]]
        text = [f"-------- {title}", percent, *notes, *rows]
    return "\n".join(["", *text, ""])


def _budget_notes(rows: Iterable[Row]) -> list[str]:
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
    names, titles = row_names(met.values(), partition=False), _group_titles(met)
    trials = _trials(choose(records, criterion), names)
    shown = [(cell, metric) for cell in titles for metric in METRICS if _is_shown(metric, cell, trials)]
    lines = {line: [_values(metric, trials.get((line, cell), [])) for cell, metric in shown] for line in _lines(names)}
    title = "Average (AA) and worst-group (WGA) accuracy, model selection: "
    title += f"{CRITERION_TITLES[criterion]} on validation"
    notes = [note for metric, note in METRIC_NOTES.items() if any(metric == other for _, other in shown)]
    header = [f"{titles[cell]} {metric}" for cell, metric in shown]
    most = max(map(len, trials.values()), default=0)
    return _own_table(title, notes + _budget_notes(names), header, lines, most, latex)


def _group_titles(cells: Iterable[Cell]) -> dict[Cell, str]:
    """Titles by dataset and test environments, which are named where a dataset was tested on several."""
    ordered = _ordered(cells)
    several = {dataset for dataset, _ in ordered if sum(dataset == other for other, _ in ordered) > 1}
    return {
        (dataset, envs): f"{dataset}[{','.join(map(str, envs))}]" if dataset in several else dataset
        for dataset, envs in ordered
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
    trials = _trials(choose_by_accuracy(several, method), names)
    text = ""
    for cell in _ordered(met):
        chosen = {line: trials.get((line, cell), []) for line in _lines({row: names[row] for row in met[cell]})}
        lines = {
            line: [*([c.test[env] for c in some] for env in cell[1]), [c.mean for c in some]]
            for line, some in chosen.items()
        }
        trained, tested = _environments(cell, several)
        title = f"{cell[0]}, trained on {', '.join(trained)}, tested on {', '.join(tested)}: accuracy"
        title += f", model selection: {method.name}"
        most = max(map(len, chosen.values()))
        text += _own_table(title, _budget_notes(met[cell]), [*tested, "Mean"], lines, most, latex)
    return document(text, "Several test environments", f"Total records: {len(several)}") if latex else text


def _environments(cell: Cell, records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """Names of the environments that the runs of a cell are trained and tested on."""
    dataset, test_envs = cell
    known = dict(enumerate(environment_names(dataset, records)))
    trained = [name for env, name in known.items() if env not in {*test_envs, *validation_envs(dataset)}]
    return trained, [known.get(env, f"env{env}") for env in test_envs]

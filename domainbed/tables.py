"""Records -> text: how any table is laid out, and DomainBed's tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from domainbed import records as keys
from domainbed import registry
from domainbed.console import format_row
from domainbed.lib.query import Q
from domainbed.lib.reporting import get_grouped_records
from domainbed.model_selection import SelectionMethod
from domainbed.rows import declared, for_domainbed

Record = Mapping[str, Any]

MISSING = "X"
LATEX_PLUS_MINUS = r"$\pm$"
LATEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\~{}",
    "^": r"\^{}",
    "<": "$<$",
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


def wide_table(
    title: str, notes: Iterable[str], header: Sequence[str], body: Iterable[Sequence[str]], latex: bool
) -> str:
    """A table with columns as wide as they need, under its title and sentences on what its numbers are.

    Args:
        body: the cells as plain text.
    """
    if latex:
        cells = [[label, *map(escape, others)] for label, *others in body]
        width = max(map(len, [*header, *(cell for row in cells for cell in row)]))
        return "\n".join(["", escape(" ".join([f"{title}.", *notes])), *_tabular(header, cells, width), ""])
    rows = [header, *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["", f"-------- {title}", *notes, *lines, ""])


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

    All environments of DomainBed's datasets, and of others without TEST_ENVS; else these and what else was tested on.
    """
    own = [record for record in records if record["args"]["dataset"] == dataset]
    names = environment_names(dataset, own)
    whole = registry.domainbed_environments(dataset) is not None  # DomainBed's tables have a column for each
    shown = None if whole else declared("datasets", dataset, "TEST_ENVS")
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


def line_names(algorithms: Mapping[str, str]) -> list[str]:
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
    names = line_names(algorithms)
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

"""Dataset cards for the report: what the class's docstring says and what the runs' records count."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from domainbed import cards, records, registry
from domainbed.group_tables import group_name
from domainbed.report.data import RunFacts
from domainbed.table_formats import Cell, Table
from domainbed.tables import environment_names


class Card(NamedTuple):
    """What is known of a dataset.

    Attributes:
        text: source, licence and more, as the class's docstring has them.
        tables: images of each group in what the runs measured, one for each choice of test environments.
        runs: number of jobs.
    """

    dataset: str
    text: str
    tables: list[Table]
    runs: int


def dataset_cards(runs: Iterable[RunFacts]) -> list[Card]:
    """A card for each dataset of the runs, in order of appearance."""
    by_dataset: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.args:
            by_dataset.setdefault(run.dataset, []).append(run)
    return [Card(name, docstring(name), _tables(own), len(own)) for name, own in by_dataset.items()]


def docstring(dataset: str) -> str:
    """What a dataset's class says of itself, read from its source; a sentence where that is not to be had."""
    folder = Path(registry.__file__).with_name("datasets")
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == dataset:
                return cards.description(ast.get_docstring(node), ())
    return "Its class is not part of this package; `python -m domainbed.scripts.describe` shows its card."


def _tables(runs: Iterable[RunFacts]) -> list[Table]:
    """Counts of one run per choice of test environments, of the first that has some."""
    found: dict[tuple[int, ...], Table] = {}
    for run in runs:
        envs = tuple(run.args.get("test_envs", ()))
        if envs not in found and run.counted is not None and (table := _counts(run, run.counted)):
            found[envs] = table
    return list(found.values())


def _counts(run: RunFacts, record: Mapping[str, Any]) -> Table | None:
    """Images of each group by what was measured; None where the record counts no group."""
    names = environment_names(run.dataset, [record])
    columns = {"training images": records.training_group_counts(record)}
    for kind in ("in", "out"):
        for env in records.environments(record, kind):
            name = names[env] if env < len(names) else f"env{env}"
            columns[f"{env}: {name}, {kind}-split"] = records.group_metrics(record, env, kind).n
    columns = {title: counts for title, counts in columns.items() if counts}
    groups = sorted(set().union(*columns.values()))
    if not groups:
        return None
    totals = {title: sum(counts.values()) for title, counts in columns.items()}
    lines: list[list[Cell | str]] = []
    for g in groups:
        cells = [_share(counts.get(g, 0), totals[title]) for title, counts in columns.items()]
        lines.append([group_name(run.args, g), *cells])
    title = f"Images of each group of {run.dataset}, test environments {run.args['test_envs']}"
    note = f"As run {run.name} counted them; an environment's in-split and out-split together are the whole of it."
    return Table(title, [note], ["Group", *columns], lines)


def _share(count: int, total: int) -> Cell:
    return Cell(cards.share(count, total), {"value": count})

"""Our tables of explanations: what they are worth on average and in the worst group, beside AA and WGA."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from domainbed import explanation_records as explained
from domainbed import records as keys
from domainbed import table_formats
from domainbed.explanation_records import Place, Settings, direction
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
)
from domainbed.model_selection import choose, choose_by_accuracy
from domainbed.rows import Cell, Row, Run, meeting, row_names
from domainbed.scores import Pooled
from domainbed.table_formats import MISSING, Table, render

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

SHORT = {  # a column's header, in the order of the columns
    "sufficiency": "suff",
    "comprehensiveness": "comp",
    "soft_sufficiency": "soft suff",
    "soft_comprehensiveness": "soft comp",
    "insertion_auc": "ins AUC",
    "deletion_auc": "del AUC",
    "mask_iou": "map IoU",
    "energy_in_mask": "energy",
    "pointing_game": "pointing",
    "learned_mask_iou": "own mask IoU",
    "learned_mask_area": "own mask area",
    "map_overlap": "overlap",
    "dead_maps": "dead",
}
NUMBERS_NOTE = (
    "Other columns: mean ± sample sd over the same runs, by the scale of each metric; (lower), (higher): which way it "
    "is better; docs/explanations.md defines them."
)
WORST_NOTE = "Each run's worst group by each metric: the largest mean where lower is better, else the smallest."
CHOICE_NOTE = "Where draws of the hparams compete, the explained model that validation prefers."


class Explained(NamedTuple):
    """One run's explanations, the test environments' in-splits pooled by their numbers of images.

    Attributes:
        run: whose they are.
        record: the run's record of the explained step.
        accuracy: AA and WGA of that step; None where the record does not have them.
        means: metric -> its mean over all images.
        worst: metric -> its mean over the group that is worst by it; empty without groups.
    """

    run: Run
    record: Record
    accuracy: Pooled | None
    means: dict[str, float]
    worst: dict[str, float]


def _parts(metric: str) -> tuple[str, str, str]:
    """What a metric's name is made of: "sufficiency", "blur", "lower"."""
    way = direction(metric)
    base = next((name for name in SHORT if metric.startswith(name)), metric.removesuffix(f"_{way}"))
    return base, metric.removesuffix(f"_{way}").removeprefix(base).strip("_"), way


def header(metric: str) -> str:
    """The column of a metric: "suff blur (lower)"."""
    base, fill, way = _parts(metric)
    return " ".join(part for part in (SHORT.get(base, base), fill, way and f"({way})") if part)


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics fill by fill, in the order of SHORT, those without a fill last; each once."""
    known = list(SHORT)

    def rank(metric: str) -> tuple[bool, str, int, str]:
        base, fill, _ = _parts(metric)
        return not fill, fill, known.index(base) if base in known else len(known), metric

    return sorted(set(metrics), key=rank)


def run_table(line: Record) -> str:
    """One line's numbers as text: a line for each metric, a column for each split's mean and each one's worst group."""
    settings, places = explained.settings_of(line), explained.places(line)
    model = f"{settings.model or 'last model'}, step {settings.step}" if settings.step >= 0 else settings.model
    title = f"Explanations by {settings.method} ({model}), seed {settings.seed}"
    notes = [f"env{e} {split}: {line[explained.explained_key(e, split)]} images." for e, split in places]
    means = {place: explained.metrics(line, *place) for place in places}
    worst = {place: _worst(explained.group_metrics(line, *place)) for place in places}
    columns = {f"env{e} {split}": means[e, split] for e, split in places}
    columns |= {f"env{e} {split} worst group": worst[e, split] for e, split in places if worst[e, split]}
    metrics = in_order(metric for some in means.values() for metric in some)
    body = [[header(m), *(_number(some[m]) if m in some else MISSING for some in columns.values())] for m in metrics]
    return render([Table(title, notes, ["Metric", *columns], body)], "text")


def explanation_tables(records: Iterable[Record], lines: Iterable[Record]) -> list[Table]:
    """Two tables, of means and of the worst groups, for each dataset, test environments and way of explaining.

    A line of a table is a row; its numbers are those of one run per trial: where draws compete, of the one that
    ``model_selection.choose`` (or, without groups, ``choose_by_accuracy``) takes among the explained models. Lines of
    explanations that do not cover a run's test environments are left out.

    Args:
        records: of the runs.
        lines: of their explanations (``explanation_records.iterate``).
    """
    lines = list(lines)
    if not lines:
        return []
    by_step = {(Run.of(record["args"]), record["step"]): record for record in records}
    found: dict[tuple[Cell, Settings], list[Explained]] = defaultdict(list)
    for line in lines:
        settings = explained.settings_of(line)
        one = _explained(line, by_step.get((Run.of(line["args"]), settings.step)))
        if one is not None:
            found[one.run.cell, replace(settings, step=0)].append(one)
    if left_out := len(lines) - sum(map(len, found.values())):
        logger.warning("%d of %d explanations are of no recorded step, or not of the test images", left_out, len(lines))
    names = row_names(meeting(one.run for some in found.values() for one in some).values(), partition=False)
    titles = cell_titles({cell for cell, _ in found})
    order = sorted(found, key=lambda place: (list(titles).index(place[0]), *_sortable(place[1])))
    return [table for cell, how in order for table in _tables(titles[cell], how, found[cell, how], names)]


def _sortable(settings: Settings) -> tuple[str, str, int, int, str]:
    return settings.model, settings.method, settings.n, settings.seed, settings.mask_dir


def _explained(line: Record, record: Record | None) -> Explained | None:
    """A line's numbers on the run's test environments; None where it lacks one of them, or the run that record."""
    run = Run.of(line["args"])
    tested: list[Place] = [(env, "in") for env in run.test_envs]
    if record is None or not set(tested) <= set(explained.places(line)):
        return None
    sizes = [line[explained.images_key(*place)] for place in tested]
    means = _pooled([(explained.metrics(line, *place), n) for place, n in zip(tested, sizes, strict=True)])
    groups = defaultdict(list)
    for place in tested:
        for g, metrics in explained.group_metrics(line, *place).items():
            groups[g].append((metrics, line[explained.images_key(*place, g)]))
    accuracy = keys.pooled(record, tested)
    return Explained(run, record, accuracy, means, _worst({g: _pooled(some) for g, some in groups.items()}))


def _pooled(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of several parts as one, each by its number of images."""
    names = dict.fromkeys(name for means, _ in parts for name in means)
    known = {name: [(means[name], n) for means, n in parts if name in means] for name in names}
    return {name: sum(mean * n for mean, n in some) / sum(n for _, n in some) for name, some in known.items()}


def _worst(groups: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Each metric's worst mean over groups; metrics without a direction are left out."""
    names = dict.fromkeys(name for means in groups.values() for name in means if direction(name))
    pick = {"lower": max, "higher": min}
    return {name: pick[direction(name)](m[name] for m in groups.values() if name in m) for name in names}


def _chosen(found: Sequence[Explained]) -> list[Explained]:
    """One per trial, and those that need no choice in any case."""
    rivals: dict[Any, list[Explained]] = defaultdict(list)
    for one in found:
        rivals[one.run.row, one.run.trial_seed].append(one)
    competing = {key for key, some in rivals.items() if len({one.run.hparams_seed for one in some}) > 1}
    alone = [one for key, some in rivals.items() if key not in competing for one in some]
    rest = [one for key in competing for one in rivals[key]]
    grouped = [one.record for one in rest if keys.has_groups(one.record)]
    plain = [one.record for one in rest if not keys.has_groups(one.record)]
    chosen = {choice.run for choice in [*choose(grouped), *choose_by_accuracy(plain)]}
    return alone + [one for one in rest if one.run in chosen]


def _tables(title: str, settings: Settings, found: Sequence[Explained], names: Mapping[Row, str]) -> list[Table]:
    """The table of means, and that of the worst groups if there are any."""
    trials: dict[Line, list[Explained]] = defaultdict(list)
    for one in _chosen(found):
        trials[names[one.run.row], one.run.row.partition].append(one)
    lines = [line for line in lines_of({one.run.row: names[one.run.row] for one in found}) if line in trials]
    most = max(map(len, trials.values()))
    model = settings.model or "the last model"
    title += f": explanations by {settings.method}, {settings.n} images (seed {settings.seed}), {model}"
    title += f", masks of {settings.mask_dir}" if settings.mask_dir else ""
    notes = [percent_note(most), *protocol_notes(one.run for one in found), NUMBERS_NOTE, CHOICE_NOTE]
    notes += budget_notes(one.run.row for one in found)
    tables = []
    for kind, extra in (("means", []), ("worst", [WORST_NOTE])):
        of_runs = {line: [getattr(one, kind) for one in trials[line]] for line in lines}
        metrics = in_order(metric for some in of_runs.values() for one in some for metric in one)
        body = [
            [*line_cells(line), *_accuracy_cells(trials[line], most)]
            + [mean_cell([one[metric] for one in of_runs[line] if metric in one], most, _number) for metric in metrics]
            for line in lines
        ]
        if metrics:
            head = title if kind == "means" else f"{title}: worst group"
            tables.append(Table(head, notes + extra, [*LINE_HEADER, "AA", "WGA", *map(header, metrics)], body))
    return tables


def _accuracy_cells(found: Sequence[Explained], most: int) -> list[table_formats.Cell | str]:
    """AA and WGA of the explained steps, in percent; without groups AA alone."""
    aa = [_average(one) for one in found]
    wga = [one.accuracy.wga for one in found if one.accuracy is not None]
    return [mean_cell([value for value in aa if value is not None], most), mean_cell(wga, most)]


def _average(one: Explained) -> float | None:
    if one.accuracy is not None:
        return one.accuracy.aa
    accs = [one.record.get(keys.acc_key(env, "in")) for env in one.run.test_envs]
    return None if None in accs else float(np.mean([acc for acc in accs if acc is not None]))


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # adding zero turns -0.0 into 0.0

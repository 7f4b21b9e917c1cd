"""Records -> figures of a sweep's rows: average against worst-group accuracy, time against it, average ranks."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from domainbed import records as keys
from domainbed.condensing import Timing
from domainbed.efficiency_tables import Cost, cost
from domainbed.figures import COLOURS, MARKERS, figure_class
from domainbed.group_tables import cell_titles, selected_by
from domainbed.intervals import t_interval
from domainbed.model_selection import Choice, choose
from domainbed.rank_tables import LEAST_DATASETS, ranked, verdict
from domainbed.ranks import LEVEL, Ranks
from domainbed.rows import Cell, Run, meeting, row_names, runs
from domainbed.tables import line_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Numbers = Sequence[float]

WORST = COLOURS[4]
FONT = {"title": 10, "text": 8.5}


class Picture(NamedTuple):
    """A figure, its title, and what is seen in words."""

    figure: "Figure"
    title: str
    description: str


@dataclass(frozen=True)
class Selected:
    """The chosen checkpoints of a sweep.

    Attributes:
        criterion: by which they are chosen.
        titles: of each dataset (with its test environments, where it has several).
        names: of the rows, in the order of the tables.
        chosen: one checkpoint per trial, by dataset and name.
        checkpoints: all records of the chosen runs at hand, by dataset and name, in the order of ``chosen``.
    """

    criterion: str
    titles: dict[Cell, str]
    names: list[str]
    chosen: dict[tuple[Cell, str], list[Choice]]
    checkpoints: dict[tuple[Cell, str], list[list[Record]]]

    @property
    def datasets(self) -> str:
        return ", ".join(self.titles.values())


def select(records: Iterable[Record], criterion: str = "aa_wga", each_run: bool = False) -> Selected:
    """What the criterion chooses on validation.

    Args:
        each_run: the best checkpoint of every run, and not of every trial.

    Raises:
        ValueError: no run has groups, so that there is no worst one.
    """
    by_run = runs(record for record in records if keys.has_groups(record))
    pools = by_run.values() if each_run else [[record for some in by_run.values() for record in some]]
    choices = [choice for pool in pools for choice in choose(pool, criterion)]
    if not choices:
        raise ValueError("no run holds groups on validation and on test images; take a dataset that has confounders")
    met = meeting(choice.run for choice in choices)
    names = row_names(met.values())
    chosen: dict[tuple[Cell, str], list[Choice]] = defaultdict(list)
    for choice in choices:
        chosen[choice.run.cell, names[choice.run.row]].append(choice)
    checkpoints = {place: [by_run[choice.run] for choice in some] for place, some in chosen.items()}
    order = line_names({name: row.algorithm for row, name in names.items()})
    return Selected(criterion, cell_titles(met), order, dict(chosen), checkpoints)


def style(position: int) -> tuple[str, str]:
    """Colour and marker of a row; those of the first 64 differ, those of neighbours in both."""
    return COLOURS[position % len(COLOURS)], MARKERS[(position + position // len(COLOURS)) % len(MARKERS)]


def percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def scatter(records: Iterable[Record], criterion: str = "aa_wga") -> Picture:
    """Average against worst-group accuracy of each row, a panel for each dataset.

    Raises:
        ValueError: see ``select``.
        ImportError: Matplotlib is missing.
    """
    selected = select(records, criterion)
    points = {
        place: (percent(c.test.aa for c in some), percent(c.test.wga for c in some))
        for place, some in selected.chosen.items()
    }
    title = f"Average and worst-group accuracy, {selected_by(criterion)}"
    labels = ("average accuracy (%)", "worst-group accuracy (%)")
    figure = _clouds(selected, points, title, labels)
    return Picture(figure, title, _in_words(selected, points, "average accuracy {:.1f} %", "worst-group accuracy"))


def time(records: Iterable[Record], criterion: str = "aa_wga", timings: Mapping[Run, Timing] | None = None) -> Picture:
    """Training time against worst-group accuracy of each row, a panel for each dataset; times as in the tables.

    Args:
        timings: of the runs, where the records are not all there are (``run_index.Collected.timings``).

    Raises:
        ValueError: see ``select``; or no run was timed.
        ImportError: Matplotlib is missing.
    """
    selected = select(records, criterion)
    points = {}
    for place, some in selected.chosen.items():
        timed = [
            (cost(run).epoch_s if timings is None else Cost.of(timings[choice.run]).epoch_s, 100 * choice.test.wga)
            for run, choice in zip(selected.checkpoints[place], some, strict=True)
        ]
        known = [(seconds, wga) for seconds, wga in timed if seconds is not None]
        if known:
            points[place] = ([seconds for seconds, _ in known], [wga for _, wga in known])
    if not points:
        raise ValueError("no chosen run has a time (step_time) and a record after its first step; train further")
    title = f"Training time and worst-group accuracy, {selected_by(criterion)}"
    labels = ("seconds per epoch, evaluation not counted", "worst-group accuracy (%)")
    figure = _clouds(selected, points, title, labels)
    return Picture(figure, title, _in_words(selected, points, "{:.2f} s per epoch", "worst-group accuracy"))


def _clouds(
    selected: Selected,
    points: Mapping[tuple[Cell, str], tuple[Numbers, Numbers]],
    title: str,
    labels: tuple[str, str],
) -> "Figure":
    """A panel for each dataset: the rows' means with 95% t intervals, each seed as a faint dot."""
    cells = [cell for cell in selected.titles if any(cell == other for other, _ in points)]
    columns = min(len(cells), 3)
    lines = math.ceil(len(cells) / columns)
    width = max(6.0, 3.6 * columns)
    abreast = max(1, int(width / (0.085 * max(map(len, selected.names)) + 0.7)))  # names in a line of the legend
    height = 3.2 * lines + 0.7 + 0.23 * math.ceil(len(selected.names) / abreast)
    figure = figure_class()(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax, cell in zip(axes.flat, cells, strict=False):
        drawn = {name: points[cell, name] for name in selected.names if (cell, name) in points}
        _cloud(ax, drawn, selected.names, [axis for axis in (0, 1) if "%" in labels[axis]])
        ax.set_title(selected.titles[cell], fontsize=FONT["title"])
        ax.set_xlabel(labels[0], fontsize=FONT["text"])
        ax.set_ylabel(labels[1], fontsize=FONT["text"])
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    note = "one seed each"
    if _several_seeds(points):
        note = f"large: mean with its 95% t interval, which may leave the panel; small: {note}"
    _row_legend(figure, selected.names, abreast, note)
    entitle(figure, title)
    return figure


def _several_seeds(points: Mapping[tuple[Cell, str], tuple[Numbers, Numbers]]) -> bool:
    return any(len(numbers) > 1 for numbers, _ in points.values())


def entitle(figure: "Figure", title: str) -> None:
    """Puts the title above, on as many lines as it needs."""
    size = FONT["title"] + 1
    letters = int(figure.get_figwidth() * 72 / (0.55 * size))
    figure.suptitle("\n".join(textwrap.wrap(title, letters)), fontsize=size)


def _row_legend(figure: "Figure", names: Sequence[str], columns: int, note: str) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for position, name in enumerate(names):
        colour, marker = style(position)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markeredgecolor="black", label=name))
    options: Any = {"ncols": min(columns, len(names)), "frameon": False, "title": note}
    sizes: Any = {"fontsize": FONT["text"], "title_fontsize": FONT["text"]}
    figure.legend(handles=handles, loc="outside lower center", **options, **sizes)


def _cloud(
    ax: "Axes", drawn: Mapping[str, tuple[Numbers, Numbers]], names: Sequence[str], percents: Sequence[int]
) -> None:
    for name, values in drawn.items():
        colour, marker = style(names.index(name))
        means = [float(np.mean(some)) for some in values]
        ax.plot(*values, color=colour, marker=marker, linestyle="", markersize=4.5, alpha=0.6, markeredgewidth=0)
        bars: Any = {"xerr": _reach(values[0]), "yerr": _reach(values[1]), "elinewidth": 1.1, "capsize": 2.5}
        ax.errorbar(means[0], means[1], **bars, color=colour, linestyle="", alpha=0.7)
        ax.plot(*means, color=colour, marker=marker, markersize=8, markeredgecolor="black", markeredgewidth=0.8)
    for set_limits, axis in ((ax.set_xlim, 0), (ax.set_ylim, 1)):
        most = 100.0 if axis in percents else math.inf
        set_limits(*_limits([values[axis] for values in drawn.values()], most))
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.tick_params(labelsize=FONT["text"])


def _reach(values: Numbers) -> list[list[float]] | None:
    """How far the interval goes to either side of the mean, as Matplotlib takes it; None without one."""
    interval, mean = t_interval(values), float(np.mean(values))
    return None if interval is None else [[mean - interval[0]], [interval[1] - mean]]


def _limits(rows: Sequence[Numbers], most: float) -> tuple[float, float]:
    """Ends of an axis that holds every seed, and the intervals as far as they leave the seeds some room.

    Intervals of two seeds are 13 standard errors wide to either side; shown whole, they would hide everything else.

    Args:
        most: the largest possible number; the smallest is 0.
    """
    every = [value for values in rows for value in values]
    low, high = min(every), max(every)
    room = 0.4 * max(high - low, 0.05 * high, 1e-3)
    ends = [end for values in rows for end in t_interval(values) or ()]
    margin = 0.2 * room
    first = max(0.0, low - room, min([low, *ends]))
    return first - margin, min(most, high + room, max([high, *ends])) + margin


def _in_words(
    selected: Selected, points: Mapping[tuple[Cell, str], tuple[Numbers, Numbers]], first: str, second: str
) -> str:
    """The means of each panel, the best row of the second number first; which rows and datasets have no point."""
    parts, missing, unknown = [], [], selected.chosen.keys() - points.keys()
    for cell, title in selected.titles.items():
        missing += [f"{name} on {title}" for name in selected.names if (cell, name) in unknown]
        if not any(cell == other for other, _ in points):
            continue
        found = {name: points[cell, name] for name in selected.names if (cell, name) in points}
        means = {name: [float(np.mean(some)) for some in values] for name, values in found.items()}
        ordered = sorted(means.items(), key=lambda entry: -entry[1][1])
        listed = "; ".join(f"{name} {first.format(x)}, {second} {y:.1f} %" for name, (x, y) in ordered)
        parts.append(f"{title}: {listed}.")
    parts += [f"Not drawn, for want of numbers: {', '.join(missing)}."] if missing else []
    what = "means over the seeds" if _several_seeds(points) else "one seed each"
    return f"Points, one per row of the tables; {what}, the best {second} first. {' '.join(parts)}"


def ranks(records: Iterable[Record]) -> Picture:
    """Average ranks over datasets by worst-group accuracy; a bar joins rows that the ranks do not tell apart.

    Source: Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7 (2006), figure 1.

    Raises:
        ValueError: see ``select``; too few rows or datasets to rank, or nothing differs.
        ImportError: Matplotlib is missing.
    """
    records = list(records)
    names, found = ranked(records)
    if found.critical_difference is None:
        raise ValueError(f"no average ranks: {_unranked(select(records, 'aa_wga'), found.n)}, or draw `figure scatter`")
    order = sorted(range(len(names)), key=lambda i: found.mean[i])
    styles = [style(i) for i in order]
    names, means = [names[i] for i in order], [found.mean[i] for i in order]
    title = f"Average ranks by worst-group accuracy, {selected_by('aa_wga')}"
    listed = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(names, means, strict=True))
    joined = [f"{names[i]} to {names[j]}" for i, j in cliques(means, found.critical_difference)]
    apart = f"Not told apart: {'; '.join(joined)}." if joined else "All are told apart."
    words = f"Average ranks over {found.n} datasets, 1 is best: {listed}. {apart} {verdict(found)}"
    return Picture(_rank_axis(names, means, styles, found, title), title, words)


def _unranked(selected: Selected, shared: int) -> str:
    """Why there are no average ranks, where every row has results on so many datasets; what to do."""
    rows = ", ".join(selected.names)
    if len(selected.names) < 2:
        return f"they compare two rows or more, and there is only {rows}; train another"
    if shared < 2:
        return (
            f"they need two datasets or more on which every row has results, and there are {shared} (rows {rows}; "
            f"datasets {selected.datasets}); train what is missing"
        )
    return f"the rows {rows} are equal on each of {shared} datasets; add datasets"


def cliques(means: Numbers, difference: float) -> list[tuple[int, int]]:
    """First and last position of each largest set of rows whose ranks, ascending, differ by less than the difference.

    Sets of one row, and sets within another, are left out.
    """
    found: list[tuple[int, int]] = []
    for i in range(len(means)):
        last = max(j for j in range(i, len(means)) if j == i or means[j] - means[i] < difference)
        if last > i and (not found or last > found[-1][1]):
            found.append((i, last))
    return found


def _rank_axis(
    names: Sequence[str], means: Numbers, styles: Sequence[tuple[str, str]], found: Ranks, title: str
) -> "Figure":
    """The diagram in units of ranks across and lines of text down; the axis lies at 0, 1 is at the left."""
    difference, k = found.critical_difference or 0.0, len(names)
    half, bars = math.ceil(k / 2), cliques(means, difference)
    depth = 0.8 + 0.35 * len(bars)  # where the first label stands
    figure = figure_class()(figsize=(8.0, 0.3 * (half + depth) + 1.5), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    wide = 0.35 * (k - 1)
    ax.set(xlim=(1 - wide, k + wide), ylim=(half + depth, -2.4))
    ax.plot([1, k], [0, 0], color="black", linewidth=1.2)
    for rank in range(1, k + 1):
        ax.plot([rank, rank], [0, -0.25], color="black", linewidth=1)
        ax.text(rank, -0.4, str(rank), ha="center", va="bottom", fontsize=FONT["text"])
    for position, (name, mean) in enumerate(zip(names, means, strict=True)):
        _rank_label(ax, f"{name} ({mean:.2f})", mean, depth, position, k)
        colour, marker = styles[position]
        ax.plot([mean], [0], color=colour, marker=marker, markersize=6, markeredgecolor="black", zorder=3)
    for level, (i, j) in enumerate(bars):
        ends = [means[i] - 0.012 * k, means[j] + 0.012 * k]
        ax.plot(ends, [0.45 + 0.35 * level] * 2, color=WORST, linewidth=4, solid_capstyle="butt")
    shown = min(difference, k - 1)
    ax.errorbar([1 + shown / 2], [-1.55], xerr=shown / 2, color="black", capsize=4, linewidth=1.2)
    more = "" if shown == difference else ", longer than the axis"
    ax.text(1, -1.8, f"critical difference {difference:.2f}{more}", ha="left", va="bottom", fontsize=FONT["text"])
    entitle(figure, title)
    note = f"{found.n} datasets; 1 is best; a bar joins rows that Nemenyi's test at {LEVEL} does not tell apart"
    note += f"\nToo few datasets to say that rows differ: at least {LEAST_DATASETS}" * (found.n < LEAST_DATASETS)
    figure.supxlabel(note, fontsize=FONT["text"])
    return figure


def _rank_label(ax: "Axes", text: str, mean: float, depth: float, position: int, k: int) -> None:
    """A row's name at the side where its half of the ranks is, with a line to its place on the axis."""
    half = math.ceil(k / 2)
    left = position < half
    line = depth + (position if left else k - 1 - position)
    edge = 1 - 0.04 * k if left else k + 0.04 * k
    ax.plot([mean, mean, edge], [0, line, line], color="0.35", linewidth=0.9)
    ax.text(edge, line, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center",
            fontsize=FONT["text"])  # fmt: skip

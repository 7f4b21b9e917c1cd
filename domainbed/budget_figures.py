"""Records -> the figure of worst-group accuracy against the annotations that were granted."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed.budget_tables import Budget, Chosen, chosen_by_budget
from domainbed.figures import COLOURS, MARKERS, figure_class
from domainbed.group_tables import cell_titles, selected_by
from domainbed.intervals import t_interval
from domainbed.record_figures import FONT, Picture, entitle
from domainbed.rows import Cell, Row
from domainbed.tables import line_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Line = Sequence[tuple[int, list[float]]]  # positions of budgets, and the WGA in percent of each trial there

COLUMNS = 5
AXES = {  # which budgets are shown: name -> test, and what is granted
    "both": (lambda budget: budget.training == budget.validation, "of training and validation images"),
    "training": (lambda budget: budget.validation == 1, "of training images; of validation images all"),
    "validation": (lambda budget: budget.training == 1, "of validation images; of training images all"),
}


def budget(records: Iterable[Record], axis: str = "both", criterion: str = "aa_wga") -> Picture:
    """Worst-group accuracy against the budget: a panel for each row, a line for each dataset.

    Args:
        axis: a name in AXES: the budgets that are shown.
        criterion: by which checkpoints are chosen, on the annotations that are granted.

    Raises:
        ValueError: there are not two such budgets.
        ImportError: Matplotlib is missing.
    """
    chosen = chosen_by_budget(records, criterion, partition=True)
    shown = [found for found in chosen.budgets if AXES[axis][0](found)]
    if len(shown) < 2:
        raise ValueError(
            f"figure budget --axis {axis} needs runs with two budgets or more, and there are {len(shown)}; give a "
            f"sweep --budgets, or another --axis ({', '.join(AXES)})"
        )
    titles = cell_titles({cell for cell, _, _ in chosen.trials})
    lines = {(cell, row): _line(cell, row, chosen, shown) for cell, row, _ in chosen.trials}
    order = line_names({name: row.algorithm for row, name in chosen.names.items()})
    rows = sorted({row for _, row in lines}, key=lambda row: order.index(chosen.names[row]))
    title = f"Worst-group accuracy by annotation budget, {selected_by(criterion)}"
    figure = _panels(rows, chosen.names, titles, lines, [_share(found, axis) for found in shown])
    figure.supxlabel(f"share (%) {AXES[axis][1]} whose confounder is granted", fontsize=FONT["text"])
    figure.supylabel("worst-group accuracy (%)", fontsize=FONT["text"])
    entitle(figure, title)
    return Picture(figure, title, _in_words(rows, chosen.names, titles, lines, shown))


def _share(found: Budget, axis: str) -> str:
    return f"{100 * (found.validation if axis == 'validation' else found.training):g}"


def _line(cell: Cell, row: Row, chosen: Chosen, shown: Sequence[Budget]) -> Line:
    trials = ((position, chosen.trials.get((cell, row, found), [])) for position, found in enumerate(shown))
    return [(position, [100 * choice.test.wga for choice in some]) for position, some in trials if some]


def _panels(
    rows: Sequence[Row],
    names: Mapping[Row, str],
    titles: Mapping[Cell, str],
    lines: Mapping[tuple[Cell, Row], Line],
    shares: Sequence[str],
) -> "Figure":
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(rows))
    height = math.ceil(len(rows) / columns)
    figure = figure_class()(figsize=(max(5.0, 2.0 * columns), 1.5 * height + 1.3), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True)
    for ax, row in zip(axes.flat, rows, strict=False):
        for number, cell in enumerate(titles):
            _draw(ax, lines.get((cell, row), ()), number)
        ax.set_title(names[row], fontsize=FONT["text"])
        ax.set_xticks(range(len(shares)), shares)
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=FONT["text"] - 1)
    for ax in axes.flat[len(rows) :]:
        ax.set_visible(False)
    looks = ((COLOURS[number], MARKERS[number], title) for number, title in enumerate(titles.values()))
    handles = [Line2D([], [], color=colour, marker=marker, label=title) for colour, marker, title in looks]
    options: Any = {"ncols": 3, "frameon": False, "title": "means over seeds with 95% t intervals"}
    figure.legend(
        handles=handles, loc="outside lower center", fontsize=FONT["text"], title_fontsize=FONT["text"], **options
    )
    return figure


def _draw(ax: "Axes", line: Line, number: int) -> None:
    """A dataset's line, a little to the side of those of other datasets."""
    if not line:
        return
    at = [position + 0.08 * number for position, _ in line]
    means = [float(np.mean(values)) for _, values in line]
    ends = [t_interval(values) or (mean, mean) for (_, values), mean in zip(line, means, strict=True)]
    reach = [[mean - low for (low, _), mean in zip(ends, means, strict=True)]]
    reach += [[high - mean for (_, high), mean in zip(ends, means, strict=True)]]
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    ax.errorbar(at, means, yerr=reach, color=colour, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.8)


def _in_words(
    rows: Sequence[Row],
    names: Mapping[Row, str],
    titles: Mapping[Cell, str],
    lines: Mapping[tuple[Cell, Row], Line],
    shown: Sequence[Budget],
) -> str:
    parts = []
    for cell, title in titles.items():
        listed = (
            f"{names[row]} "
            + ", ".join(f"{np.mean(values):.1f} at {shown[position].title}" for position, values in lines[cell, row])
            for row in rows
            if lines.get((cell, row))
        )
        parts.append(f"{title}: {'; '.join(listed)}.")
    return f"Mean worst-group accuracy over seeds. {' '.join(parts)}"

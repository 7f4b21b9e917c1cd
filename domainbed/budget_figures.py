"""Records -> the figure of worst-group accuracy against the annotations that were granted."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed.budget_tables import Budget, Chosen, chosen_by_budget
from domainbed.figures import figure_class
from domainbed.group_tables import cell_titles, selected_by
from domainbed.intervals import t_interval
from domainbed.record_figures import FONT, Picture, entitle, style
from domainbed.rows import Cell
from domainbed.tables import line_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Line = Sequence[tuple[int, list[float]]]  # positions of budgets, and the WGA in percent of each trial there

COLUMNS = 5
LETTERS = 13  # of a panel's title, to an inch
APART = 0.08  # budgets between the lines of two datasets
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
    shown = sorted(found for found in chosen.budgets if AXES[axis][0](found))
    if len(shown) < 2:
        raise ValueError(
            f"figure budget --axis {axis} needs runs with two budgets or more, and there are {len(shown)}; give a "
            f"sweep --budgets, or another --axis ({', '.join(AXES)})"
        )
    lines = _lines(chosen, shown)
    titles = cell_titles({cell for cell, _ in lines})
    order = line_names({name: row.algorithm for row, name in chosen.names.items()})
    names = [name for name in order if any(name == other for _, other in lines)]
    title = f"Worst-group accuracy by annotation budget, {selected_by(criterion)}"
    across = f"share (%) {AXES[axis][1]} whose confounder is granted"
    figure = _panels(names, titles, lines, [_share(found, axis) for found in shown], across)
    figure.supylabel("worst-group accuracy (%)", fontsize=FONT["text"])
    entitle(figure, title)
    return Picture(figure, title, _in_words(names, titles, lines, shown))


def _share(found: Budget, axis: str) -> str:
    return f"{100 * (found.validation if axis == 'validation' else found.training):g}"


def _lines(chosen: Chosen, shown: Sequence[Budget]) -> dict[tuple[Cell, str], Line]:
    """By dataset and name of a row: its settings may differ from dataset to dataset."""
    found: dict[tuple[Cell, str], dict[int, list[float]]] = defaultdict(dict)
    for (cell, row, budget), choices in chosen.trials.items():
        if budget in shown:
            found[cell, chosen.names[row]][shown.index(budget)] = [100 * choice.test.wga for choice in choices]
    return {place: sorted(line.items()) for place, line in found.items()}


def _several_seeds(lines: Mapping[tuple[Cell, str], Line]) -> bool:
    return any(len(values) > 1 for line in lines.values() for _, values in line)


def _panels(
    names: Sequence[str],
    titles: Mapping[Cell, str],
    lines: Mapping[tuple[Cell, str], Line],
    shares: Sequence[str],
    across: str,
) -> "Figure":
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(names))
    height = math.ceil(len(names) / columns)
    figure = figure_class()(figsize=(max(5.0, 2.0 * columns), 1.6 * height + 1.3), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True)
    letters = int(figure.get_figwidth() / columns * LETTERS)
    for place, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
        for number, cell in enumerate(titles):
            _draw(ax, lines.get((cell, name), ()), number, APART * (number - (len(titles) - 1) / 2))
        ax.set_title("\n".join(textwrap.wrap(name, letters)), fontsize=FONT["text"])
        ax.set_xticks(range(len(shares)), shares)
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=FONT["text"] - 1, labelbottom=place + columns >= len(names))
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    looks = [(*style(number), title) for number, title in enumerate(titles.values())]
    handles = [Line2D([], [], color=colour, marker=marker, label=title) for colour, marker, title in looks]
    note = "means over seeds with 95% t intervals" if _several_seeds(lines) else "one seed each"
    options: Any = {"ncols": 3, "frameon": False, "title": f"{across}\n{note}"}  # labels would overlap
    sizes = {"fontsize": FONT["text"], "title_fontsize": FONT["text"]}
    legend = figure.legend(handles=handles, loc="outside lower center", **sizes, **options)
    legend.get_title().set_multialignment("center")
    return figure


def _draw(ax: "Axes", line: Line, number: int, aside: float) -> None:
    """A dataset's line, a little to the side of those of other datasets."""
    if not line:
        return
    at = [position + aside for position, _ in line]
    means = [float(np.mean(values)) for _, values in line]
    ends = [t_interval(values) or (mean, mean) for (_, values), mean in zip(line, means, strict=True)]
    reach = [[mean - low for (low, _), mean in zip(ends, means, strict=True)]]
    reach += [[high - mean for (_, high), mean in zip(ends, means, strict=True)]]
    colour, marker = style(number)
    ax.errorbar(at, means, yerr=reach, color=colour, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.8)


def _in_words(
    names: Sequence[str],
    titles: Mapping[Cell, str],
    lines: Mapping[tuple[Cell, str], Line],
    shown: Sequence[Budget],
) -> str:
    parts = []
    for cell, title in titles.items():
        listed = (
            f"{name} "
            + ", ".join(f"{np.mean(values):.1f} at {shown[position].title}" for position, values in lines[cell, name])
            for name in names
            if (cell, name) in lines
        )
        parts.append(f"{title}: {'; '.join(listed)}.")
    head = (
        "Mean worst-group accuracy (%) over seeds." if _several_seeds(lines) else "Worst-group accuracy (%), one seed."
    )
    return f"{head} {' '.join(parts)}"

"""Records -> a figure of the accuracy of each group over the training."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed import records as keys
from domainbed.figures import COLOURS, figure_class
from domainbed.group_tables import group_name, selected_by
from domainbed.model_selection import Choice
from domainbed.record_figures import FONT, WORST, Picture, Selected, entitle, select
from domainbed.rows import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Place = tuple[int, str]  # environment, split
Course = dict[str, dict[int, float]]  # AA, WGA and each group's name -> step -> percent

GROUP, AVERAGE = COLOURS[5], COLOURS[-1]
MOST_COLUMNS = 4
LETTERS = 30  # of a title, in a line above a panel


def curves(
    records: Iterable[Record],
    criterion: str = "aa_wga",
    each_run: bool = False,
    envs: Sequence[int] | None = None,
    split: str = "in",
) -> Picture:
    """Accuracy of each group over the steps of the chosen runs, a panel for each row and dataset.

    Args:
        records: all of the runs.
        each_run: show every run, and not only the one that is chosen in each trial.
        envs: environments whose images are taken together; default: the test environments.
        split: "in" or "out".

    Raises:
        ValueError: see ``select``; or the runs did not measure groups there.
        ImportError: Matplotlib is missing.
    """
    selected = select(records, criterion, each_run)
    panels = {}
    for place, some in selected.chosen.items():
        splits = [(env, split) for env in (some[0].run.test_envs if envs is None else envs)]
        panels[place] = [_course(run, splits) for run in selected.checkpoints[place]]
    if not any(course for courses in panels.values() for course in courses):
        record = next(iter(selected.chosen.values()))[0].record
        known = [f"env{env} {kind}" for kind in ("in", "out") for env in keys.environments(record, kind)]
        raise ValueError(f"no run measured groups there; known are {', '.join(known)}: choose by --env and --split")
    where = "the test environments" if envs is None else f"env {', '.join(map(str, envs))}"
    where += f" ({split}-split)"
    title = f"Accuracy of each group on {where}, {selected_by(criterion)}"
    return Picture(_curve_panels(selected, panels, title), title, _courses_in_words(selected, panels, where))


def _course(run: Sequence[Record], splits: Sequence[Place]) -> Course:
    """Of one run, over all images of the splits together; empty where its records lack them."""
    found: Course = defaultdict(dict)
    for record in run:
        pooled = keys.pooled(record, splits)
        if pooled is None:
            continue
        found["AA"][record["step"]], found["WGA"][record["step"]] = 100 * pooled.aa, 100 * pooled.wga
        for g, acc in keys.pooled_groups(record, splits).acc.items():
            found[group_name(record["args"], g)][record["step"]] = 100 * acc
    return dict(found)


def _worst(courses: Sequence[Course], choices: Sequence[Choice]) -> str:
    """The group that is worst at the chosen steps of most runs; empty where groups are not known one by one."""
    worst: Counter[str] = Counter()
    for course, choice in zip(courses, choices, strict=True):
        groups = {name: line[choice.step] for name, line in _groups(course).items() if choice.step in line}
        worst.update([min(groups, key=groups.__getitem__)] if groups else [])
    return worst.most_common(1)[0][0] if worst else ""


def _groups(course: Course) -> Course:
    return {name: line for name, line in course.items() if name not in ("AA", "WGA")}


def _curve_panels(selected: Selected, panels: Mapping[tuple[Cell, str], list[Course]], title: str) -> "Figure":
    """Lines of panels, each dataset beginning a new one."""
    shown = {cell: [name for name in selected.names if (cell, name) in panels] for cell in selected.titles}
    most = max(map(len, shown.values()))
    columns = math.ceil(most / math.ceil(most / MOST_COLUMNS))  # 6 rows are two lines of 3
    lines = [(cell, names[i : i + columns]) for cell, names in shown.items() for i in range(0, len(names), columns)]
    figure = figure_class()(figsize=(max(6.5, 2.3 * columns), 2.2 * len(lines) + 1.0), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, sharey=True)
    for (cell, names), row in zip(lines, axes, strict=True):
        for ax, name in zip(row, names, strict=False):
            courses, choices = panels[cell, name], selected.chosen[cell, name]
            _curve_panel(ax, courses, choices)
            worst = _worst(courses, choices)
            words = [name, *([f"worst: {worst}"] if worst else [])]
            ax.set_title("\n".join(fill(some, LETTERS) for some in words), fontsize=FONT["title"] - 0.5)
        for ax in row[len(names) :]:
            ax.set_visible(False)
        row[0].set_ylabel(f"{selected.titles[cell]}\naccuracy (%)", fontsize=FONT["text"])
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=FONT["text"])
    handles = _curve_legend(any(len(courses) > 1 for courses in panels.values()))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT["text"], frameon=False)
    entitle(figure, title)
    return figure


def _curve_legend(several: bool) -> list[Any]:
    """What the lines are.

    Args:
        several: whether some panel shows more than one seed.
    """
    from matplotlib.lines import Line2D

    mean, band, seed = (" (mean)", " (mean; band: all seeds)", " of a seed") if several else ("", "", "")
    return [
        Line2D([], [], color=WORST, linewidth=2.4, label=f"worst-group accuracy{band}"),
        Line2D([], [], color=GROUP, linewidth=0.9, label=f"each group{mean}"),
        Line2D([], [], color=AVERAGE, linewidth=1.2, linestyle="--", label=f"average accuracy{mean}"),
        Line2D([], [], color=WORST, marker="v", linestyle="", markeredgecolor="black", label=f"chosen step{seed}"),
    ]


def _curve_panel(ax: "Axes", courses: Sequence[Course], choices: Sequence[Choice]) -> None:
    for name in dict.fromkeys(name for course in courses for name in _groups(course)):
        ax.plot(*_over_seeds(courses, name, np.mean), color=GROUP, linewidth=0.9)
    steps, low = _over_seeds(courses, "WGA", min)
    ax.fill_between(steps, low, _over_seeds(courses, "WGA", max)[1], color=WORST, alpha=0.2, linewidth=0)
    ax.plot(*_over_seeds(courses, "AA", np.mean), color=AVERAGE, linewidth=1.2, linestyle="--")
    ax.plot(*_over_seeds(courses, "WGA", np.mean), color=WORST, linewidth=2.4)
    for course, choice in zip(courses, choices, strict=True):
        chosen = [course["WGA"][choice.step]] if choice.step in course.get("WGA", {}) else []
        ax.plot([choice.step] * len(chosen), chosen, color=WORST, marker="v", markeredgecolor="black", zorder=3)
    ax.set_ylim(-3, 103)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.tick_params(labelsize=FONT["text"] - 0.5)


def _over_seeds(
    courses: Sequence[Course], name: str, function: Callable[[list[float]], Any]
) -> tuple[list[int], list[float]]:
    """The steps, and the function of all runs' values at each."""
    found: dict[int, list[float]] = defaultdict(list)
    for course in courses:
        for step, value in course.get(name, {}).items():
            found[step].append(value)
    return sorted(found), [float(function(found[step])) for step in sorted(found)]


def _courses_in_words(selected: Selected, panels: Mapping[tuple[Cell, str], list[Course]], where: str) -> str:
    parts = []
    shown = [(cell, name) for cell in selected.titles for name in selected.names if (cell, name) in panels]
    for cell, name in shown:
        courses = panels[cell, name]
        steps, means = _over_seeds(courses, "WGA", np.mean)
        if steps:
            worst = _worst(courses, selected.chosen[cell, name])
            part = f"{name} on {selected.titles[cell]} from {means[0]:.0f} to {means[-1]:.0f} % at step {steps[-1]}"
            parts.append(part + (f" (worst group: {worst})" if worst else ""))
    return f"Accuracy of every group on {where} over the training; worst-group accuracy: {'; '.join(parts)}."

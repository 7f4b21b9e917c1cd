"""Arrays -> figures: where networks look, drawn over the images; how features cluster."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from domainbed.input_pipelines import MEAN, STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

INCHES = 1.3  # a picture's side
CHARACTERS = 20  # that fit below or beside it
RIGHT, WRONG = "#009e73", "#d55e00"  # two that colour-blind readers tell apart
SIGNS = {True: "✓", False: "✗"}
# Okabe and Ito's colours, those that show on white first; black last, for texts are black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Strip:
    """A row or column of pictures: the images with something drawn over them.

    Attributes:
        title: what stands before the row, or above the column.
        maps: (n, h, w); heatmaps (``overlaid``) are scaled by their maximum, masks must be in [0, 1].
        overlaid: draw them in colour over the images in grey, else draw them alone.
        captions: below each picture, as the predicted class; may be empty.
        correct: frame each picture in RIGHT or WRONG and put a sign into its corner; None: neither.
    """

    title: str
    maps: Floats
    overlaid: bool = True
    captions: Sequence[str] = ()
    correct: NDArray[np.bool_] | None = None


def displayable(images: Floats) -> Floats:
    """Images (n, C, H, W) as a network takes them -> (n, H, W, 3) in [0, 1].

    One channel is grey, two are red and green. Values beyond [0, 1] are taken for those that an input pipeline
    normalised.
    """
    n, channels, height, width = images.shape
    if channels == 1:
        images = images.repeat(3, axis=1)
    elif channels == 2:
        images = np.concatenate([images, np.zeros((n, 1, height, width))], axis=1)
    shown = images[:, :3].transpose(0, 2, 3, 1)
    if shown.min() < 0 or shown.max() > 1:
        shown = shown * np.array(STD) + np.array(MEAN)
    clipped: Floats = np.clip(shown, 0, 1)
    return clipped


def figure_class() -> "type[Figure]":
    """Matplotlib's Figure.

    Raises:
        ImportError: Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs Matplotlib: pip install 'domainbed-ex2l[report]'") from error
    return Figure


def check_file(path: Path) -> None:
    """Raises ValueError if a figure can't be written to such a file."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a figure is written as {', '.join(SUFFIXES)}; name such a file")


def save(figure: "Figure", path: Path, title: str, description: str) -> None:
    """Writes a figure with a title and a sentence that says what is seen, for those who can't; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = "Subject" if path.suffix.lower() == ".pdf" else "Description"
    figure.savefig(path, dpi=150, metadata={"Title": title, key: description})


def explanation_grid(
    images: Floats, titles: Sequence[str], strips: Sequence[Strip], across: bool = True, first: str = "image"
) -> "Figure":
    """The images, then the strips.

    Args:
        images: (n, C, H, W), as a network takes them.
        titles: n of them, beside the images.
        across: an image's pictures stand below each other and each strip is a row; else a strip is a column.
        first: title of the images.

    Raises:
        ImportError: Matplotlib is missing.
        ValueError: a strip that does not have n maps.
    """
    n, shown = len(images), displayable(images)
    for strip in strips:
        if len(strip.maps) != n:
            raise ValueError(f"{strip.title}: {len(strip.maps)} maps of {n} images; give one of each")
    rows, columns = (len(strips) + 1, n) if across else (n, len(strips) + 1)
    size = INCHES * (columns + 1), INCHES * 1.25 * rows
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    if not across:
        axes = axes.T
    for ax, image in zip(axes[0], shown, strict=True):
        ax.imshow(image)
    for line, strip in zip(axes[1:], strips, strict=True):
        _draw(line, strip, shown)
    _name(axes, titles, [first, *(strip.title for strip in strips)], across)
    return figure


def _name(axes: Any, titles: Sequence[str], names: Sequence[str], across: bool) -> None:
    """Titles of the images (the second axis of ``axes``) and of the strips (the first)."""
    above, beside = (axes[0], axes[:, 0]) if across else (axes[:, 0], axes[0])
    for ax, text in zip(above, titles if across else names, strict=True):
        ax.set_title(_wrapped(text), fontsize=7)
    for ax, text in zip(beside, names if across else titles, strict=True):
        ax.set_ylabel(_wrapped(text), fontsize=7)


def _wrapped(text: str) -> str:
    """In lines that are not longer than a picture is wide."""
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, CHARACTERS))


def _draw(axes: Sequence[Any], strip: Strip, shown: Floats) -> None:
    height, width = shown.shape[1:3]
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    for i, ax in enumerate(axes):
        values = np.asarray(strip.maps[i], dtype=float)
        if strip.overlaid:
            ax.imshow(np.repeat(shown[i].mean(axis=2, keepdims=True), 3, axis=2))
            values = values.clip(0) / max(values.max(), np.finfo(float).tiny)
            ax.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=whole, interpolation="bilinear")
        else:
            ax.imshow(values, cmap="gray", vmin=0, vmax=1, extent=whole)
        caption = strip.captions[i] if strip.captions else ""
        if strip.correct is None:
            ax.set_xlabel(_wrapped(caption), fontsize=7, labelpad=2)
        else:
            _mark(ax, caption, bool(strip.correct[i]))


def _mark(ax: Any, caption: str, correct: bool) -> None:
    """A frame and a sign that say whether the prediction is right."""
    colour = RIGHT if correct else WRONG
    ax.set_xlabel(_wrapped(caption), fontsize=7, labelpad=2, color=colour, weight="bold")
    badge = {"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    place = {"transform": ax.transAxes, "ha": "left", "va": "top"}
    ax.text(0.02, 0.98, SIGNS[correct], fontsize=8, color="white", weight="bold", bbox=badge, **place)
    for spine in ax.spines.values():
        spine.set(visible=True, color=colour, linewidth=2)


@dataclass(frozen=True)
class Panel:
    """Points in the plane, coloured by what they are.

    Attributes:
        title: above it.
        points: (n, 2).
        values: (n,) int64, positions in ``names``.
        names: of the values; those that occur are in the legend.
    """

    title: str
    points: Floats
    values: Integers
    names: Sequence[str]


def scatter_grid(rows: Sequence[tuple[str, Sequence[Panel]]], title: str) -> "Figure":
    """A row of panels for each name, the names to the left; a legend below each column.

    The panels of a column show the same values, in the same colours and markers.

    Raises:
        ImportError: Matplotlib is missing.
    """
    columns = len(rows[0][1])
    height = 2.6 * len(rows) + 0.9
    figure = figure_class()(figsize=(3 * columns, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, panels) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for ax, panel in zip(line, panels, strict=True):
            _scatter(ax, panel)
    for ax, panel in zip(axes[0], rows[0][1], strict=True):
        ax.set_title(panel.title, fontsize=9)
    for position in range(columns):
        _legend(axes[-1][position], [panels[position] for _, panels in rows])
    return figure


def _look(value: int) -> dict[str, Any]:
    """A colour and a marker, which together tell 64 values apart."""
    return {"color": COLOURS[value % len(COLOURS)], "marker": MARKERS[(value + value // 8) % len(MARKERS)]}


def _scatter(ax: Any, panel: Panel) -> None:
    ax.set(xticks=[], yticks=[])
    order = np.random.default_rng(0).permutation(len(panel.values))  # so that no value lies above the others
    points, values = panel.points[order], panel.values[order]
    for part in np.array_split(np.arange(len(order)), max(1, len(order) // 50)):
        for value in np.unique(values[part]):
            some = part[values[part] == value]
            ax.scatter(*points[some].T, s=7, linewidths=0, alpha=0.75, **_look(int(value)))


def _legend(ax: Any, panels: Sequence[Panel]) -> None:
    """Below the lowest panel of a column, of all values that some panel of it shows."""
    from matplotlib.lines import Line2D

    present = sorted({int(value) for panel in panels for value in np.unique(panel.values)})
    names = panels[0].names
    handles = [Line2D([], [], linestyle="", markersize=5, label=names[value], **_look(value)) for value in present]
    longest = max(len(names[value]) for value in present)
    options = {"fontsize": 7, "frameon": False, "columnspacing": 0.8, "handletextpad": 0.1}
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=max(1, min(4, 44 // (longest + 4))),
        **options,
    )

"""Arrays -> figures: where networks look, drawn over the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from domainbed.input_pipelines import MEAN, STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]

INCHES = 1.3  # a picture's side
RIGHT, WRONG = "#2a9d3a", "#d62728"


@dataclass(frozen=True)
class MapRow:
    """A row of pictures: the images with something drawn over them.

    Attributes:
        title: what stands before the row.
        maps: (n, h, w); heatmaps (``overlaid``) are scaled by their maximum, masks must be in [0, 1].
        overlaid: draw them in colour over the images in grey, else draw them alone.
        captions: below each picture, as the predicted class; may be empty.
        correct: frame each picture in green or red; None: no frames.
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
        raise ImportError("a picture needs Matplotlib: pip install domainbed-ex2l[report]") from error
    return Figure


def explanation_grid(images: Floats, titles: Sequence[str], rows: Sequence[MapRow]) -> "Figure":
    """The images in the first row, then the rows.

    Args:
        images: (n, C, H, W), as a network takes them.
        titles: n of them, above the images.

    Raises:
        ImportError: Matplotlib is missing.
        ValueError: a row that does not have n maps.
    """
    n, shown = len(images), displayable(images)
    for row in rows:
        if len(row.maps) != n:
            raise ValueError(f"{row.title}: {len(row.maps)} maps of {n} images; give one of each")
    figure = figure_class()(figsize=(INCHES * (n + 1), 1.25 * INCHES * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots(len(rows) + 1, n, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    for ax, image, title in zip(axes[0], shown, titles, strict=True):
        ax.imshow(image)
        ax.set_title(title, fontsize=7)
    axes[0, 0].set_ylabel("image", fontsize=7)
    for line, row in zip(axes[1:], rows, strict=True):
        _draw(line, row, shown)
    return figure


def _draw(axes: Sequence[Any], row: MapRow, shown: Floats) -> None:
    height, width = shown.shape[1:3]
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes[0].set_ylabel(row.title, fontsize=7)
    for i, ax in enumerate(axes):
        values = np.asarray(row.maps[i], dtype=float)
        if row.overlaid:
            ax.imshow(np.repeat(shown[i].mean(axis=2, keepdims=True), 3, axis=2))
            values = values.clip(0) / max(values.max(), np.finfo(float).tiny)
            ax.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=whole, interpolation="bilinear")
        else:
            ax.imshow(values, cmap="gray", vmin=0, vmax=1, extent=whole)
        if row.captions:
            ax.set_xlabel(row.captions[i], fontsize=7, labelpad=2)
        if row.correct is not None:
            for spine in ax.spines.values():
                spine.set(visible=True, color=RIGHT if row.correct[i] else WRONG, linewidth=2)

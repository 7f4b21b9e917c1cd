import sys

import numpy as np
import pytest

from domainbed import figures
from domainbed.figures import MapRow, displayable, explanation_grid
from domainbed.input_pipelines import MEAN, STD

IMAGES = np.random.default_rng(0).random((3, 3, 8, 8))


def test_images_in_the_unit_interval_are_shown_as_they_are():
    assert np.array_equal(displayable(IMAGES), IMAGES.transpose(0, 2, 3, 1))


def test_normalised_images_are_shown_as_they_were():
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    assert displayable((IMAGES - mean) / std) == pytest.approx(IMAGES.transpose(0, 2, 3, 1))


def test_one_and_two_channels():
    assert (displayable(IMAGES[:, :1]) == IMAGES[:, :1].transpose(0, 2, 3, 1)).all()
    two = displayable(IMAGES[:, :2])
    assert (two[..., 2] == 0).all()
    assert (two[..., :2] == IMAGES[:, :2].transpose(0, 2, 3, 1)).all()


def test_a_grid():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    maps = np.zeros((3, 2, 2))
    maps[0, 0, 1] = 5.0  # the others are dead
    rows = [
        MapRow("a", maps, captions=["7", "8", "9"], correct=np.array([True, False, True])),
        MapRow("mask", np.ones((3, 8, 8)), overlaid=False),
    ]
    figure = explanation_grid(IMAGES, ["x", "y", "z"], rows)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["x", "y", "z"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["image", "a", "mask"]
    assert [ax.get_xlabel() for ax in axes[1]] == ["7", "8", "9"]
    frames = [ax.spines["left"].get_edgecolor() for ax in axes[1]]
    assert frames == [to_rgba(color) for color in (figures.RIGHT, figures.WRONG, figures.RIGHT)]
    assert not axes[2, 0].spines["left"].get_visible()
    heat = axes[1, 0].images[1]
    assert heat.get_array().tolist() == [[0, 1], [0, 0]]
    assert heat.get_extent() == [-0.5, 7.5, 7.5, -0.5]
    assert axes[1, 1].images[1].get_array().tolist() == [[0, 0], [0, 0]]
    assert len(axes[2, 0].images) == 1


def test_a_row_needs_a_map_of_each_image():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="a: 2 maps of 3 images"):
        explanation_grid(IMAGES, ["", "", ""], [MapRow("a", np.zeros((2, 4, 4)))])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install domainbed-ex2l\[report\]"):
        explanation_grid(IMAGES, ["", "", ""], [])

import sys
from pathlib import Path

import numpy as np
import pytest

from domainbed import figures
from domainbed.figures import Panel, Strip, displayable, explanation_grid, scatter_grid
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


def strips() -> list[Strip]:
    maps = np.zeros((3, 2, 2))
    maps[0, 0, 1] = 5.0  # the others are dead
    marked = Strip("a", maps, captions=["7", "8", "9"], correct=np.array([True, False, True]))
    return [marked, Strip("mask", np.ones((3, 8, 8)), overlaid=False)]


@pytest.mark.parametrize("across", [True, False])
def test_a_grid(across):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    figure = explanation_grid(IMAGES, ["x", "y", "z"], strips(), across)
    axes = np.array(figure.axes).reshape(3, 3)  # 3 images; them, and 2 strips
    above, beside = [ax.get_title() for ax in axes[0]], [ax.get_ylabel() for ax in axes[:, 0]]
    assert (above if across else beside) == ["x", "y", "z"]
    assert (beside if across else above) == ["image", "a", "mask"]
    axes = axes if across else axes.T
    assert np.array_equal([ax.images[0].get_array() for ax in axes[0]], displayable(IMAGES))
    assert [ax.get_xlabel() for ax in axes[1]] == ["7", "8", "9"]
    frames = [ax.spines["left"].get_edgecolor() for ax in axes[1]]
    assert frames == [to_rgba(color) for color in (figures.RIGHT, figures.WRONG, figures.RIGHT)]
    assert [[text.get_text() for text in ax.texts] for ax in axes[1]] == [["✓"], ["✗"], ["✓"]]
    assert not axes[2, 0].spines["left"].get_visible()
    assert not axes[2, 0].texts
    heat = axes[1, 0].images[1]
    assert heat.get_array().tolist() == [[0, 1], [0, 0]]
    assert heat.get_extent() == [-0.5, 7.5, 7.5, -0.5]
    assert axes[1, 1].images[1].get_array().tolist() == [[0, 0], [0, 0]]
    assert len(axes[2, 0].images) == 1


def test_long_titles_are_wrapped():
    pytest.importorskip("matplotlib")
    strip = Strip("one that is called something, long\nmask", np.ones((3, 2, 2)), captions=["a b " * 10, "", ""])
    figure = explanation_grid(IMAGES, ["", "", ""], [strip], False)
    texts = figure.axes[1].get_title(), figure.axes[1].get_xlabel()
    assert texts[0] == "one that is called\nsomething, long\nmask"
    assert max(map(len, texts[1].split("\n"))) <= figures.CHARACTERS


def test_a_strip_needs_a_map_of_each_image():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="a: 2 maps of 3 images"):
        explanation_grid(IMAGES, ["", "", ""], [Strip("a", np.zeros((2, 4, 4)))])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'domainbed-ex2l\[report\]'"):
        explanation_grid(IMAGES, ["", "", ""], [])


def test_panels_show_each_point_in_the_look_of_its_value_and_a_legend_of_those_that_occur():
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    points = rng.normal(size=(120, 2))
    a, b = rng.integers(0, 2, 120), 2 * rng.integers(0, 2, 120)
    names = ["zero", "one", "two"]
    rows = [(name, [Panel("A", points, a, names), Panel("B", points, b, names)]) for name in ("first", "second")]
    figure = scatter_grid(rows, "of what")
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["first", "second"]
    assert [ax.get_title() for ax in axes[0]] == ["A", "B"]
    drawn = np.concatenate([some.get_offsets() for some in axes[0, 0].collections])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, points))
    for ax, values in zip(axes[1], (a, b), strict=True):
        looks = {(tuple(some.get_facecolor()[0]), len(some.get_paths()[0])) for some in ax.collections}
        assert len(looks) == len(np.unique(values))
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == [names[value] for value in np.unique(values)]
    assert axes[0, 0].get_legend() is None


def test_64_values_have_looks_of_their_own():
    looks = {tuple(figures._look(value).values()) for value in range(64)}
    assert len(looks) == 64


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_says_what_it_shows(suffix: str, tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "new" / f"a.{suffix}"
    figures.check_file(path)
    figures.save(matplotlib.Figure(figsize=(1, 1)), path, "A title", "What is seen.")
    content = path.read_bytes()
    assert b"A title" in content
    assert b"What is seen." in content


def test_other_kinds_of_files_are_refused():
    with pytest.raises(ValueError, match=r"a.jpg: a figure is written as .png, .pdf, .svg"):
        figures.check_file(Path("a.jpg"))

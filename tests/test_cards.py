"""Dataset cards against text and pictures made by hand."""

import numpy as np
import pytest
from PIL import Image

from domainbed import cards
from domainbed.cards import Environment

NAMES = ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]


def environments(*counts: tuple[str, str, list[int]]) -> list[Environment]:
    return [Environment(name, role, np.array(n)) for name, role, n in counts]


BIRDS = environments(
    ("north", "training", [900, 90, 10, 0]),
    ("south", "training", [0, 10, 50, 40]),
    ("validation", "validation", [1, 1, 1, 3000]),
    ("test", "test", [5, 5, 0, 10]),
)


def test_the_table_of_groups() -> None:
    expected = """
group                 0: north     1: south  2: validation      3: test  all training
                      training     training     validation         test
landbird, land    900 (90.0 %)            0     1 (<0.1 %)   5 (25.0 %)  900 (81.8 %)
landbird, water     90 (9.0 %)  10 (10.0 %)     1 (<0.1 %)   5 (25.0 %)   100 (9.1 %)
waterbird, land     10 (1.0 %)  50 (50.0 %)     1 (<0.1 %)            0    60 (5.5 %)
waterbird, water             0  40 (40.0 %)  3000 (99.9 %)  10 (50.0 %)    40 (3.6 %)
all                       1000          100           3003           20          1100
"""
    assert cards.group_table(BIRDS, NAMES) == expected.strip("\n")


def test_one_training_environment_has_no_sum() -> None:
    table = cards.group_table(environments(("a", "training", [3, 1]), ("b", "test", [0, 2])), ["cat", "dog"], "class")
    assert table.splitlines() == [
        "class        0: a         1: b",
        "         training         test",
        "cat    3 (75.0 %)            0",
        "dog    1 (25.0 %)  2 (100.0 %)",
        "all             4            2",
    ]


def test_many_groups_are_shown_from_both_ends() -> None:
    counts = np.arange(70) * (np.arange(70) % 2)  # 0, 1, 0, 3, ... 69
    shown = cards.shown_groups(counts)
    assert shown == [*range(69, 50, -2), *range(19, 0, -2)]
    table = cards.group_table([Environment("a", "training", counts)], [f"g{g}" for g in range(70)])
    assert table.splitlines()[2].split() == ["g69", "69", "(5.6", "%)"]
    assert table.endswith("Shown: the 10 largest and the 10 smallest non-empty ones of 70 groups.")
    assert cards.shown_groups(counts[:64]) == list(range(64))
    few = np.zeros(70, dtype=np.int64)
    few[[3, 8]] = 1, 2
    assert cards.shown_groups(few) == [8, 3]


def test_groups_that_training_never_shows() -> None:
    assert cards.unseen_groups(BIRDS, NAMES) == "Every group of the test environments occurs in training."
    unseen = environments(
        ("a", "training", [1, 0, 0, 5]), ("v", "validation", [1, 1, 1, 1]), ("t", "test", [3, 2, 0, 0])
    )
    assert (
        cards.unseen_groups(unseen, NAMES)
        == "In the test environments but never in training (1 of 2): landbird, water."
    )


def test_published_counts() -> None:
    here = cards.parts(BIRDS, {"extra": (1, 2, 3, 4)})
    assert here["train"].tolist() == [900, 100, 60, 40]
    assert here["all"].tolist() == [906, 106, 61, 3050]
    as_published = {"north": 1000, "south": 100, "train": (900, 100, 60, 40), "val": 3003, "all": 4123, "extra": 10}
    text = cards.published(as_published, here, NAMES)
    assert text.splitlines() == [
        "Published counts: these files have them.",
        *(f"  {part}: as published" for part in as_published),
    ]
    text = cards.published(
        {"train": (3498, 100, 56, 40), "test": 20, "north": 9, "west": 3, "south": (1,)}, here, NAMES
    )
    assert text.splitlines() == [
        "Published counts: this is not the official release.",
        "  train: differs",
        "    landbird, land: 900 here, 3498 published",
        "    waterbird, land: 60 here, 56 published",
        "  test: as published",
        "  north: differs",
        "    images: 1000 here, 9 published",
        "  west: differs",
        "    no such part here",
        "  south: differs",
        "    4 groups here, 1 published",
    ]
    assert cards.published({}, here, NAMES) == "Published counts: none are recorded for this dataset."


def test_an_environment_wins_over_a_split_of_its_name() -> None:
    some = environments(("train", "training", [1]), ("more", "training", [2]), ("test", "test", [3]))
    assert cards.parts(some, {})["train"].tolist() == [1]


def test_descriptions() -> None:
    text = """Birds.

        Source: me.
        Licence: CC0.
    """
    assert cards.description(text) == "Birds.\n\nSource: me.\nLicence: CC0.\n\nNot stated: Layout."
    assert cards.description(text, ["Source", "Licence"]).endswith("CC0.")
    assert cards.description(None) == "The class has no docstring.\n\nNot stated: Source, Licence, Layout."


def test_few() -> None:
    assert cards.few(["a", "b"]) == "a, b"
    assert cards.few(list("abcd"), 2, "; ") == "a; b and 2 more"


def test_choices_are_seeded_members_in_order() -> None:
    groups = np.array([0, 1, 0, 2, 0, 0, 1])
    rows = cards.choose(groups, [0, 2, 1], np.random.default_rng(0), most=3)
    again = cards.choose(groups, [0, 2, 1], np.random.default_rng(0), most=3)
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    assert [len(row) for row in rows] == [3, 1, 2]
    for g, row in zip([0, 2, 1], rows, strict=True):
        assert (groups[row] == g).all()
        assert sorted(set(row.tolist())) == row.tolist()


@pytest.mark.parametrize(
    ("pixel", "expected"),
    [
        ([0.2], (51, 51, 51)),
        ([0.2, 1.0], (51, 255, 0)),
        ([0.2, 1.0, 0.6], (51, 255, 153)),
        ([0.2, 1.0, 0.6, 0.3], (51, 255, 153)),
    ],
)
def test_channels(pixel: list[float], expected: tuple[int, int, int]) -> None:
    picture = cards.to_picture(np.tile(np.float32(pixel)[:, None, None], (1, 2, 3)))
    assert picture.size == (3, 2)
    assert picture.getpixel((2, 1)) == expected


def test_values_beyond_the_unit_interval_are_stretched() -> None:
    picture = cards.to_picture(np.float32([[[-2, 0, 2]]]))
    assert [picture.getpixel((column, 0))[0] for column in range(3)] == [0, 128, 255]
    assert cards.to_picture(np.full((1, 1, 1), 3, np.float32)).getpixel((0, 0)) == (0, 0, 0)


def test_the_contact_sheet() -> None:
    red, wide = Image.new("RGB", (3, 3), "red"), Image.new("RGB", (192, 96), "blue")
    sheet = cards.contact_sheet([("one\n8 images", [red] * 8), ("a much longer title", [wide]), ("x", [])])
    assert sheet.height == 4 + 3 * 100
    left = sheet.width - 8 * 100
    pixels = np.asarray(sheet)
    assert (pixels[4:100, left : left + 96] == (255, 0, 0)).all()
    assert (pixels[4:100, left + 700 : left + 796] == (255, 0, 0)).all()
    assert (pixels[4:100, left + 96 : left + 100] == 255).all()
    assert (pixels[104:152, left : left + 96] == (0, 0, 255)).all()  # scaled to the cell's width
    assert (pixels[152:204, left:] == 255).all()
    assert all((pixels[4 + 100 * row : 100 + 100 * row, :left] < 128).any() for row in range(3))  # titles
    longer = cards.contact_sheet([("a title that is longer than those", [red])])
    assert longer.width > sheet.width

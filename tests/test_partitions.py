import dataclasses

import numpy as np
import pytest

from domainbed import partitions
from domainbed.partitions import Examples, Part, rows_per_part

EXAMPLES = Examples(
    labels=lambda: np.array([0, 0, 1, 1, 0, 1, 1]),
    c=np.array([0, 1, 0, 0, 0, 2, 0]),
    e=np.array([0, 0, 0, 0, 2, 2, 2]),
    num_confounders=3,
)


def parts(name: str, examples: Examples = EXAMPLES) -> dict[str, list[int]]:
    return {part.name: part.positions.tolist() for part in partitions.REGISTRY[name](examples)}


def test_parts_of_a_hand_made_case() -> None:
    assert parts("environment") == {"environment 0": [0, 1, 2, 3], "environment 2": [4, 5, 6]}
    assert parts("random") == {"all examples": [0, 1, 2, 3, 4, 5, 6]}
    assert parts("group") == {"group 0": [0, 4], "group 1": [1], "group 3": [2, 3, 6], "group 5": [5]}
    assert parts("confounder") == {"confounder 0": [0, 2, 3, 4, 6], "confounder 1": [1], "confounder 2": [5]}
    assert parts("label") == {"label 0": [0, 1, 4], "label 1": [2, 3, 5, 6]}


def hidden(*positions: int) -> Examples:
    """The examples, of which some are not annotated."""
    c = EXAMPLES.c.copy()
    c[list(positions)] = -1
    return dataclasses.replace(EXAMPLES, c=c)


def test_not_annotated_counts_as_one_more_confounder_value() -> None:
    some_hidden = hidden(0, 2, 5)
    assert parts("group", some_hidden) == {
        "group 0": [4], "group 1": [1], "group 3": [3, 6],
        "label 0, confounder not annotated": [0], "label 1, confounder not annotated": [2, 5],
    }  # fmt: skip
    assert parts("confounder", some_hidden) == {
        "confounder 0": [3, 4, 6], "confounder 1": [1], "confounder not annotated": [0, 2, 5],
    }  # fmt: skip


def test_without_any_annotation_groups_are_labels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    none = hidden(*range(7))
    assert list(parts("group", none).values()) == list(parts("label", none).values())
    assert list(parts("confounder", none).values()) == list(parts("random", none).values())
    assert caplog.messages[0] == (
        "partition group: the confounder of 7 of 7 training images is hidden; divided by: "
        "label 0, confounder not annotated (3); label 1, confounder not annotated (4)"
    )
    caplog.clear()
    assert parts("group")
    assert not caplog.messages


LOPSIDED = Examples(
    labels=lambda: np.repeat([0, 1], [60, 40]),
    c=np.concatenate([np.repeat([0, 1, -1], [30, 15, 15]), np.repeat([0, 1], [28, 12])]),
    e=np.zeros(100, dtype=int),
    num_confounders=2,
)


def subset(name: str, seed: int) -> np.ndarray:
    (part,) = partitions.REGISTRY[name](dataclasses.replace(LOPSIDED, seed=seed))
    return part.positions


def test_a_subset_holds_as_many_of_each_as_the_smallest_has(caplog: pytest.LogCaptureFixture) -> None:
    by_group, by_label = subset("group_subset", 0), subset("label_subset", 0)
    assert np.unique(by_group).tolist() == by_group.tolist()  # each at most once
    hidden_ = LOPSIDED.c[by_group] < 0
    assert np.bincount(LOPSIDED.g[by_group][~hidden_]).tolist() == [12] * 4
    assert LOPSIDED.y[by_group][hidden_].tolist() == [0] * 12
    assert np.unique(by_label).tolist() == by_label.tolist()
    assert np.bincount(LOPSIDED.y[by_label]).tolist() == [40, 40]
    assert not caplog.messages


def test_a_subset_is_drawn_from_its_seed_alone() -> None:
    for name in ("group_subset", "label_subset"):
        np.random.seed(1)
        first = subset(name, 3)
        state = np.random.get_state()[1].tolist()
        np.random.seed(2)
        assert first.tolist() == subset(name, 3).tolist() != subset(name, 4).tolist()
        np.random.seed(1)
        assert np.random.get_state()[1].tolist() == state  # nothing was drawn from numpy's own


def test_every_image_has_the_same_chance_to_be_in_a_subset() -> None:
    drawn = np.concatenate([subset("group_subset", seed) for seed in range(300)])
    shares = np.bincount(drawn, minlength=100) / 300
    expected = np.concatenate([np.repeat([12 / 30, 12 / 15], [30, 30]), np.repeat([12 / 28, 1.0], [28, 12])])
    assert np.abs(shares - expected).max() < 0.12  # four standard deviations


def test_a_tiny_subset_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert list(parts("group_subset")) == ["1 of each group"]
    assert caplog.messages == [
        "partition group_subset keeps 1 images of each of 4 parts, as many as group 1 has; "
        "to train on all images, balanced, take --partition group"
    ]


WHOLE = [name for name in partitions.REGISTRY if not name.endswith("_subset")]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("examples", [EXAMPLES, hidden(0, 2, 5), hidden(*range(7))], ids=["all", "some", "none"])
def test_every_example_is_in_exactly_one_part(name: str, examples: Examples) -> None:
    found = parts(name, examples).values()
    assert all(found)
    assert sorted(i for positions in found for i in positions) == list(range(7))


@pytest.mark.parametrize("name", partitions.BY_CONFOUNDER)
def test_one_value_in_all_images_divides_nothing(name: str) -> None:
    alike = dataclasses.replace(EXAMPLES, c=np.full(7, 2))
    with pytest.raises(ValueError, match=f"partition {name}: the confounder is 2 in all training images"):
        parts(name, alike)
    alike.c[0] = -1  # one more value
    assert parts(name, alike)


@pytest.mark.parametrize("name", partitions.BY_CONFOUNDER)
def test_a_dataset_without_confounder_is_refused(name: str) -> None:
    blind = Examples(EXAMPLES.labels, np.zeros(7, int), EXAMPLES.e, num_confounders=1)
    with pytest.raises(ValueError, match=f"partition {name} needs a dataset that knows its confounder"):
        parts(name, blind)


def some(n: int) -> list[Part]:
    return [Part(f"group {i}", np.arange(1)) for i in range(n)]


@pytest.mark.parametrize(
    ("n_parts", "batch_size", "environments", "rows"),
    [
        (2, 64, 2, 64),  # environment: DomainBed's own
        (2, 1, 2, 1),  # and untouched even where other partitions would need two rows
        (1, 64, 2, 128),  # random: as many examples as all environments give
        (8, 64, 2, 16),
        (3, 32, 2, 21),  # rounded
        (16, 8, 2, 2),  # at least two, here twice the nominal step
    ],
)
def test_rows_per_part(n_parts: int, batch_size: int, environments: int, rows: int) -> None:
    assert rows_per_part(some(n_parts), batch_size, environments) == rows


def test_too_many_parts_are_refused_with_a_batch_size_that_works() -> None:
    with pytest.raises(ValueError, match=r"17 parts .group 0 to group 16. .* batch_size of at least 9"):
        rows_per_part(some(17), 8, 2)
    assert rows_per_part(some(17), 9, 2) == 2

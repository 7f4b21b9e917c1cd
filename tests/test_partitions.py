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


@pytest.mark.parametrize("name", list(partitions.REGISTRY))
def test_every_example_is_in_exactly_one_part(name: str) -> None:
    assert sorted(i for positions in parts(name).values() for i in positions) == list(range(7))


@pytest.mark.parametrize("name", ["group", "confounder"])
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

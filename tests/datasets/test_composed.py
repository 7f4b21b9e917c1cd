"""Composition against brute force, the paper's printed tables and the counts that the documentation shows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from domainbed import datasets
from domainbed.datasets.base import ImageEnvironment, InMemoryEnvironment
from domainbed.datasets.composed import (
    compose,
    composed,
    composed_counts,
    divide,
    divided_counts,
    rounded,
    stratified_split,
)
from domainbed.images import Images

# Tables 4 and 5 of the eX2L paper in percent: per environment label 0 with both confounders, then label 1.
TABLE_4 = [[61.80, 18.37, 8.26, 11.58], [44.77, 30.20, 5.98, 19.05]]
TABLE_5 = [[41.77, 46.94, 10.20, 1.08], [46.79, 35.19, 17.36, 0.66]]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "environments.md"


def pooled(name: str) -> np.ndarray:
    return np.sum(list(datasets.get_dataset_class(name).PUBLISHED_COUNTS.values()), axis=0)


def flat(table) -> np.ndarray:
    return np.reshape(table, (2, -1))


def test_waterbirds_pooled_counts_are_those_known() -> None:
    assert pooled("Waterbirds").tolist() == [6220, 2905, 831, 1832]
    assert pooled("CelebA").sum() == 202599


@pytest.mark.parametrize(("name", "printed"), [("Waterbirds", TABLE_4), ("CelebA", TABLE_5)])
def test_shares_of_all_images_give_the_printed_tables(name: str, printed: list[list[float]]) -> None:
    dataset = datasets.get_dataset_class(name)
    images = flat(dataset.SHARES) * pooled(name)
    percent = 100 * images / images.sum(axis=1, keepdims=True)
    assert abs(percent - printed).max() <= 0.005
    assert np.allclose(flat(dataset.PROPORTIONS) * 100, printed)
    assert np.allclose(flat(dataset.SHARES).sum(axis=0), 1)


def test_printed_proportions_of_the_pooled_metadata() -> None:
    counts = composed_counts(pooled("Waterbirds"), flat(TABLE_4) / 100)
    assert counts.sum(axis=1).tolist() == [5533, 6253]
    assert composed_counts(pooled("CelebA"), flat(TABLE_5) / 100).sum() == 202590


def test_the_documentation_has_the_numbers_of_the_code() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for name in ("Waterbirds", "CelebA"):
        dataset = datasets.get_dataset_class(name)
        train, shares = np.array(dataset.PUBLISHED_COUNTS["train"]), flat(dataset.SHARES)
        readings = {
            "shares": divided_counts(train, shares),
            "subsample": composed_counts(train, flat(dataset.PROPORTIONS)),
            "pooled": divided_counts(pooled(name), shares),
        }
        lines = [f"| {split} |{cells(counts)}" for split, counts in dataset.PUBLISHED_COUNTS.items()]
        for reading, counts in readings.items():
            for environment, row in zip(dataset.ENVIRONMENTS, counts, strict=False):
                first = 100 * row[[0, 2]].sum() / row.sum()
                lines.append(f"| `{reading}` | {environment} |{cells(row)} {first:.1f} % |")
        section = text.split(f"### {name}\n")[1].split("\n##")[0].splitlines()
        assert [line for line in lines if line not in section] == []
    celeba = composed_counts(datasets.CelebA.PUBLISHED_COUNTS["train"], flat(datasets.CelebA.PROPORTIONS)).sum()
    assert f"takes {celeba:,} of the 162,770" in text
    waterbirds = composed_counts(datasets.Waterbirds.PUBLISHED_COUNTS["train"], flat(TABLE_4) / 100).sum()
    assert f"that is {waterbirds} of 4,795" in text


def cells(counts) -> str:
    return "".join(f" {n:,} |" for n in [*counts, sum(counts)])


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_sizes_against_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    have, proportions = rng.integers(3, 40, 3), rng.dirichlet(np.ones(3), 2)
    pairs = [sizes for sizes in itertools.product(range(120), repeat=2) if (sizes @ proportions <= have + 1e-9).all()]
    alike = (have / proportions.sum(axis=0)).min()
    largest = max(sum(sizes) for sizes in pairs if min(sizes) >= np.floor(alike / 2))
    found = composed_counts(have, proportions).sum(axis=1)
    assert largest - 2 <= found.sum() <= largest  # sizes are rounded down one by one
    assert tuple(found) in pairs
    assert min(found) >= np.floor(alike / 2)


def test_of_several_largest_the_most_even_sizes() -> None:
    assert composed_counts([30, 30], [[0.5, 0.5], [0.5, 0.5]]).tolist() == [[15, 15], [15, 15]]


def test_no_environment_is_starved_for_the_largest_total() -> None:
    counts = composed_counts([20, 20], [[1.0, 0.0], [0.5, 0.5]])  # 40 of the second and none of the first would fit
    assert counts.tolist() == [[6, 0], [13, 13]]  # 13 of each would fit


def test_images_can_stay_over() -> None:
    assert composed_counts([100, 10], [[0.5, 0.5]]).tolist() == [[10, 10]]


@pytest.mark.parametrize("seed", range(10))
def test_counts_are_within_one_image_of_the_proportions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, proportions = rng.integers(1, 50, 4), rng.dirichlet(np.ones(5), 4)
    exact = sizes[:, None] * proportions
    have = np.ceil(exact.sum(axis=0)).astype(int)
    counts = composed_counts(have, proportions, sizes.tolist())
    assert abs(counts - exact).max() < 1
    assert counts.sum(axis=1).tolist() == sizes.tolist()
    assert (counts.sum(axis=0) <= have).all()


def extreme(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Up to three million images of 2 to 6 groups, and proportions down to 1e-10 for 1 to 4 environments."""
    n, m = rng.integers(1, 5), rng.integers(2, 7)
    have = np.round(10 ** rng.uniform(0, 6.5, m)).astype(int)
    even = rng.random() < 0.5
    proportions = 10 ** rng.uniform(-10, 0, (n, m)) if even else rng.dirichlet(np.full(m, rng.choice([0.1, 1])), n)
    return have, proportions / proportions.sum(axis=1, keepdims=True)


def test_proportions_on_which_the_solver_once_failed() -> None:
    proportions = [[1.0, 8.7e-5, 5.6e-4], [0.91, 0.088, 2.6e-5], [1.1e-6, 0.019, 0.98], [0.2, 0.8, 4.7e-10]]
    counts = composed_counts([62164, 5036, 1610], proportions)
    assert (counts.sum(axis=0) <= [62164, 5036, 1610]).all()
    assert counts[:, 1:].sum() > 5036 + 1610 - 8  # both groups are used up, but for rounding


@pytest.mark.parametrize("seed", range(60))
def test_extreme_proportions_fit_or_can_not_be_had(seed: int) -> None:
    rng = np.random.default_rng(seed)
    have, proportions = extreme(rng)
    alike = (have / proportions.sum(axis=0)).min()
    if alike < 1 - 1e-6:
        with pytest.raises(ValueError, match="too few images for one in each environment"):
            composed_counts(have, proportions)
        return
    counts = composed_counts(have, proportions)
    sizes = counts.sum(axis=1)
    assert sizes.min() >= max(1, np.floor(alike / 2 * (1 - 1e-3)))
    assert sizes.sum() > len(sizes) * (alike * (1 - 1e-3) - 1)  # sizes are rounded down one by one
    for some in (sizes, np.maximum(1, (sizes * rng.random(len(sizes))).astype(int))):
        counts = composed_counts(have, proportions, some.tolist())
        assert abs(counts - some[:, None] * proportions).max() < 1
        assert (counts.sum(axis=1) == some).all()
        assert (counts.sum(axis=0) <= have).all()


def test_rounding_never_takes_more_than_there_is() -> None:
    counts = composed_counts([3, 3], [[0.5, 0.5], [0.5, 0.5]], [3, 3])
    assert sorted(counts.tolist()) == [[1, 2], [2, 1]]


def test_without_scarcity_rounding_is_by_largest_remainder() -> None:
    assert rounded(np.array([[1.6, 2.3, 3.1]]), np.array([9, 9, 9])).tolist() == [[2, 2, 3]]


def pool(n: int = 400, seed: int = 0) -> InMemoryEnvironment:
    """Images whose single pixel is their position."""
    rng = np.random.default_rng(seed)
    y, c = (torch.from_numpy(rng.integers(0, 2, n)) for _ in range(2))
    return InMemoryEnvironment(torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1), y, c)


PROPORTIONS = [[[0.4, 0.1], [0.1, 0.4]], [[0.3, 0.2], [0.2, 0.3]]]


def test_compose_in_memory() -> None:
    whole = pool()
    environments = compose(whole, PROPORTIONS, seed=3, sizes=[100, 50])
    for environment, expected in zip(environments, ([40, 10, 10, 40], [15, 10, 10, 15]), strict=True):
        assert np.bincount(environment.y * 2 + environment.c).tolist() == expected
        positions = environment.tensors[0].flatten().long().numpy()
        assert np.array_equal(environment.y, whole.y[positions])
        assert np.array_equal(environment.c, whole.c[positions])
        assert np.array_equal(environment.tensors[1].numpy(), environment.y)
    taken = torch.cat([environment.tensors[0].flatten() for environment in environments])
    assert len(taken.unique()) == 150


def test_compose_of_files_shares_the_pool(tmp_path: Path) -> None:
    images = Images(tmp_path, tuple(f"{i}.png" for i in range(80)))
    y, c = np.arange(80) % 2, np.arange(80) // 40
    whole = ImageEnvironment(images, np.arange(80), y, c, augment=True)
    environments = compose(whole, PROPORTIONS, sizes=[20, 40])
    assert [len(environment) for environment in environments] == [20, 40]
    for environment in environments:
        assert environment.images is images
        assert environment.augment
        assert np.array_equal(environment.y, environment.positions % 2)
    assert not set(environments[0].positions) & set(environments[1].positions)


def test_the_seed_decides_who_and_not_how_many() -> None:
    whole = pool()
    positions = [
        [environment.tensors[0].flatten().tolist() for environment in compose(whole, PROPORTIONS, seed, [120, 90])]
        for seed in (0, 0, 1)
    ]
    assert positions[0] == positions[1] != positions[2]
    assert [len(part) for part in positions[0]] == [len(part) for part in positions[2]]
    assert all(part == sorted(part) for part in positions[0])


def test_a_group_is_permuted_for_itself() -> None:
    groups = np.repeat([0, 1], [50, 50])
    more = np.concatenate([groups, np.full(30, 2)])
    alone, beside = divide(groups, [[0.5, 0.2]], 7)[0], divide(more, [[0.5, 0.2, 0.1]], 7)[0]
    assert np.array_equal(alone, beside[more[beside] < 2])


def test_divide_deals_every_image_where_shares_sum_to_one() -> None:
    groups = np.random.default_rng(0).integers(0, 3, 101)
    parts = divide(groups, [[0.55, 0.35, 0.0], [0.45, 0.65, 1.0]], 0)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(101))
    for g, share in enumerate((0.55, 0.35, 0)):
        assert abs((groups[parts[0]] == g).sum() - share * (groups == g).sum()) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 0], [[0.5, 0.5]]), "ask for groups of which there is no image: group 1"),
        (([5, 5], [[0.5, 0.4]]), "sum to 1 in each environment"),
        (([5, 5], [[1.5, -0.5]]), "sum to 1 in each environment"),
        (([5, 5, 5], [[0.5, 0.5]]), "the pool has 3 groups, the proportions are for 2"),
        (([5, 5], [[0.5, 0.5]], [11]), r"need \[6, 6\] images of the groups group 0; group 1, and .* \[5, 5\]; \[10\]"),
        (([5, 5], [[0.5, 0.5]], [1, 2]), "each needs an image or more"),
        (([5, 1], [[1.0, 0.0], [0.0, 1.0]], [5, 0]), "each needs an image or more"),
        (([9, 1], [[0.2, 0.8], [0.1, 0.9]]), "too few images for one in each environment of the groups group 1"),
        (([9, 1], [[0.2, 0.8], [0.1, 0.9]], [1, 1]), "too few images for one in each environment"),
    ],
)
def test_what_can_not_be_had_is_said(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed_counts(*arguments)


def test_compose_says_what_a_pool_lacks(tmp_path: Path) -> None:
    without = InMemoryEnvironment(torch.zeros(3, 1, 1, 1), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="no image: label 1, confounder 1"):
        compose(without, PROPORTIONS)
    with pytest.raises(ValueError, match="labels 0 to 0, and the pool's go from 0 to 1"):
        compose(pool(), [[[0.5, 0.5]]])
    with pytest.raises(ValueError, match=r"shape \(1, 4\); give a table"):
        compose(pool(), [[0.25] * 4])
    with pytest.raises(ValueError, match="knows no confounder"):
        compose(ImageEnvironment(Images(tmp_path, ("a",)), [0], [0]), PROPORTIONS)
    whole = pool()
    whole.split_units = whole.y
    with pytest.raises(ValueError, match="would part them"):
        compose(whole, PROPORTIONS)


def test_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="sum of at most 1"):
        divide(np.array([0, 1]), [[0.6, 0.6], [0.6, 0.4]])
    with pytest.raises(ValueError, match=r"give a table \(environments, 3 groups\)"):
        divide(np.array([0, 2]), [[0.6, 0.6]])


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, fractions = rng.choice(5, 300, p=[0.6, 0.3, 0.05, 0.03, 0.02]), (0.7, 0.15, 0.15)
    parts = stratified_split(groups, fractions, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    for g, n in enumerate(np.bincount(groups)):
        for part, fraction in zip(parts, fractions, strict=True):
            here = (groups[part] == g).sum()
            assert abs(here - fraction * n) < (1 if min(fractions) * n >= 1 else 2)
            assert here >= (n >= 3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, stratified_split(groups, fractions, seed), strict=True))
    assert not np.array_equal(parts[0], stratified_split(groups, fractions, seed + 1)[0])


def test_a_small_group_is_in_every_part() -> None:
    parts = stratified_split(np.array([0] * 20 + [2] * 3 + [4]), (0.9, 0.05, 0.05), 0)
    assert [len(part) for part in parts] == [18 + 1 + 1, 2, 2]


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2), (1.0, 0.0), ()])
def test_fractions_are_checked(fractions) -> None:
    with pytest.raises(ValueError, match="one above 0 for each part, with the sum 1"):
        stratified_split(np.array([0, 1]), fractions, 0)


def test_composed_takes_groups_and_a_flat_table() -> None:
    groups = np.repeat([0, 1, 2], [10, 20, 30])
    (part,) = composed(groups, [[0.5, 0.25, 0.25]], 0, [20])
    assert np.bincount(groups[part]).tolist() == [10, 5, 5]

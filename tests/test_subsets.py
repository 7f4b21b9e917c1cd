import numpy as np
import pytest
import torch

from domainbed.datasets.base import InMemoryEnvironment
from domainbed.splits import Split
from domainbed.subsets import choose, quotas

V = 2


def split(sizes: dict[int, int], env: int = 0, kind: str = "in") -> Split:
    """A split with so many images of each group, and as many images of its environment that are not in it."""
    groups = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))
    both = torch.from_numpy(np.concatenate([groups, groups]))
    environment = InMemoryEnvironment(torch.zeros(len(both), 1, 2, 2), both // V, both % V)
    return Split(env, kind, environment, np.arange(1, len(both), 2), env)


def sizes_of(some: Split) -> dict[int, int]:
    groups = some.y * V + some.c
    return {int(g): int((groups == g).sum()) for g in np.unique(groups)}


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [
        ({0: 3, 1: 100, 2: 50}, 31, {0: 3, 1: 14, 2: 14}),
        ({0: 100, 1: 100, 2: 100}, 10, {0: 3, 1: 3, 2: 4}),
        ({0: 5, 3: 5}, 100, {0: 5, 3: 5}),
        ({0: 9, 1: 9, 2: 9}, 2, {0: 1, 1: 1, 2: 1}),
        ({0: 40}, 7, {0: 7}),
    ],
)
def test_quotas_by_hand(sizes: dict[int, int], n: int, expected: dict[int, int]) -> None:
    assert quotas(sizes, n) == expected


def test_groups_have_about_equal_numbers_and_small_ones_are_whole() -> None:
    some = split({0: 200, 1: 4, 3: 100})
    subset = choose(some, 60, 0, V)
    assert subset.sizes == sizes_of(some)
    assert sum(subset.counts.values()) == 60
    assert subset.counts[1] == subset.sizes[1] <= 10
    assert abs(subset.counts[0] - subset.counts[3]) <= 1
    assert set(subset.keys) <= set(some.keys)
    assert (np.diff(subset.keys) > 0).all()
    y, c = some.environment.y[subset.keys], some.environment.c[subset.keys]
    assert (y * V + c == subset.groups).all()


def test_what_is_constant_in_groups_has_exactly_the_mean_of_the_split() -> None:
    some = split({0: 200, 1: 4, 3: 100})
    subset, value = choose(some, 30, 0, V), {0: 0.1, 1: 0.9, 3: -0.4}
    expected = sum(value[int(y * V + c)] for y, c in zip(some.y, some.c, strict=True)) / len(some)
    assert subset.weights.sum() == pytest.approx(1)
    assert subset.weights @ [value[int(g)] for g in subset.groups] == pytest.approx(expected)


def test_the_weighted_mean_is_unbiased() -> None:
    some = split({0: 120, 1: 30})
    value = np.random.default_rng(1).normal(size=len(some.environment)) + 3 * (some.environment.c == 1)
    means = [(s := choose(some, 20, seed, V)).weights @ value[s.keys] for seed in range(400)]
    error = np.std(means) / 20
    assert np.mean(means) == pytest.approx(value[some.keys].mean(), abs=4 * error)
    plain = np.mean([value[choose(some, 20, seed, V).keys].mean() for seed in range(50)])
    assert abs(plain - value[some.keys].mean()) > 10 * error  # without weights the small group counts too much


def test_a_function_of_seed_and_split_of_which_a_larger_one_contains_a_smaller_one() -> None:
    some = split({0: 200, 3: 100})
    first = choose(some, 40, 0, V).keys
    assert (first == choose(split({0: 200, 3: 100}), 40, 0, V).keys).all()
    assert set(first) < set(choose(some, 80, 0, V).keys)
    assert set(first) != set(choose(some, 40, 1, V).keys)
    assert set(first) != set(choose(split({0: 200, 3: 100}, env=1), 40, 0, V).keys)


def test_without_a_confounder_uniformly() -> None:
    some = split({0: 200, 1: 4, 3: 100})
    subset = choose(some, 60, 0, 1)
    assert (len(subset.keys), subset.grouped, subset.sizes) == (60, False, {0: len(some)})
    assert np.allclose(subset.weights, 1 / 60)


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="0 images to explain: give 1 or more"):
        choose(split({0: 5}), 0, 0, V)


def test_an_images_draw_is_its_own_whatever_else_is_in_the_split() -> None:
    whole = split({0: 40, 1: 40})
    part = Split(whole.env, whole.kind, whole.environment, whole.keys[::2], whole.number)
    assert set(choose(whole, 40, 3, V).keys) & set(part.keys) <= set(choose(part, 40, 3, V).keys)

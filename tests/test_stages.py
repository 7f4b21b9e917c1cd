import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from domainbed.datasets.base import InMemoryEnvironment
from domainbed.loaders import TrainingLoader
from domainbed.partitions import group, random
from domainbed.samples import Sample
from domainbed.splits import Split, annotate
from domainbed.stages import Stage, ends

TWO = (Stage("first", "first_share"), Stage("second"))


@pytest.mark.parametrize(
    ("share", "steps", "first"),
    [(0.5, 10, 5), (0.25, 10, 2), (0.35, 10, 4), (0.0, 10, 1), (1.0, 10, 9), (0.01, 10, 1), (0.5, 2, 1), (1, 301, 300)],
)
def test_each_stage_has_its_share_and_an_update_at_least(share, steps, first):
    assert ends(TWO, steps, {"first_share": share}) == [first, steps]


def test_shares_are_of_the_whole_run_and_the_last_stage_takes_the_rest():
    stages = (Stage("a", 0.2), Stage("b", 0.5), Stage("c", 0.9))
    assert ends(stages, 100, {}) == [20, 70, 100]
    assert ends((Stage("a", 0.9), Stage("b", 0.9), Stage("c")), 100, {}) == [90, 99, 100]
    assert ends((Stage("a", 1.0), Stage("b", 0.0), Stage("c")), 3, {}) == [1, 2, 3]
    assert ends((Stage("training"),), 7, {}) == [7]


def test_too_few_steps_and_shares_that_are_none():
    with pytest.raises(ValueError, match="1 steps are too few for the stages first, second"):
        ends(TWO, 1, {"first_share": 0.5})
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"hparam first_share is {share}: give the stage's share"):
            ends(TWO, 10, {"first_share": share})
    with pytest.raises(ValueError, match=r"the share of stage first is 2\.0"):
        ends((Stage("first", 2.0), Stage("second")), 10, {})


class Opened(Dataset):
    """An environment that is read item by item, as image folders are."""

    def __init__(self, inner: InMemoryEnvironment):
        self.inner, self.y, self.c = inner, inner.y, inner.c

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x, y = self.inner[i]
        return x, int(y)


def environment(n: int, offset: int) -> InMemoryEnvironment:
    """Image i is filled with its own number."""
    x = (offset + torch.arange(n)).float().view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return InMemoryEnvironment(x, torch.arange(n) % 2, torch.arange(n) // 2 % 3)


def splits() -> list[Split]:
    """Parts of three environments, not in order; the second has more images than a batch, the last one has none."""
    rng = np.random.RandomState(0)
    keys = rng.permutation(20)[:15], rng.permutation(150)[:140], np.arange(0)
    environments = environment(20, 0), environment(150, 1000), environment(5, 5000)
    return [Split(e + 1, "in", environments[e], keys[e], e + 1) for e in range(3)]


def marks(x: torch.Tensor) -> torch.Tensor:
    """Two features of each image: its number and its number's square."""
    number = x.mean((1, 2, 3))
    return torch.stack([number, number**2], dim=1)


@pytest.fixture
def sample() -> Sample:
    return Sample(splits(), num_confounders=3)


def expected_numbers(sample: Sample) -> list[int]:
    return [*sample.splits[0].keys.tolist(), *(1000 + sample.splits[1].keys).tolist()]


def test_a_function_runs_over_all_images_in_their_order(sample):
    sizes = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return marks(x)

    found = sample.map(watched)
    assert len(sample) == 155
    assert found[:, 0].tolist() == expected_numbers(sample)
    assert found.device.type == "cpu"
    assert len(sizes) > 2  # in batches, each of one split
    assert min(sizes) > 0


def test_images_that_are_opened_one_by_one_come_in_the_same_order(sample):
    opened = Sample([Split(s.env, s.kind, Opened(s.environment), s.keys, s.number) for s in sample.splits], 3)
    assert torch.equal(opened.map(marks), sample.map(marks))
    assert np.array_equal(opened.examples.y, sample.examples.y)


def test_what_a_function_makes_may_have_any_shape_and_needs_no_graph(sample):
    weight = torch.ones(1, requires_grad=True)
    assert sample.map(lambda x: x.long()[:, 0, 0, 0]).tolist() == expected_numbers(sample)
    found = sample.map(lambda x: x * weight)
    assert found.shape == (155, 1, 2, 2)
    assert not found.requires_grad


def test_examples_are_aligned_with_what_a_function_makes(sample):
    numbers = np.asarray(expected_numbers(sample)) % 1000
    assert np.array_equal(sample.examples.y, numbers % 2)
    assert np.array_equal(sample.examples.c, numbers // 2 % 3)
    assert np.array_equal(sample.examples.g, numbers % 2 * 3 + numbers // 2 % 3)
    assert np.bincount(sample.examples.e).tolist() == [0, 15, 140]


def test_hidden_and_inferred_confounders_are_what_training_may_know(sample):
    hidden = Sample(annotate(sample.splits, 0.2), 3)
    shown = hidden.examples.c >= 0
    assert shown.sum() == 31
    assert np.array_equal(hidden.examples.c[shown], sample.examples.c[shown])
    assert np.array_equal(hidden.examples.g >= 0, shown)
    none = Sample(annotate(sample.splits, 0), 3)
    assert (none.examples.c == -1).all()
    assert (none.examples.g == -1).all()


def test_features_take_the_place_of_images_and_all_else_stays(sample):
    hidden = Sample(annotate(sample.splits, 0.2), 3)
    features = hidden.map(marks)
    replaced = hidden.replaced(features)
    again = Sample(replaced, 3)
    assert torch.equal(again.map(lambda x: x), features)
    for name in ("y", "c", "g", "e"):
        assert np.array_equal(getattr(again.examples, name), getattr(hidden.examples, name))
    for new, old in zip(replaced, hidden.splits, strict=True):
        assert (new.env, new.kind, new.number) == (old.env, old.kind, old.number)
        assert np.array_equal(new.keys, old.keys)
        assert len(new.environment) == len(old.environment)


def test_inferred_confounders_stay_with_the_features(sample):
    first = sample.splits[0]
    inferred = np.arange(15) % 4
    split = Split(first.env, first.kind, first.environment, first.keys, first.number, inferred=inferred)
    one = Sample([split], 4)
    (replaced,) = one.replaced(one.map(marks))
    assert np.array_equal(replaced.c, inferred)


@pytest.mark.parametrize("partition", [random, group])
def test_a_loader_draws_the_same_examples_of_features_as_of_images(sample, partition):
    images = TrainingLoader(sample.splits[:2], partition, 6, 3, seed=1)
    features = TrainingLoader(sample.replaced(sample.map(marks))[:2], partition, 6, 3, seed=1)
    for ours, theirs in zip(next(iter(features)), next(iter(images)), strict=True):
        assert torch.equal(ours[0], marks(theirs[0]))
        assert torch.equal(ours[1], theirs[1])
        for name in "cgei":
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_float64_stays_float64(sample):
    features = sample.map(lambda x: marks(x).double())
    assert features.dtype == torch.float64
    assert sample.replaced(features)[0].environment[torch.tensor([0])][0].dtype == torch.float64


def test_no_images_are_an_error():
    for nothing in (Sample([], 2), Sample(splits()[2:], 2)):
        assert len(nothing) == 0
        with pytest.raises(ValueError, match="there are no images to look at"):
            nothing.map(marks)

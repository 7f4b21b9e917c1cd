import numpy as np
import pytest
import torch

from domainbed import datasets
from domainbed.datasets import digits
from domainbed.datasets.base import masks
from domainbed.splits import Split, split_environments, training_splits, validation_splits

NAMES = ["ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop"]


@pytest.fixture(scope="module")
def built() -> dict[str, datasets.MultipleDomainDataset]:
    return {name: datasets.get_dataset_class(name)(None, [0], {}) for name in NAMES}


def groups(dataset, split: Split) -> np.ndarray:
    env = split.environment
    return (env.y * dataset.num_confounders + env.c)[split.keys]


def shares(dataset, e: int) -> np.ndarray:
    """(K, V) fraction of the environment's images."""
    table = np.zeros((dataset.num_classes, dataset.num_confounders))
    np.add.at(table, (dataset[e].y, dataset[e].c), 1)
    return table / table.sum()


@pytest.mark.parametrize("name", NAMES)
def test_one_data_seed_one_dataset(built, name: str) -> None:
    again = datasets.get_dataset_class(name)(None, [0], {"data_seed": 0})
    other = datasets.get_dataset_class(name)(None, [0], {"data_seed": 1})
    for a, b, c in zip(built[name], again, other, strict=True):
        assert all(torch.equal(*pair) for pair in zip(a.tensors, b.tensors, strict=True))
        assert not torch.equal(a.tensors[0], c.tensors[0])


@pytest.mark.parametrize("name", NAMES)
def test_building_leaves_the_global_generators_alone(name: str) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    datasets.get_dataset_class(name)(None, [0], {})
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_images(built, name: str) -> None:
    dataset = built[name]
    for environment in dataset:
        x, y = environment[torch.arange(len(environment))]
        assert x.shape[1:] == dataset.input_shape
        assert x.shape[1:] == ((2, 28, 28) if name == "ColoredDigits" else (3, 36, 36))
        assert 0 <= x.min() < x.max() <= 1
        assert 0 <= y.min() <= y.max() == dataset.num_classes - 1


class Traced(digits.DigitsOnPhotographs):
    """Writes the number of the scan into the images, to see which scan goes where."""

    def compose(self, scans, counts):
        environment = super().compose(scans, counts)
        self.seen = [*getattr(self, "seen", []), scans[environment.y, environment.split_units]]
        return environment


@pytest.mark.parametrize("name", ["DigitsO2O", "DigitsM2M", "DigitsSubpop"])
@pytest.mark.parametrize("trial_seed", [0, 1])
def test_no_scan_is_in_two_splits(name: str, trial_seed: int) -> None:
    cls = datasets.get_dataset_class(name)
    dataset = type(name, (Traced, cls), {})(None, [0], {})
    splits = split_environments(dataset, cls.TEST_ENVS, 0.2, 0.3, trial_seed)
    seen = [set(dataset.seen[split.env][split.keys].tolist()) for split in splits]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert all(seen)


def test_no_scan_of_colored_digits_is_in_two_splits(built) -> None:
    splits = split_environments(built["ColoredDigits"], [2], 0.2, 0.3, 0)
    seen = [set(split.environment.split_units[split.keys].tolist()) for split in splits]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trial_seed", range(10))
def test_every_training_group_has_sixty_validation_images(built, name: str, trial_seed: int) -> None:
    dataset = built[name]
    splits = split_environments(dataset, dataset.TEST_ENVS, 0.2, 0, trial_seed)
    trained = np.concatenate([groups(dataset, s) for s in training_splits(dataset, splits, dataset.TEST_ENVS)])
    counts = np.bincount(
        np.concatenate([groups(dataset, s) for s in validation_splits(dataset, splits, dataset.TEST_ENVS)]),
        minlength=16,
    )
    assert counts[np.unique(trained)].min() >= 60


def test_colored_digits_follow_the_protocol(built) -> None:
    for environment, agreement in zip(built["ColoredDigits"], (0.9, 0.8, 0.1), strict=True):
        n = len(environment)
        assert np.mean(environment.y == environment.c) == pytest.approx(agreement, abs=3 * (0.25 / n) ** 0.5)
        below_five = load_digit_labels()[environment.split_units] < 5
        assert np.mean(environment.y == below_five) == pytest.approx(0.75, abs=3 * (0.1875 / n) ** 0.5)
        x, _ = environment[torch.arange(n)]
        ink = x.sum(dim=(2, 3))
        rows = torch.arange(n)
        assert ink[rows, torch.from_numpy(environment.c)].min() > 0
        assert ink[rows, torch.from_numpy(1 - environment.c)].max() == 0


def load_digit_labels() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().target


def test_o2o_correlates_one_to_one_and_reverses_in_the_test(built) -> None:
    dataset = built["DigitsO2O"]
    assert 4 * np.diag(shares(dataset, 1)) == pytest.approx([0.97] * 4, abs=0.01)
    assert 4 * np.diag(shares(dataset, 2)) == pytest.approx([0.87] * 4, abs=0.01)
    trained, tested = (shares(dataset, 1) + shares(dataset, 2)) > 0, shares(dataset, 0) > 0
    assert not (trained & tested).any()
    assert tested.sum(axis=0).tolist() == tested.sum(axis=1).tolist() == [1] * 4


def test_m2m_tests_groups_that_training_never_shows(built) -> None:
    dataset = built["DigitsM2M"]
    first, second, tested = (shares(dataset, e) > 0 for e in (1, 2, 0))
    assert not (first & second).any()
    assert ((first | second) ^ tested).all()  # every group is trained or tested, none both
    assert (first | second).sum() == 8


def test_subpop_shares(built) -> None:
    dataset = built["DigitsSubpop"]
    first, second = shares(dataset, 0), shares(dataset, 1)
    assert (first + second).ravel() / 2 == pytest.approx([0.73, 0.04, 0.01, 0.22], abs=0.005)
    assert first[:, 0].sum() == pytest.approx(0.85, abs=0.005)
    assert second[:, 0].sum() == pytest.approx(0.63, abs=0.005)
    assert first[1] / first.sum(axis=0) == pytest.approx(second[1] / second.sum(axis=0), abs=0.005)
    for e in (2, 3):
        assert shares(dataset, e).ravel().tolist() == [0.25] * 4


@pytest.mark.parametrize("size", digits.DigitsOnPhotographs.DIGIT_SIZES)
def test_a_digit_covers_less_than_forty_percent(size: int) -> None:
    scans, _ = digits.load_scans()
    ink = digits.enlarge(scans, size)
    assert (ink > 0.05).sum(axis=(1, 2)).max() < 0.4 * digits.SIZE**2


def test_ink_is_placed_as_by_a_loop() -> None:
    ink = np.random.default_rng(0).random((5, 3, 3)).astype(np.float32)
    placed = digits.place(ink, 8, np.random.default_rng(1))
    top, left = np.random.default_rng(1).integers(0, 6, (2, 5))
    for image, (t, s) in enumerate(zip(top, left, strict=True)):
        expected = np.zeros((8, 8))
        for i in range(3):
            for j in range(3):
                expected[t + i, s + j] = ink[image, i, j]
        assert placed[image] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_there_and_cover_the_digit_alone(built, name: str) -> None:
    dataset = built[name]
    assert dataset.has_masks is dataset.HAS_MASKS is True
    for environment in dataset:
        assert environment.masks.dtype == np.uint8
        m = masks(environment, np.arange(len(environment)))
        assert m.shape == (len(environment), *dataset.input_shape[1:])
        assert m.amax((1, 2)).min() > 0.8
        assert 0.03 < (m > 0.5).float().mean((1, 2)).min() < (m > 0.05).float().mean((1, 2)).max() < 0.4


def test_the_mask_of_a_colored_digit_is_its_ink(built) -> None:
    for environment in built["ColoredDigits"]:
        keys = torch.arange(len(environment))
        x, _ = environment[keys]
        assert torch.equal(masks(environment, keys), x.sum(1))


@pytest.mark.parametrize("name", ["DigitsO2O", "DigitsM2M", "DigitsSubpop"])
def test_an_image_is_its_background_but_where_the_mask_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canvases: list[np.ndarray] = []

    def crops(*args) -> np.ndarray:
        canvases.append(cropped(*args))
        return canvases[-1].copy()

    cropped = digits.crops
    monkeypatch.setattr(digits, "crops", crops)
    dataset = datasets.get_dataset_class(name)(None, [0], {})
    for environment, canvas in zip(dataset, canvases, strict=True):
        x, m = environment.tensors[0][:, 0].numpy(), environment.masks / 255
        assert (x == environment.tensors[0][:, 2].numpy()).all()
        assert (x[m == 0] == np.round(255 * canvas[m == 0])).mean() > 0.99  # a trace of ink may have been rounded off
        assert (x[m == 1] == 255).all()
        assert abs(x - 255 * (canvas + (1 - canvas) * m)).max() <= 1.01  # image and mask are rounded


def test_crops_come_from_the_photograph_of_their_kind() -> None:
    photographs = [np.full((50, 60), value, np.float32) for value in (0.1, 0.5)]
    kinds = np.array([0, 1, 1, 0])
    found = digits.crops(photographs, kinds, np.random.default_rng(0))
    assert found.shape == (4, 36, 36)
    assert found.mean(axis=(1, 2)) == pytest.approx([0.1, 0.5, 0.5, 0.1])


@pytest.mark.parametrize("name", ["brick", "grass", "gravel", "city"])
def test_photographs_are_real_and_standardised(name: str) -> None:
    photograph = digits.load_photograph(name, 0.11)
    assert min(photograph.shape) >= 400
    assert photograph.mean() == pytest.approx(0.3, abs=0.01)
    assert photograph.std() == pytest.approx(0.11, abs=0.01)

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from domainbed.datasets.base import (
    ImageEnvironment,
    InMemoryEnvironment,
    MultipleDomainDataset,
    confounders,
    has_masks,
    leaves,
    locate,
    masks,
)
from domainbed.datasets.composed import compose
from domainbed.images import Images
from domainbed.lib.misc import labels, split_dataset
from domainbed.splits import annotate, selection_splits, split_environments, training_splits, validation_splits


class Four(MultipleDomainDataset):
    ENVIRONMENTS = ("a", "b", "c", "d")
    CONFOUNDERS = ("one", "two", "three")

    def __init__(self, sizes=(50, 40, 30, 20), units=None):
        self.input_shape, self.num_classes = (1, 2, 2), 2
        self.datasets = [
            InMemoryEnvironment(torch.zeros(n, 1, 2, 2), torch.arange(n) % 2, torch.arange(n) % 3, units and units(n))
            for n in sizes
        ]


class Official(Four):
    VALIDATION_ENVS = (2,)
    TEST_ENVS = (3,)


def domainbed_split(length: int, n: int, trial_seed: int, e: int) -> tuple[list[int], list[int]]:
    """DomainBed's rule, from its description."""
    seed = int(hashlib.md5(str((trial_seed, e)).encode()).hexdigest(), 16) % 2**31
    keys = list(range(length))
    np.random.RandomState(seed).shuffle(keys)
    return keys[:n], keys[n:]


@pytest.mark.parametrize("trial_seed", [0, 1, 2])
def test_splits_are_domainbeds(trial_seed: int) -> None:
    splits = split_environments(Four(), [1], 0.2, 0.5, trial_seed)
    found = {(split.env, split.kind): split.keys.tolist() for split in splits}
    for e, length in enumerate((50, 40, 30, 20)):
        out, rest = domainbed_split(length, int(length * 0.2), trial_seed, e)
        if e == 1:
            order, remaining = domainbed_split(len(rest), len(rest) // 2, trial_seed, e)
            assert found[e, "uda"] == [rest[k] for k in order]
            rest = [rest[k] for k in remaining]
        assert found[e, "out"] == out
        assert found[e, "in"] == rest
    assert [(s.env, s.kind) for s in splits] == [
        *((e, "in") for e in range(4)),
        *((e, "out") for e in range(4)),
        (1, "uda"),
    ]
    assert splits[-1].number == 0  # DomainBed counts uda-splits


def test_empty_splits_are_left_out() -> None:
    assert [split.kind for split in split_environments(Four(), [0], 0.0)] == ["in"] * 4


def test_units_never_part() -> None:
    dataset = Four(units=lambda n: torch.arange(n) // 5)
    for split_seed in range(5):
        units: dict[int, list[set[int]]] = {}
        for split in split_environments(dataset, [0], 0.2, 0.5, split_seed):
            units.setdefault(split.env, []).append({int(key) // 5 for key in split.keys})
        for several in units.values():
            assert sum(map(len, several)) == len(set.union(*several))


def test_official_validation_environments_are_whole_and_not_trained_on() -> None:
    dataset = Official()
    splits = split_environments(dataset, [3], 0.2)
    assert [(s.env, s.kind, len(s)) for s in splits] == [(0, "in", 50), (1, "in", 40), (2, "in", 30), (3, "in", 20)]
    assert [s.env for s in training_splits(dataset, splits, [3])] == [0, 1]
    assert [(s.env, s.kind) for s in validation_splits(dataset, splits, [3])] == [(2, "in")]
    assert [s.env for s in selection_splits(dataset, splits, [3])] == [2, 3]


def test_roles_of_splits() -> None:
    dataset, test_envs = Four(), [1, 2]
    splits = split_environments(dataset, test_envs, 0.2)
    assert [(s.env, s.kind) for s in training_splits(dataset, splits, test_envs)] == [(0, "in"), (3, "in")]
    assert [(s.env, s.kind) for s in validation_splits(dataset, splits, test_envs)] == [(0, "out"), (3, "out")]
    kept = [(s.env, s.kind) for s in selection_splits(dataset, splits, test_envs)]
    assert kept == [(1, "in"), (2, "in"), (0, "out"), (1, "out"), (2, "out"), (3, "out")]


@pytest.mark.parametrize(
    ("dataset", "test_envs", "message"),
    [
        (Four(), [4], r"--test_envs 4: Four has the test environments \[0, 1, 2, 3\]"),
        (Four(), [-1], r"--test_envs -1"),
        (Four(), [0, 1, 2, 3], "leaves no environment of Four to train on"),
        (Official(), [2], r"--test_envs 2: Official has the test environments \[0, 1, 3\]"),
        (Official(), [0], r"--test_envs must contain \[3\], the official test set of Official"),
    ],
)
def test_impossible_test_environments(dataset: Four, test_envs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_environments(dataset, test_envs, 0.2)


def test_bytes_become_fractions() -> None:
    env = InMemoryEnvironment(
        torch.tensor([[[[51]]], [[[255]]]], dtype=torch.uint8), torch.tensor([0, 1]), torch.zeros(2)
    )
    x, y = env[1]
    assert (x.item(), y.item(), x.dtype, y.dtype) == (1.0, 1, torch.float32, torch.int64)
    assert env[torch.tensor([0, 1])][0].flatten().tolist() == pytest.approx([0.2, 1.0])


class OneByOne:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[None, int]:
        return None, 2 * i


class WithTargets(OneByOne):
    targets = (4, 5, 6)


def test_labels_of_any_dataset() -> None:
    tensors = TensorDataset(torch.zeros(2), torch.tensor([8, 9]))
    assert labels(OneByOne()).tolist() == [0, 2, 4]
    assert labels(WithTargets()).tolist() == [4, 5, 6]
    assert labels(ConcatDataset([tensors, tensors])).tolist() == [8, 9, 8, 9]
    assert confounders(OneByOne()).tolist() == [0, 0, 0]


def test_arrays_of_composed_datasets() -> None:
    part = Four().datasets[0]
    assert confounders(ConcatDataset([part, part])).tolist() == [*part.c, *part.c]
    assert confounders(Subset(part, [3, 1])).tolist() == [0, 1]
    assert labels(Subset(part, [3, 2])).tolist() == [1, 0]


def test_a_confounder_that_an_environment_lacks_is_not_known() -> None:
    dataset = Four()
    dataset.datasets[2] = TensorDataset(torch.zeros(30, 1, 2, 2), torch.zeros(30).long())
    assert dataset.num_confounders == 1


def test_domainbeds_protocol_of_a_dataset() -> None:
    dataset = Four()
    assert len(dataset) == 4
    assert dataset[2] is dataset.datasets[2]
    assert list(dataset) == dataset.datasets
    assert dataset.num_confounders == 3


def test_compositions_are_taken_apart() -> None:
    a, b = Four().datasets[:2]
    both = ConcatDataset([Subset(a, [5, 3]), split_dataset(b, 10, seed=1)[1]])
    assert list(leaves(both)) == [a, b]
    assert [locate(both, key) for key in (0, 1)] == [(a, 5), (a, 3)]
    (inner, key), expected = locate(both, 2), split_dataset(b, 10, seed=1)[1].keys[0]
    assert (inner, key) == (b, expected)
    assert list(leaves(a)) == [a]
    assert locate(a, 7) == (a, 7)


@pytest.fixture
def pool(tmp_path: Path) -> Images:
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return Images(tmp_path, tuple(f"{i}.png" for i in range(6)), size=4)


def levels(x: torch.Tensor) -> list[int]:
    """The red level of normalised images (B, 3, H, W), from 0 to 255."""
    return ((x[:, 0, 0, 0] * 0.229 + 0.485) * 255).round().int().tolist()


def test_image_environments_open_their_own_images(pool: Images) -> None:
    environment = ImageEnvironment(pool, [5, 0, 3], [1, 0, 1], [0, 0, 1], split_units=[7, 7, 8])
    x, y = environment[0]
    assert (x.shape, x.dtype, y) == ((3, 4, 4), torch.float32, 1)
    assert levels(x[None]) == [200]
    assert levels(environment.finish(torch.stack([environment.read(key) for key in range(3)]))) == [200, 0, 120]
    part = environment.take([2, 1])
    assert (part.y.tolist(), part.c.tolist(), part.split_units.tolist()) == ([1, 0], [1, 0], [8, 7])
    assert levels(part[0][0][None]) == [120]
    assert part.images is environment.images


def test_only_training_environments_are_augmented(pool: Images) -> None:
    for augment in (True, False):
        environment = ImageEnvironment(pool, range(6), [0] * 6, augment=augment)
        x = environment.finish(torch.stack([environment.read(5, np.random.default_rng(i)) for i in range(20)]))
        assert (len(set(levels(x))) > 1) == augment
        assert levels(environment[5][0][None]) == [200]


class Photographs(Four):
    def __init__(self, pool: Images):
        self.input_shape, self.num_classes = (3, 4, 4), 2
        self.datasets = [ImageEnvironment(pool, [0, 1, 2], [0, 1, 1], [0, 1, 2]), ImageEnvironment(pool, [3], [0], [0])]


def test_a_pipeline_is_shared_by_the_environments_of_a_pool(pool: Images) -> None:
    dataset = Photographs(pool)
    dataset.datasets.append(Subset(dataset.datasets[0], [1]))
    dataset.use_input_pipeline("pil")
    assert dataset[0].pipeline is dataset[1].pipeline
    (pool.root / "3.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"3\.png: not an image"):
        dataset.use_input_pipeline("pil")


def test_pipelines_of_files_are_for_files() -> None:
    Four().use_input_pipeline("pil")
    with pytest.raises(ValueError, match="--input_pipeline cv2 is for image files, and Four holds none"):
        Four().use_input_pipeline("cv2")
    with pytest.raises(NotImplementedError, match="input pipeline not found: cv3; did you mean cv2"):
        Four().use_input_pipeline("cv3")


def test_groups_have_names(pool: Images) -> None:
    dataset = Photographs(pool)
    assert dataset.group_name(4) == "y=1, two"
    dataset.CLASSES = ("cat", "dog")
    assert dataset.group_name(4) == "dog, two"


def test_budgets_are_exact_nested_and_follow_the_trial() -> None:
    dataset = Four()
    trained = training_splits(dataset, split_environments(dataset, [0], 0.2), [0])
    total, before = sum(map(len, trained)), [np.zeros(len(split), dtype=bool) for split in trained]
    for budget in (0.0, 0.01, 0.05, 0.2, 0.5, 0.99):
        now = [split.annotated for split in annotate(trained, budget)]
        assert sum(mask.sum() for mask in now) == round(budget * total)
        assert all((mask >= smaller).all() for mask, smaller in zip(now, before, strict=True))
        before = now
    assert all(split.annotated is None for split in annotate(trained, 1.0))
    first, again, other = (annotate(trained, 0.5, seed)[0].annotated for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_what_training_may_know() -> None:
    dataset = Four()
    (split, *_) = annotate(training_splits(dataset, split_environments(dataset, [0], 0.2), [0]), 0.5)
    true = dataset[split.env].c[split.keys]
    assert (split.c[split.annotated] == true[split.annotated]).all()
    assert (split.c[~split.annotated] == -1).all()
    known = split.only_annotated()
    assert (known.keys == split.keys[split.annotated]).all()
    assert (known.c == true[split.annotated]).all()
    first, inferred = split.at(slice(5)), dataclasses.replace(split, inferred=np.arange(len(split)))
    assert (len(first), first.annotated.tolist()) == (5, split.annotated[:5].tolist())
    assert (first.c == split.c[:5]).all()
    assert (inferred.only_annotated().c == np.flatnonzero(split.annotated)).all()


@pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan")])
def test_impossible_budgets(budget: float) -> None:
    with pytest.raises(ValueError, match=r"--annotation_budget .*of the training images"):
        annotate([], budget)
    with pytest.raises(ValueError, match=r"--validation_budget .*of the validation images"):
        annotate([], budget, of="validation")


def test_validation_has_a_budget_of_its_own() -> None:
    dataset = Four()
    held_out = validation_splits(dataset, split_environments(dataset, [0], 0.2), [0])
    total, before = sum(map(len, held_out)), [np.zeros(len(split), dtype=bool) for split in held_out]
    for budget in (0.0, 0.1, 0.4, 0.8):
        now = [split.annotated for split in annotate(held_out, budget, 3, of="validation")]
        assert sum(mask.sum() for mask in now) == round(budget * total)
        assert all((mask >= smaller).all() for mask, smaller in zip(now, before, strict=True))
        before = now
    as_training = [split.annotated for split in annotate(held_out, 0.8, 3)]
    assert any((one != other).any() for one, other in zip(as_training, before, strict=True))
    assert all(split.annotated is None for split in annotate(held_out, 1.0, 3, of="validation"))
    assert annotate([], 0.5, of="validation") == []


def test_a_transform_that_somebody_sets_replaces_the_pipeline(pool: Images) -> None:
    environment = ImageEnvironment(pool, [5, 0], [1, 0], augment=True)
    environment.transform = lambda image: torch.tensor(float(np.asarray(image).max()))
    assert environment[0] == (200.0, 1)
    assert environment.finish(torch.stack([environment.read(key) for key in range(2)])).tolist() == [200.0, 0.0]


def masked(n: int, level: int) -> InMemoryEnvironment:
    """Example i has the mask level + i in all pixels."""
    values = (level + torch.arange(n, dtype=torch.uint8)).view(n, 1, 1).expand(n, 2, 2).clone()
    return InMemoryEnvironment(torch.zeros(n, 1, 2, 2), torch.zeros(n), torch.zeros(n), masks=values)


def test_masks_of_compositions() -> None:
    a, b = masked(10, 0), masked(10, 100)
    both = ConcatDataset([Subset(a, [5, 3]), split_dataset(b, 4, seed=1)[1]])
    rest = split_dataset(b, 4, seed=1)[1].keys
    expected = torch.tensor([100 + rest[1], 3, 5, 100 + rest[0]]).view(4, 1, 1).expand(4, 2, 2) / 255
    found = masks(both, [3, 1, 0, 2])
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert masks(a, []).shape == (0, 2, 2)


def test_masks_are_known_only_if_all_are() -> None:
    a, without = masked(10, 0), Four().datasets[0]
    both = ConcatDataset([a, Subset(without, [1])])
    assert (has_masks(a), has_masks(without), has_masks(both), has_masks(OneByOne())) == (True, False, False, False)
    assert masks(both, [0]) is None
    dataset = Four()
    assert not dataset.has_masks
    dataset.datasets = [a, Subset(a, [2])]
    assert dataset.has_masks


def test_masks_that_do_not_fit_their_images() -> None:
    x, y = torch.zeros(3, 1, 2, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"masks \(3, 2, 1\) do not fit images \(3, 1, 2, 2\)"):
        InMemoryEnvironment(x, y, y, masks=torch.zeros(3, 2, 1, dtype=torch.uint8))


def test_composed_environments_keep_their_masks() -> None:
    values = torch.arange(8, dtype=torch.uint8).view(8, 1, 1)
    pool = InMemoryEnvironment(values[:, None], torch.arange(8) % 2, torch.arange(8) // 4, masks=values)
    for environment in compose(pool, [[[0.25, 0.25], [0.25, 0.25]]] * 2):
        assert environment.masks.flatten().tolist() == environment.tensors[0].flatten().tolist()


def test_masks_of_images_with_a_transform_are_refused(pool: Images) -> None:
    environment = ImageEnvironment(pool, [5, 0], [1, 0], masks=pool)
    assert (masks(environment, [0, 1])[:, 0, 0] * 255).tolist() == [200, 0]
    environment.transform = torch.tensor
    with pytest.raises(NotImplementedError, match="images of this ImageEnvironment pass through a transform"):
        masks(environment, [0])

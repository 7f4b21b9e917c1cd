import copy
import dataclasses
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from domainbed import augmentation, input_pipelines, partitions
from domainbed.datasets.base import ImageEnvironment, InMemoryEnvironment
from domainbed.images import Images
from domainbed.lib.misc import split_dataset
from domainbed.loaders import Minibatch, TrainingLoader, evaluation_batches, group_counts
from domainbed.splits import Split


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
    """Image i is filled with its own number, so that a row tells where it comes from."""
    x = (offset + torch.arange(n)).float().view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return InMemoryEnvironment(x, torch.arange(n) % 2, torch.arange(n) // 2 % 3)


def splits(wrap=lambda environment: environment) -> list[Split]:
    keys = np.arange(2, 40)
    return [
        Split(e, "in", wrap(environment(40, 100 * e)), np.random.default_rng(e).permutation(keys), e) for e in (0, 3)
    ]


def loader(partition: str = "group", wrap=lambda e: e, **options) -> TrainingLoader:
    return TrainingLoader(splits(wrap), partitions.REGISTRY[partition], batch_size=12, num_confounders=3, **options)


@pytest.mark.parametrize("partition", list(partitions.REGISTRY))
def test_every_row_carries_its_own_label_confounder_group_and_environment(partition: str) -> None:
    for minibatch in next(iter(loader(partition))):
        x, y = minibatch
        assert len(minibatch) == 2
        assert minibatch[0] is x
        number = x[:, 0, 0, 0].long()
        assert torch.equal(number, 100 * minibatch.e + minibatch.i)
        assert torch.equal(y, minibatch.i % 2)
        assert torch.equal(minibatch.c, minibatch.i // 2 % 3)
        assert torch.equal(minibatch.g, 3 * y + minibatch.c)
        assert minibatch.i.min() >= 2
        assert all(array.dtype == torch.int64 for array in (y, minibatch.c, minibatch.g, minibatch.e, minibatch.i))


def test_parts_hold_what_their_name_says() -> None:
    by_group = next(iter(loader("group")))
    assert [minibatch.g.unique().tolist() for minibatch in by_group] == [[0], [1], [2], [3], [4], [5]]
    assert [len(minibatch.g) for minibatch in by_group] == [4] * 6
    by_environment = next(iter(loader("environment")))
    assert [minibatch.e.unique().tolist() for minibatch in by_environment] == [[0], [3]]
    assert [len(minibatch.e) for minibatch in by_environment] == [12, 12]


def test_a_step_depends_on_seed_and_number_alone() -> None:
    first, again, other = loader(seed=1), loader(seed=1), loader(seed=2)
    torch.manual_seed(7)  # the global generators play no part
    np.random.seed(7)
    assert [first.draw(s).tolist() for s in (5, 0, 5)] == [again.draw(s).tolist() for s in (5, 0, 5)]
    assert first.draw(5).tolist() != other.draw(5).tolist()
    assert first.draw(5).tolist() != first.draw(6).tolist()


def test_images_in_memory_and_images_from_files_give_the_same_minibatches() -> None:
    for a, b in islice(zip(loader(), loader(wrap=Opened), strict=True), 3):
        for one, two in zip(a, b, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
            assert torch.equal(one.i, two.i)


def test_draws_are_uniform_over_a_part_with_replacement() -> None:
    drawn = np.concatenate([loader("random").draw(step) for step in range(400)])
    counts = np.bincount(drawn, minlength=76)
    expected = len(drawn) / 76
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square, 75 degrees of freedom: p = 0.0008


def lopsided(**options) -> TrainingLoader:
    """A hundred images, of which the first ten are of class 1, in a single part."""
    images = InMemoryEnvironment(torch.zeros(100, 1, 1, 1), (torch.arange(100) < 10).long(), torch.zeros(100))
    return TrainingLoader(
        [Split(0, "in", images, np.arange(100), 0)], partitions.REGISTRY["environment"], 5000, **options
    )


def test_class_balanced_draws() -> None:
    assert 0.45 < next(iter(lopsided(class_balanced=True)))[0][1].float().mean() < 0.55


def test_odds_are_relative_within_a_part() -> None:
    odds = np.tile([0.0, 1.0, 3.0, 0.0], 19) * np.repeat([1e-300, 1e300], 38)  # by environment
    by_part = loader("environment", odds=odds)
    for e, part in enumerate(np.split(np.concatenate([by_part.draw(s) for s in range(1000)]).reshape(1000, 24), 2, 1)):
        shares = np.bincount(part.ravel() - 38 * e, minlength=38) / part.size
        expected = odds[38 * e : 38 * (e + 1)] / odds[38 * e : 38 * (e + 1)].max()
        assert (shares[expected == 0] == 0).all()
        assert np.abs(shares - expected / expected.sum()).max() < 0.02


def test_odds_are_multiplied_with_class_balance() -> None:
    odds = np.where(np.arange(100) % 10 == 0, 4.0, 1.0)  # image 0 of class 1, nine of class 0
    drawn = lopsided(class_balanced=True, odds=odds).draw(0)
    rare, common = (4 + 9) / 10, (9 * 4 + 81) / 90
    assert np.mean(drawn < 10) == pytest.approx(rare / (rare + common), abs=0.03)
    assert np.mean(drawn == 0) == pytest.approx(0.4 / (rare + common), abs=0.03)
    assert np.array_equal(lopsided(odds=np.full(100, 7.0)).draw(0), lopsided(odds=np.ones(100)).draw(0))


def test_odds_that_are_none_are_refused() -> None:
    first = np.arange(76) < 38
    message = r"the odds of environment 3 are from {} to {}; give finite ones of at least 0, not all of them 0"
    for wrong, found in ((0.0, ("0.0", "0.0")), (-1.0, ("-1.0", "-1.0")), (np.nan, ("nan", "nan"))):
        with pytest.raises(ValueError, match=message.format(*found)):
            loader("environment", odds=np.where(first, 1.0, wrong))
    with pytest.raises(ValueError, match="to inf"):
        loader("environment", odds=np.where(np.arange(76) == 40, np.inf, 1.0))
    with pytest.raises(ValueError, match=r"odds of shape \(75,\): give one for each of the 76"):
        loader("environment", odds=np.ones(75))


def test_a_subset_depends_on_the_runs_seed() -> None:
    first, again, other = ({*loader("group_subset", seed=seed).parts[0].positions} for seed in (1, 1, 2))
    assert first == again != other


def test_a_batch_larger_than_its_split_is_drawn_with_replacement() -> None:
    tiny = [Split(0, "in", environment(5, 0), np.arange(5), 0)]
    (minibatch,) = next(iter(TrainingLoader(tiny, partitions.REGISTRY["environment"], 64)))
    assert minibatch[0].shape == (64, 1, 2, 2)


def test_group_counts() -> None:
    expected = [0] * 6
    for split in splits():
        for key in split.keys:
            expected[3 * (key % 2) + key // 2 % 3] += 1
    assert loader().group_counts(2) == tuple(expected)


class Turned(TensorDataset):
    """A TensorDataset whose images are made one by one."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        assert x.ndim == 3, "asked for several images at once"
        return x.flip(2), y


def test_a_tensor_dataset_with_its_own_items_is_asked_item_by_item() -> None:
    turned = Turned(torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 1, 2).clone(), torch.zeros(6).long())
    split = Split(0, "in", turned, np.arange(6), 0)
    (minibatch,) = next(iter(TrainingLoader([split], partitions.REGISTRY["random"], 4)))
    assert minibatch[0][:, 0, 0, 0].tolist() == minibatch.i.tolist()
    assert len(list(evaluation_batches(turned, np.arange(6)))) == 1


class Costly(Dataset):
    """Images that are dear to open."""

    opened = 0

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        Costly.opened += 1
        return torch.zeros(1), i % 2


def test_labels_are_not_read_before_they_are_needed() -> None:
    split = Split(0, "in", Costly(), np.arange(50), 0)
    costly = TrainingLoader([split], partitions.REGISTRY["environment"], 4)
    next(iter(costly))
    assert Costly.opened == 4
    assert costly.group_counts(2) == ()
    assert Costly.opened == 4


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_minibatches_are_copied_and_pickled(again) -> None:
    minibatch = next(iter(loader()))[0]
    copied = again(minibatch)
    assert isinstance(copied, Minibatch)
    assert all(torch.equal(*pair) for pair in zip(minibatch, copied, strict=True))
    assert torch.equal(minibatch.c, copied.c)


def test_minibatches_move_with_their_arrays() -> None:
    minibatch = Minibatch(torch.zeros(1), torch.zeros(1), c=torch.ones(1))
    moved = minibatch.to("meta")
    assert isinstance(moved, Minibatch)
    assert moved[0].device.type == moved.c.device.type == "meta"


@pytest.mark.parametrize("wrap", [lambda e: e, Opened])
def test_evaluation_passes_once_in_order(wrap) -> None:
    keys = np.array([7, 3, 11, *range(20, 40)] * 4)
    batches = list(evaluation_batches(wrap(environment(40, 0)), keys))
    assert torch.cat([x[:, 0, 0, 0] for x, _ in batches]).tolist() == keys.tolist()
    assert torch.cat([y for _, y in batches]).tolist() == (keys % 2).tolist()
    assert max(len(x) for x, _ in batches) <= 64


class Late(Opened):
    """An environment that hands out bytes, adds a drawn number to them in training, and halves finished batches."""

    def read(self, key: int, rng: np.random.Generator | None = None) -> torch.Tensor:
        drawn = 0.0 if rng is None else float(rng.random())
        return self.inner[key][0] + drawn

    def finish(self, batch: torch.Tensor) -> torch.Tensor:
        return batch / 2


def test_images_are_read_one_by_one_and_finished_as_a_batch() -> None:
    minibatches = next(iter(loader(wrap=Late)))
    drawn = torch.cat([2 * x[:, 0, 0, 0] - (100 * m.e + m.i) for m in minibatches for x in [m[0]]])
    assert 0 < drawn.min() < drawn.max() < 1
    assert len(drawn.unique()) == len(drawn)  # each row has a draw of its own
    x, _ = next(evaluation_batches(Late(environment(10, 0)), np.array([3, 1])))
    assert x[:, 0, 0, 0].tolist() == [1.5, 0.5]  # never augmented


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_seed_and_step(workers: int) -> None:
    a, b = (
        [torch.cat([m[0] for m in step]) for step in islice(loader(wrap=Late, seed=4, num_workers=n), 3)]
        for n in (0, workers)
    )
    assert all(map(torch.equal, a, b))
    other = torch.cat([m[0] for m in next(iter(loader(wrap=Late, seed=5)))])
    assert not torch.equal(a[0], other)


def test_compositions_of_environments_are_read_through() -> None:
    def halves(environment: InMemoryEnvironment) -> ConcatDataset:
        late = Late(environment)
        return ConcatDataset([Subset(late, range(20)), split_dataset(Subset(late, range(20, 40)), 20, seed=0)[0]])

    for x, m in ((m[0], m) for m in next(iter(loader("environment", wrap=halves)))):
        first = m.i < 20
        assert torch.equal((2 * x[:, 0, 0, 0]).floor().long()[first], (100 * m.e + m.i)[first])
        assert (2 * x[:, 0, 0, 0] % 1 > 0).all()  # the draws arrive too


def test_opening_images_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(loader(wrap=Late)))
    next(evaluation_batches(Late(environment(10, 0)), np.array([3, 1])))
    assert torch.equal(torch.rand(3), expected)


def test_hidden_confounders_are_marked_and_part_of_no_group() -> None:
    hidden = [dataclasses.replace(split, annotated=split.keys % 2 == 0) for split in splits()]

    def minibatches(partition: str) -> list[Minibatch]:
        return next(iter(TrainingLoader(hidden, partitions.REGISTRY[partition], 40, num_confounders=3)))

    for m in minibatches("environment"):
        known = m.i % 2 == 0
        assert 0 < known.sum() < len(known)
        assert torch.equal(m.c, torch.where(known, m.i // 2 % 3, -1))
        assert torch.equal(m.g, torch.where(known, 3 * m[1] + m.i // 2 % 3, -1))
    by_group = minibatches("group")
    assert [m.g.unique().tolist() for m in by_group] == [[0], [1], [2], [-1]]  # the labels of even positions are 0
    assert by_group[3][1].unique().tolist() == [1]
    loader_ = TrainingLoader(hidden, partitions.REGISTRY["group"], 40, num_confounders=3)
    assert sum(loader_.group_counts(2)) == sum(int(split.annotated.sum()) for split in hidden)


def test_without_any_annotation_groups_are_drawn_as_labels_are() -> None:
    hidden = [dataclasses.replace(split, annotated=np.zeros(len(split), dtype=bool)) for split in splits()]
    groups, labels = (
        TrainingLoader(hidden, partitions.REGISTRY[partition], 12, num_confounders=3)
        for partition in ("group", "label")
    )
    assert np.array_equal(groups.draw(3), labels.draw(3))
    assert all((m.g == -1).all() and (m.c == -1).all() for m in next(iter(groups)))


def test_ways_of_reading_are_not_mixed() -> None:
    both = ConcatDataset([Late(environment(10, 0)), environment(10, 0)])
    with pytest.raises(ValueError, match="mix image files with images in memory"):
        next(evaluation_batches(both, np.array([3, 1])))


def test_a_step_is_as_large_when_a_budget_empties_an_environment() -> None:
    options = {"partition": partitions.REGISTRY["random"], "batch_size": 12, "num_confounders": 3}
    whole, rest = TrainingLoader(splits(), **options), TrainingLoader(splits()[:1], **options, num_environments=2)
    assert [len(next(iter(loader_))[0][0]) for loader_ in (whole, rest)] == [24, 24]


def test_labels_that_every_image_must_be_opened_for_are_asked_for_once() -> None:
    opened: list[int] = []

    class Untold(Opened):
        def __init__(self, inner: InMemoryEnvironment):
            self.inner, self.c = inner, inner.c

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            opened.append(i)
            return super().__getitem__(i)

    untold = splits(Untold)
    counts = group_counts(untold, 2, 3)
    loader_ = TrainingLoader(untold, partitions.REGISTRY["group"], 12, num_confounders=3)
    assert counts == loader_.group_counts(2) == group_counts(splits(), 2, 3)
    assert len(opened) == 2 * 40


def with_mask(environment: InMemoryEnvironment) -> InMemoryEnvironment:
    """Example i has the mask i in all pixels."""
    environment.masks = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 2, 2))
    return environment


class Masked(Late):
    """As Late, with masks to which the drawn number is added too."""

    masks = ()

    def read_mask(self, key: int, rng: np.random.Generator | None = None) -> torch.Tensor:
        return torch.full((2, 2), key / 255) + (0.0 if rng is None else float(rng.random()))


@pytest.mark.parametrize("partition", list(partitions.REGISTRY))
@pytest.mark.parametrize(
    "wrap",
    [
        with_mask,
        lambda e: Subset(with_mask(e), range(40)),
        lambda e: with_mask(Opened(e)),
        lambda e: ConcatDataset([Subset(Masked(e), range(15)), Subset(Masked(e), range(15, 40))]),
    ],
)
def test_every_row_carries_its_own_mask(partition: str, wrap) -> None:
    masked, plain = (next(iter(loader(partition, wrap, with_masks=m))) for m in (True, False))
    for minibatch, unmasked in zip(masked, plain, strict=True):
        assert minibatch.m.shape == (len(minibatch[0]), 2, 2)
        assert minibatch.m.dtype == torch.float32
        drawn = 2 * minibatch[0][:, 0, 0, 0] % 1 if isinstance(wrap(environment(40, 0)), ConcatDataset) else 0
        torch.testing.assert_close(minibatch.m[:, 1, 1], minibatch.i / 255 + drawn, atol=1e-4, rtol=0)
        assert torch.equal(minibatch[0], unmasked[0])
        assert not hasattr(unmasked, "m")
        assert torch.equal(pickle.loads(pickle.dumps(minibatch)).m, minibatch.m)


def test_masks_that_are_not_known_are_asked_for_in_vain() -> None:
    with pytest.raises(ValueError, match=r"no masks are known of the environments \[0, 3\]; give --mask_dir"):
        loader(with_masks=True)


def test_masks_do_not_follow_a_transform() -> None:
    class Transformed(Opened):
        transform, masks = torch.tensor, np.zeros((40, 2, 2), bool)

    with pytest.raises(NotImplementedError, match="Transformed pass through a transform"):
        loader(wrap=Transformed, with_masks=True)


SIZE = 32


@pytest.fixture
def pools(tmp_path: Path) -> tuple[Images, Images]:
    """Six smooth images of 40 x 50 pixels that are their own masks."""
    rows, columns = np.linspace(0, 1, 40)[:, None], np.linspace(0, 1, 50)
    for i in range(6):
        pixels = np.round(255 * (0.5 + 0.5 * np.sin(2 + i * rows) * np.cos(5 * columns - i))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(tmp_path / f"{i}.bmp")
    names = [tuple(f"{i}.{ending}" for i in range(6)) for ending in ("bmp", "png")]
    return Images(tmp_path, names[0], SIZE), Images(tmp_path, names[1], SIZE)


def photographs(pools: tuple[Images, Images], pipeline: str, crop: str = "original", **options) -> TrainingLoader:
    images = dataclasses.replace(pools[0], crop=crop)
    read = input_pipelines.REGISTRY[pipeline](images)
    read.prepare()
    splits = []
    for e in range(2):
        environment = ImageEnvironment(
            images, range(3 * e, 3 * e + 3), [0, 1, 1], [0, 0, 1], augment=True, masks=pools[1]
        )
        environment.pipeline = read
        splits.append(Split(e, "in", environment, np.array([2, 0, 1]), e))
    return TrainingLoader(splits, partitions.REGISTRY["group"], 6, num_confounders=2, seed=3, **options)


def levels(minibatch: Minibatch) -> torch.Tensor:
    """The red levels (B, H, W) of normalised images."""
    return (minibatch[0][:, 0] * 0.229 + 0.485) * 255


# How far a mask, always cut from the file, may be from an image that is squashed first: 90 % of the levels, and all.
APART = {"pil": (0, 0), "cv2": (2, 12), "device": (2, 12)}


@pytest.mark.parametrize("crop", ["original", "resized", "none"])
@pytest.mark.parametrize("pipeline", ["pil", "cv2", "device"])
def test_a_mask_is_augmented_as_an_image_that_is_the_mask(
    pools: tuple[Images, Images], pipeline: str, crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = augmentation.draw
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "grey": False}
    monkeypatch.setattr(augmentation, "draw", lambda *args, **options: draw(*args, **options)._replace(**neutral))
    distinct = set()
    for step in islice(photographs(pools, pipeline, crop, with_masks=True), 4):
        assert [minibatch.g.unique().tolist() for minibatch in step] == [[0], [2], [3]]
        for minibatch in step:
            apart = (minibatch.m * 255 - levels(minibatch)).abs()
            assert minibatch.m.shape == (4, SIZE, SIZE)
            assert apart.quantile(0.9) <= APART[pipeline][0] + 0.01
            assert apart.max() <= APART[pipeline][1] + 0.01
            distinct |= {mask.numpy().tobytes() for mask in minibatch.m}
    assert len(distinct) > (10 if crop == "none" else 40)  # of 6 images, mirrored or not; of 48 draws


@pytest.mark.parametrize("pipeline", ["pil", "cv2", "device"])
def test_masks_change_no_draw_and_no_worker_changes_masks(pools: tuple[Images, Images], pipeline: str) -> None:
    loaders = (photographs(pools, pipeline, with_masks=m, num_workers=n) for m, n in ((True, 0), (False, 0), (True, 2)))
    masked, plain, workers = ([minibatch for step in islice(found, 2) for minibatch in step] for found in loaders)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a.i, b.i) for a, b in zip(masked, plain, strict=True))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a.m, b.m) for a, b in zip(masked, workers, strict=True))


def test_masks_of_images_that_are_not_augmented_are_squashed(pools: tuple[Images, Images]) -> None:
    loader_ = photographs(pools, "pil", with_masks=True)
    for split in loader_.splits:
        split.environment.augment = False
    for minibatch in next(iter(loader_)):
        torch.testing.assert_close(minibatch.m * 255, levels(minibatch), atol=0.01, rtol=0)

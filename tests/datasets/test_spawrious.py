"""Spawrious on a tree of hard links to one image, against its tables written out anew."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed import datasets, partitions, registry
from domainbed.datasets.spawrious import CustomImageFolder, SpawriousBenchmark
from domainbed.loaders import TrainingLoader
from domainbed.splits import split_environments, training_splits

N = 100  # images of each breed in each location; the release has 3168
LOCATIONS = ["desert", "jungle", "dirt", "snow", "mountain", "beach"]
BREEDS = ["bulldog", "corgi", "dachshund", "labrador"]
TABLE_ORDER = ["bulldog", "dachshund", "labrador", "corgi"]
ONE_TO_ONE = {  # training, filler, test; in the tables' order
    "SpawriousO2O_easy": ("desert jungle dirt snow", "beach", "dirt snow desert jungle"),
    "SpawriousO2O_medium": ("mountain beach dirt jungle", "desert", "jungle dirt beach snow"),
    "SpawriousO2O_hard": ("jungle mountain snow desert", "beach", "mountain snow desert jungle"),
}
MANY_TO_MANY = {  # g0 ... g3, t0 ... t3
    "SpawriousM2M_easy": ("desert mountain dirt jungle", "dirt jungle mountain desert"),
    "SpawriousM2M_medium": ("beach snow mountain desert", "desert mountain beach snow"),
    "SpawriousM2M_hard": ("dirt jungle snow beach", "snow beach dirt jungle"),
}
CHALLENGES = [*ONE_TO_ONE, *MANY_TO_MANY]


def write_release(root: Path, n: int = N) -> Path:
    """{0,1}/{location}/{breed}/{i}.png, linked in an order that is not that of the names."""
    root.mkdir(parents=True)
    Image.fromarray(np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)).save(root / "one.png")
    for folder in ("0", "1"):
        for location in LOCATIONS:
            for breed in BREEDS:
                cell = root / folder / location / breed
                cell.mkdir(parents=True)
                for i in reversed(range(n)):
                    os.link(root / "one.png", cell / f"{i}.png")
    (root / "0" / "desert" / "bulldog" / "notes.txt").write_text("")
    (root / "0" / "desert" / "bulldog" / "._0.png").write_text("")
    return root


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("data") / "spawrious224")


def build(name: str, root: Path, **hparams) -> SpawriousBenchmark:
    cls = datasets.get_dataset_class(name)
    small = type(name, (cls,), {"IMAGES": N})
    return small(str(root), [0], {"image_size": 8, **hparams})


def first(folder: int, location: str, breed: str, n: int = N) -> list[str]:
    return [f"{folder}/{location}/{breed}/{name}.png" for name in sorted(map(str, range(N)))[:n]]


def expected_paths(name: str) -> list[list[str]]:
    """The three environments' files, from the tables."""
    if name in ONE_TO_ONE:
        train, filler, test = ONE_TO_ONE[name]
        own = dict(zip(TABLE_ORDER, train.split(), strict=True))
        tested = list(zip(test.split(), TABLE_ORDER, strict=True))
        environments = [[file for f in (0, 1) for place, breed in tested for file in first(f, place, breed)]]
        for folder, n in ((0, 97), (1, 87)):
            environments.append(
                [file for breed in TABLE_ORDER for file in first(folder, own[breed], breed, n)]
                + [file for breed in TABLE_ORDER for file in first(folder, filler, breed, N - n)]
            )
        return environments
    g, t = (places.split() for places in MANY_TO_MANY[name])

    def part(places: list[str], bulldog: int, dachshund: int, labrador: int, corgi: int) -> list[str]:
        numbers = (bulldog, dachshund, labrador, corgi)
        cells = zip(numbers, TABLE_ORDER, strict=True)
        return [file for number, breed in cells for file in first(0, places[number], breed)]

    return [part(t, 0, 1, 2, 3) + part(t, 1, 0, 3, 2), part(g, 0, 1, 2, 3), part(g, 1, 0, 3, 2)]


@pytest.mark.parametrize("name", CHALLENGES)
def test_files_labels_and_backgrounds_are_the_tables(name: str, release: Path) -> None:
    dataset = build(name, release.parent)
    assert tuple(dataset.ENVIRONMENTS) == registry.domainbed_environments(name)
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (3, 4, (3, 8, 8))
    assert (dataset.N_STEPS, dataset.CHECKPOINT_FREQ) == (5001, 100)
    assert [len(environment) for environment in dataset] == [8 * N, 4 * N, 4 * N]
    for environment, expected in zip(dataset, expected_paths(name), strict=True):
        paths = [environment.images.paths[i] for i in environment.positions]
        assert paths == expected
        assert environment.y.tolist() == [BREEDS.index(path.split("/")[2]) for path in paths]
        assert environment.c.tolist() == [LOCATIONS.index(path.split("/")[1]) for path in paths]


@pytest.mark.parametrize("name", CHALLENGES)
def test_test_groups_never_occur_in_training(name: str, release: Path) -> None:
    dataset = build(name, release.parent)
    groups = [set((environment.y * 6 + environment.c).tolist()) for environment in dataset]
    assert dataset.num_confounders == 6
    assert not groups[0] & (groups[1] | groups[2])
    assert [len(some) for some in groups] == ([4, 8, 8] if name in ONE_TO_ONE else [8, 4, 4])


def test_a_background_that_training_never_shows(release: Path) -> None:
    dataset = build("SpawriousO2O_medium", release.parent)
    trained = {*dataset[1].c.tolist(), *dataset[2].c.tolist()}
    assert {dataset.CONFOUNDERS[c] for c in set(dataset[0].c.tolist()) - trained} == {"snow"}
    assert dataset.group_name(1 * 6 + 3) == "corgi, snow"


def test_published_counts_are_the_releases_images() -> None:
    cls = datasets.get_dataset_class("SpawriousO2O_easy")
    assert cls.IMAGES == 3168
    build_one = cls.build_type1_combination
    combinations = build_one(cls, ["desert"] * 4, ["snow"] * 4, "beach")["train_combinations"]
    assert combinations["corgi",] == [("desert", 3072), ("desert", 2756)]
    assert combinations[tuple(TABLE_ORDER)] == [("beach", 96), ("beach", 412)]
    assert cls.PUBLISHED_COUNTS == {"Test": 8 * 3168, "SC_group_1": 4 * 3168, "SC_group_2": 4 * 3168}


def test_both_placements(release: Path) -> None:
    inside, above = (build("SpawriousM2M_hard", root) for root in (release, release.parent))
    assert inside[0].images.root == above[0].images.root == release
    assert inside[1].images.paths == above[1].images.paths


def test_training_images_are_flipped_and_coloured_but_not_cropped(release: Path) -> None:
    dataset = build("SpawriousM2M_easy", release.parent)
    assert dataset[0].images.crop == "none"
    assert [environment.augment for environment in dataset] == [False, True, True]
    plain = build("SpawriousM2M_easy", release.parent, data_augmentation=False)
    assert not any(environment.augment for environment in plain)


def test_training_by_group(release: Path) -> None:
    dataset = build("SpawriousO2O_easy", release.parent)
    dataset.use_input_pipeline("pil")
    splits = training_splits(dataset, split_environments(dataset, [0], 0.2), [0])
    loader = TrainingLoader(splits, partitions.REGISTRY["group"], 8, num_confounders=6)
    minibatches = next(iter(loader))
    trained = sorted({g for environment in dataset[1:3] for g in (environment.y * 6 + environment.c).tolist()})
    assert [set(minibatch.g.tolist()) for minibatch in minibatches] == [{g} for g in trained]
    assert all(x.shape == (2, 3, 8, 8) for x, _ in minibatches)
    counts = loader.group_counts(4)
    assert [g for g, n in enumerate(counts) if n] == trained


def test_short_folders_are_all_named(tmp_path: Path) -> None:
    root = write_release(tmp_path / "spawrious224", 90)
    with pytest.raises(ValueError, match="lacks images; unpack it again") as error:
        build("SpawriousO2O_easy", tmp_path)
    lines = str(error.value).splitlines()[1:]
    places = zip(["desert", "jungle", "dirt", "snow"], TABLE_ORDER, strict=True)
    assert [line.strip() for line in lines] == [f"0/{at}/{breed}: needed 97, found 90" for at, breed in places]
    for path in (root / "0/snow/bulldog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="0/snow/bulldog: needed at least 1, found 0"):
        build("SpawriousM2M_hard", tmp_path)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither .* nor .*spawrious224 holds 0/"):
        build("SpawriousM2M_hard", tmp_path)
    with pytest.raises(ValueError, match="needs --data_dir"):
        datasets.get_dataset_class("SpawriousM2M_hard")(None, [0], {})


def test_combinations_of_third_parties(release: Path) -> None:
    train = {("corgi", "bulldog"): [("snow", 5), ("beach", 6), "dirt"]}
    dataset = SpawriousBenchmark(train, ["desert", "beach"], release, augment=False)
    assert [len(environment) for environment in dataset] == [8 * N, 10, 12, 2 * N]
    assert dataset[1].y.tolist() == [1] * 5 + [0] * 5  # in the order of the key
    assert np.bincount(dataset[0].c).tolist() == [4 * N, 0, 0, 0, 0, 4 * N]
    shared = set(dataset[2].positions.tolist()) & set(dataset[0].positions.tolist())
    assert len(shared) == 12  # a file that two environments use is one file of the pool
    with pytest.raises(ValueError, match=r"no corgi in 'moon'; its breeds: bulldog, .*; its locations: desert"):
        SpawriousBenchmark({("corgi",): ["moon"]}, ["desert"], release)
    with pytest.raises(ValueError, match="no poodle in 'snow'"):
        SpawriousBenchmark({("poodle",): ["snow"]}, ["desert"], release)


def test_custom_image_folder(release: Path) -> None:
    folder = CustomImageFolder(str(release / "0/desert/bulldog"), 2, limit=3, transform=lambda image: image.size)
    size, y = folder[1]
    assert (len(folder), size, y.dtype, y.shape, int(y)) == (3, (12, 10), torch.int64, (), 2)
    assert [Path(path).name for path in folder.image_paths] == ["0.png", "1.png", "10.png"]
    assert len(CustomImageFolder(release / "0/desert/bulldog", 0)) == N
    assert CustomImageFolder(release / "0/desert/bulldog", 0)[0][0].mode == "RGB"


@pytest.mark.parametrize("name", CHALLENGES)
def test_docstrings_say_where_data_come_from(name: str) -> None:
    doc = datasets.get_dataset_class(name).__doc__ or ""
    assert all(part in doc for part in ("Source:", "Licence:", "Layout:"))

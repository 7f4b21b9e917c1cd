"""The folder datasets on tiny trees in their true layout, against torchvision's ImageFolder and transforms."""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from domainbed import datasets, hparams_registry, partitions, registry
from domainbed.datasets.image_folder import MultipleEnvironmentImageFolder, NamedImageFolder
from domainbed.datasets.in_distribution import InDistribution
from domainbed.loaders import TrainingLoader, evaluation_batches
from domainbed.splits import split_environments, training_splits

SOME = ("Alarm Clock", "Bike", "TV")  # of OfficeHome's and DomainNet's many classes
LAYOUTS = {  # written out from the releases
    "VLCS": ("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), ("bird", "car", "chair", "dog", "person")),
    "PACS": (
        "PACS",
        ("art_painting", "cartoon", "photo", "sketch"),
        ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    ),
    "OfficeHome": ("office_home", ("Art", "Clipart", "Product", "Real World"), SOME),
    "TerraIncognita": (
        "terra_incognita",
        ("location_100", "location_38", "location_43", "location_46"),
        ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
    ),
    "DomainNet": ("domain_net", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), SOME),
    "SVIRO": (
        "sviro",
        ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
        ("0", "1", "2", "3", "4", "5", "6"),
    ),
}
DOMAINS = {"VLCS": ("C", "L", "S", "V"), "TerraIncognita": ("L100", "L38", "L43", "L46")}
IN_DISTRIBUTION = [f"{name}InDistribution_{short}" for name, shorts in DOMAINS.items() for short in shorts]


def write_image(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = rng.integers(8, 30, 2)
    mode = ("RGB", "L")[int(rng.integers(2))]
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def write_tree(root: Path, environments: Sequence[str], classes: Sequence[str], n: int = 2) -> Path:
    """Folders of n + (number of the class) images, written in no particular order."""
    rng = np.random.default_rng(0)
    for environment in environments:
        for k, name in enumerate(classes):
            for i in rng.permutation(n + k % 3):
                write_image(root / environment / name / f"{i:x}_{name}{('.jpg', '.png', '.JPEG')[i % 3]}", rng)
    return root


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for folder, environments, classes in LAYOUTS.values():
        write_tree(root / folder, environments, classes)
    for clutter in ("PACS/readme.txt", "PACS/photo/list.csv", "PACS/photo/dog/notes.txt"):
        (root / clutter).write_text("")
    write_image(root / "PACS/photo/dog/more/b.png", np.random.default_rng(1))
    write_image(root / "PACS/photo/dog/more/a.png", np.random.default_rng(1))
    return root


def build(name: str, data_dir: Path, test_envs: Sequence[int] = (0,), **hparams):
    return datasets.get_dataset_class(name)(str(data_dir), list(test_envs), {"image_size": 16, **hparams})


@pytest.mark.parametrize("name", LAYOUTS)
def test_true_layouts_against_torchvision(name: str, data_dir: Path) -> None:
    folder, environments, classes = LAYOUTS[name]
    dataset = build(name, data_dir)
    assert len(dataset) == len(dataset.ENVIRONMENTS) == len(environments)
    assert tuple(dataset.ENVIRONMENTS) == registry.domainbed_environments(name)
    steps = dataset.N_STEPS, dataset.CHECKPOINT_FREQ
    assert steps == (5001, 1000 if name == "DomainNet" else 300)
    assert (dataset.input_shape, dataset.num_classes) == ((3, 16, 16), len(classes))
    assert dataset.dir == os.path.join(data_dir, folder) + "/"
    assert dataset.num_confounders == 1
    for environment, expected in zip(dataset, environments, strict=True):
        theirs = ImageFolder(str(data_dir / folder / expected))
        ours = [str(environment.images.root / environment.images.paths[i]) for i in environment.positions]
        assert ours == [path for path, _ in theirs.samples]
        assert environment.y.tolist() == theirs.targets
        assert theirs.classes == list(dataset.CLASSES)
        assert environment.c is None


def test_evaluation_is_torchvisions_to_the_bit(data_dir: Path) -> None:
    dataset = build("PACS", data_dir, image_size=24)
    transform = transforms.Compose(
        [
            transforms.Resize((24, 24)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    for e, environment in enumerate(LAYOUTS["PACS"][1]):
        theirs = ImageFolder(str(data_dir / "PACS" / environment), transform)
        for (x, y), (x_theirs, y_theirs) in zip(dataset[e], theirs, strict=False):
            assert torch.equal(x, x_theirs)
            assert y == y_theirs


def test_only_training_environments_are_augmented(data_dir: Path) -> None:
    assert [e.augment for e in build("PACS", data_dir, [0, 2])] == [False, True, False, True]
    assert not any(e.augment for e in build("PACS", data_dir, data_augmentation=False))


def test_one_pool_serves_training_and_evaluation(data_dir: Path) -> None:
    dataset = build("VLCS", data_dir, [0], image_size=8)
    dataset.use_input_pipeline("pil")
    assert len({id(e.pipeline) for e in dataset}) == 1
    splits = training_splits(dataset, split_environments(dataset, [0], 0.2), [0])
    minibatches = next(islice(TrainingLoader(splits, partitions.REGISTRY["environment"], 4), 1))
    assert [x.shape for x, _ in minibatches] == [(4, 3, 8, 8)] * 3
    (x, y), *_ = evaluation_batches(dataset[0], np.arange(len(dataset[0])))
    assert torch.equal(x, torch.stack([image for image, _ in islice(dataset[0], len(dataset[0]))]))
    assert y.tolist() == dataset[0].y.tolist()


def test_single_source_generalisation(data_dir: Path) -> None:
    dataset = build("TerraIncognita", data_dir, [0, 2, 3])
    splits = split_environments(dataset, [0, 2, 3], 0.2)
    assert [split.env for split in training_splits(dataset, splits, [0, 2, 3])] == [1]


class Mine(MultipleEnvironmentImageFolder):
    """As third parties write them for DomainBed."""

    CHECKPOINT_FREQ = 300
    ENVIRONMENTS = ["day", "night"]

    def __init__(self, root, test_envs, hparams):
        self.dir = os.path.join(root, "mine/")
        super().__init__(self.dir, test_envs, hparams["data_augmentation"], hparams)


def test_third_party_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "mine", ["b_night", "a_day"], ["x", "y"])
    (tmp_path / "mine" / ".domainbed_cache").mkdir()
    (tmp_path / "mine" / "a_day" / ".thumbnails").mkdir()
    dataset = Mine(str(tmp_path), [1], {"data_augmentation": True})
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (2, 2, (3, 224, 224))
    assert dataset[0].images.paths[dataset[0].positions[0]].startswith("a_day/x/")
    assert dataset.group_name(1) == "y, c=0"
    assert Mine.CLASSES == ()  # found ones belong to the instance


def test_a_stray_folder_is_no_environment(tmp_path: Path) -> None:
    write_tree(tmp_path / "mine", ["day", "night", "tmp"], ["x"], 1)
    with pytest.raises(ValueError, match=r"holds 3 folders \(day, night, tmp\).*but Mine has 2 \(day, night\)"):
        Mine(tmp_path, [0], {"data_augmentation": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "tmp").mkdir(), "rename: tmp; missing: none"),
        (lambda root: (root / "sketch").rename(root / "drawings"), "rename: drawings; missing: sketch"),
        (lambda root: (root / "photo").rename(root.parent / "photo"), "found art_painting, cartoon, sketch; expected"),
        (lambda root: (root / "photo/horse").rename(root / "photo/pony"), "photo lacks horse; photo has also pony"),
        (lambda root: (root / "cartoon/tmp").mkdir(), "cartoon has also tmp"),
        (lambda root: [path.unlink() for path in (root / "photo/dog").iterdir()], "photo has no images in dog"),
    ],
)
def test_wrong_trees_are_told_apart(tmp_path: Path, change, message: str) -> None:
    change(write_tree(tmp_path / "PACS", *LAYOUTS["PACS"][1:], 1))
    with pytest.raises(ValueError, match=message):
        build("PACS", tmp_path)


def test_the_classes_of_most_environments_hold(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "office_home", *LAYOUTS["OfficeHome"][1:], 1)
    (root / "Real World" / "TV").rename(root / "Real World" / "Telly")
    with pytest.raises(ValueError, match=r"\(Alarm Clock, Bike, TV\).*Real World lacks TV; Real World has also Telly"):
        build("OfficeHome", tmp_path)


def test_folders_without_classes(tmp_path: Path) -> None:
    for environment in LAYOUTS["SVIRO"][1]:
        (tmp_path / "sviro" / environment).mkdir(parents=True)
    with pytest.raises(ValueError, match="there are no folders of classes"):
        build("SVIRO", tmp_path)


@pytest.mark.parametrize("name", [*LAYOUTS, *IN_DISTRIBUTION])
def test_no_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; --data_dir names"):
        build(name, tmp_path)
    with pytest.raises(ValueError, match=f"{name} needs --data_dir"):
        datasets.get_dataset_class(name)(None, [0], {})


@pytest.mark.parametrize("seed", range(1, 4))
def test_domain_nets_batch_size(seed: int) -> None:
    expected = hparams_registry._hparams("ERM", "PACS", seed)  # draws 2 ** U(3, 5.5) from the same generator
    drawn = hparams_registry._hparams("ERM", "DomainNet", seed)
    rng = np.random.RandomState(hparams_registry.seed_hash(seed, "batch_size"))
    assert drawn == expected | {"batch_size": (32, int(2 ** rng.uniform(3, 5)))}


@pytest.mark.parametrize(
    ("name", "total"), [("PACS", 9991), ("OfficeHome", 15588), ("TerraIncognita", 24330), ("DomainNet", 586575)]
)
def test_published_counts_have_the_published_totals(name: str, total: int) -> None:
    cls = datasets.get_dataset_class(name)
    assert tuple(cls.PUBLISHED_COUNTS) == cls.ENVIRONMENTS
    assert sum(cls.PUBLISHED_COUNTS.values()) == total


@pytest.mark.parametrize("name", IN_DISTRIBUTION)
def test_in_distribution_divides_one_domain(name: str, tmp_path: Path) -> None:
    source, short = name.split("InDistribution_")
    folder, environments, classes = LAYOUTS[source]
    domain = environments[DOMAINS[source].index(short)]
    write_tree(tmp_path / folder, [domain], classes, 10)  # the others need not be there
    dataset = build(name, tmp_path, [2])
    assert (dataset.num_classes, dataset.CLASSES, dataset.input_shape) == (len(classes), list(classes), (3, 16, 16))
    parts = [[environment.images.paths[i] for i in environment.positions] for environment in dataset]
    theirs = ImageFolder(str(tmp_path / folder / domain))
    labels = {f"{domain}/{os.path.relpath(path, theirs.root)}": y for path, y in theirs.samples}
    assert sorted(path for part in parts for path in part) == sorted(labels)
    for part, environment, share in zip(parts, dataset, (0.6, 0.2, 0.2), strict=True):
        assert environment.y.tolist() == [labels[path] for path in part]
        counts = np.bincount(environment.y), np.bincount(theirs.targets) * share
        assert (abs(counts[0] - counts[1]) < 1).all()
    assert [environment.augment for environment in dataset] == [True, False, False]


def test_in_distribution_depends_on_the_data_seed_alone(data_dir: Path) -> None:
    def parts(**hparams) -> list[list[int]]:
        return [e.positions.tolist() for e in build("VLCSInDistribution_C", data_dir, [2], **hparams)]

    np.random.seed(1)
    first = parts()
    np.random.seed(2)
    assert parts() == parts(data_seed=0) == first
    assert parts(data_seed=1) != first
    assert hparams_registry.random_hparams("ERM", "VLCSInDistribution_C", 5)["data_seed"] == 0


def test_in_distribution_is_official(data_dir: Path) -> None:
    dataset = build("TerraIncognitaInDistribution_L46", data_dir, [2])
    splits = split_environments(dataset, [2], 0.2)
    assert [split.kind for split in splits] == ["in"] * 3
    assert [split.env for split in training_splits(dataset, splits, [2])] == [0]


@pytest.mark.parametrize("name", [*LAYOUTS, *IN_DISTRIBUTION])
def test_docstrings_say_where_data_come_from(name: str) -> None:
    cls = datasets.get_dataset_class(name)
    assert issubclass(cls, NamedImageFolder | InDistribution)
    assert all(part in (cls.__doc__ or "") for part in ("Source:", "Licence:", "Layout:"))

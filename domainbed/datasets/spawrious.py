"""Spawrious: four dog breeds on six backgrounds, in test groups that training never shows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from domainbed.datasets.base import ImageEnvironment, MultipleDomainDataset, augments, image_size, register
from domainbed.images import Images
from domainbed.messages import listed

DESIGN_ORDER = ("bulldog", "dachshund", "labrador", "corgi")  # in which the challenges' tables name the breeds
SUFFIXES = (".png", ".jpg", ".jpeg")

Design = dict[tuple[str, ...], list[Any]]  # breeds -> for each group their location, or (location, number of images)


def images_in(folder: Path) -> list[str]:
    """Names of the image files of a folder, sorted, without hidden ones; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    return sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


class CustomImageFolder(Dataset[tuple[Any, Tensor]]):
    """The first images of a folder, by name, all of one class; for code written for DomainBed.

    Args:
        folder_path: the folder.
        class_index: the label of all.
        limit: how many images; None: all.
        transform: of the RGB image.
    """

    def __init__(
        self,
        folder_path: str | Path,
        class_index: int,
        limit: int | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ):
        self.class_index, self.transform = class_index, transform
        self.image_paths = [str(Path(folder_path, name)) for name in images_in(Path(folder_path))[:limit]]

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """The transformed image and its label, int64 of no dimension."""
        with Image.open(self.image_paths[index]) as file:
            image = file.convert("RGB")
        return self.transform(image) if self.transform else image, torch.tensor(self.class_index)


class Cell(NamedTuple):
    """Some images of an environment: of one breed on one background.

    Attributes:
        folder: "0" or "1", of the release's two sets of renderings.
        needed: the number of images, the first by name; None: all.
    """

    folder: str
    location: str
    breed: str
    needed: int | None

    @property
    def path(self) -> str:
        """The folder of its images, relative to the release's."""
        return f"{self.folder}/{self.location}/{self.breed}"


def cells(combinations: Design | Sequence[str], type1: bool) -> list[list[Cell]]:
    """The cells of each group of combinations; a mere list of locations is one group each, with all breeds.

    Raises:
        ValueError: a breed or location that Spawrious lacks.
    """
    all_breeds, locations = SpawriousBenchmark.CLASSES, SpawriousBenchmark.CONFOUNDERS
    table = combinations if isinstance(combinations, dict) else {tuple(all_breeds): list(combinations)}
    groups: list[list[Cell]] = [[] for _ in next(iter(table.values()))]
    for breeds, entries in table.items():
        for number, (group, entry) in enumerate(zip(groups, entries, strict=True)):
            location, needed = (entry, None) if isinstance(entry, str) else entry
            if location not in locations or not set(breeds) <= set(all_breeds):
                raise ValueError(
                    f"Spawrious has no {', '.join(breeds)} in {location!r}; its breeds: {', '.join(all_breeds)}; "
                    f"its locations: {', '.join(locations)}"
                )
            group += [Cell(str(number if type1 else 0), location, breed, needed) for breed in breeds]
    return groups


def find_release(root: str | Path | None) -> Path:
    """The folder that holds ``0/`` (and ``1/``): the data_dir itself or ``spawrious224`` in it.

    Raises:
        ValueError: no data_dir.
        FileNotFoundError: neither holds it.
    """
    if root is None:
        raise ValueError("Spawrious needs --data_dir: the directory that holds spawrious224/, or 0/ and 1/ themselves")
    for folder in (Path(root), Path(root, "spawrious224")):
        if (folder / "0").is_dir():
            return folder
    raise FileNotFoundError(f"neither {root} nor {Path(root, 'spawrious224')} holds 0/, Spawrious' folder of images")


def chosen_files(release: Path, groups: Sequence[Sequence[Cell]]) -> dict[Cell, list[str]]:
    """Each cell's files, relative to the release's folder.

    Raises:
        ValueError: folders hold fewer images than are needed; all of them are named.
    """
    chosen, problems = {}, []
    for cell in dict.fromkeys(cell for group in groups for cell in group):
        names = images_in(release / cell.path)[: cell.needed]
        chosen[cell] = [f"{cell.path}/{name}" for name in names]
        if len(names) < (cell.needed or 1):
            problems.append(f"{cell.path}: needed {cell.needed or 'at least 1'}, found {len(names)}")
    if problems:
        raise ValueError(listed(f"{release} lacks images; unpack it again:", problems))
    return chosen


class SpawriousBenchmark(MultipleDomainDataset):
    """Environment 0 is the test set, the others are the training combinations.

    Source, Licence, Layout: see the challenges.

    Confounder: the background, always numbered among all six, so that a group g = breed * 6 + background means the
    same in every challenge; test groups never occur in training, and in some challenges a whole background does not.
    The test environment is never augmented, even where it is trained on; the others are augmented without a crop.

    Args:
        train_combinations: a training environment for each entry of the lists.
        test_combinations: all of them together are the test environment.
        root_dir: the release's folder, or the one above it.
        augment: the training environments.
        type1: entry i is taken from the release's folder i, not from 0.
        size: pixels of a side of what the network sees.

    Class attributes:
        IMAGES: of each breed in each location of each of the release's two folders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: folders hold fewer images than are needed.
    """

    ENVIRONMENTS = ("Test", "SC_group_1", "SC_group_2")
    TEST_ENVS = (0,)
    NEEDS_DATA_DIR = True
    CONFOUNDERS = ("desert", "jungle", "dirt", "snow", "mountain", "beach")
    CLASSES = ("bulldog", "corgi", "dachshund", "labrador")
    PUBLISHED_COUNTS = {"Test": 25344, "SC_group_1": 12672, "SC_group_2": 12672}
    IMAGES: ClassVar[int] = 3168
    input_shape: tuple[int, ...] = (3, 224, 224)

    def __init__(
        self,
        train_combinations: Design | Sequence[str],
        test_combinations: Design | Sequence[str],
        root_dir: str | Path | None,
        augment: bool = True,
        type1: bool = False,
        size: int = 224,
    ):
        release = find_release(root_dir)
        test = [cell for group in cells(test_combinations, type1) for cell in group]
        groups = [test, *cells(train_combinations, type1)]
        files = chosen_files(release, groups)
        paths = dict.fromkeys(path for some in files.values() for path in some)
        images, where = Images(release, tuple(paths), size, crop="none"), {path: i for i, path in enumerate(paths)}
        self.input_shape, self.num_classes = (3, size, size), len(self.CLASSES)
        self.datasets = [
            _environment(images, where, [(cell, files[cell]) for cell in group], augment and e > 0)
            for e, group in enumerate(groups)
        ]

    def build_type1_combination(self, group: Sequence[str], test: Sequence[str], filler: str) -> dict[str, Design]:
        """One-to-one: a location per breed in 97 and 87 % of its training images, the filler in the rest.

        Args:
            group, test: locations of bulldog, dachshund, labrador, corgi in training and test.
            filler: the location of the rest.
        """
        counts = [int(share * self.IMAGES) for share in (0.97, 0.87)]
        own, tested = (list(zip(DESIGN_ORDER, places, strict=True)) for places in (group, test))
        train: Design = {(breed,): [(location, count) for count in counts] for breed, location in own}
        train[DESIGN_ORDER] = [(filler, self.IMAGES - count) for count in counts]
        return {"train_combinations": train, "test_combinations": {(breed,): [at, at] for breed, at in tested}}

    def build_type2_combination(self, group: Sequence[str], test: Sequence[str]) -> dict[str, Design]:
        """Many-to-many: two breeds share two locations, and exchange them from one environment to the other.

        Args:
            group, test: locations of bulldog, dachshund, labrador, corgi in the first environment (in the first part
                of the test); in the second the first two are exchanged, and the last two.
        """
        both = list(zip(DESIGN_ORDER, range(4), (1, 0, 3, 2), strict=True))
        train: Design = {(breed,): [(group[i], self.IMAGES), (group[j], self.IMAGES)] for breed, i, j in both}
        return {"train_combinations": train, "test_combinations": {(b,): [test[i], test[j]] for b, i, j in both}}


def _environment(
    images: Images, where: Mapping[str, int], parts: Sequence[tuple[Cell, Sequence[str]]], augment: bool
) -> ImageEnvironment:
    """The cells' files one after the other, with the breed as label and the location as confounder."""
    sizes = [len(paths) for _, paths in parts]
    y = np.repeat([SpawriousBenchmark.CLASSES.index(cell.breed) for cell, _ in parts], sizes)
    c = np.repeat([SpawriousBenchmark.CONFOUNDERS.index(cell.location) for cell, _ in parts], sizes)
    return ImageEnvironment(images, [where[path] for _, paths in parts for path in paths], y, c, augment=augment)


class OneToOne(SpawriousBenchmark):
    """A one-to-one challenge. Source, Licence, Layout: see the challenges.

    Class attributes:
        GROUP, TEST: locations of bulldog, dachshund, labrador, corgi in training and test.
        FILLER: the location of the training images that are elsewhere.
    """

    GROUP: ClassVar[Sequence[str]]
    TEST: ClassVar[Sequence[str]]
    FILLER: ClassVar[str]

    def __init__(self, root_dir: str | Path | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        train, test = self.build_type1_combination(self.GROUP, self.TEST, self.FILLER).values()
        super().__init__(train, test, root_dir, augments(hparams), type1=True, size=image_size(hparams))


class ManyToMany(SpawriousBenchmark):
    """A many-to-many challenge. Source, Licence, Layout: see the challenges.

    Class attributes:
        GROUP, TEST: locations of bulldog, dachshund, labrador, corgi in the first part of training and test.
    """

    GROUP: ClassVar[Sequence[str]]
    TEST: ClassVar[Sequence[str]]

    def __init__(self, root_dir: str | Path | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        train, test = self.build_type2_combination(self.GROUP, self.TEST).values()
        super().__init__(train, test, root_dir, augments(hparams), size=image_size(hparams))


@register
class SpawriousO2O_easy(OneToOne):
    """Each breed on its own background in training, on another breed's in the test.

    Source: Lynch, Dovonon, Kaddour and Silva 2023, "Spawrious: A Benchmark for Fine Control of Spurious Correlation
    Biases", https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/{0,1}/{location}/{breed}/, or {0,1} directly in the data_dir.
    """

    GROUP = ("desert", "jungle", "dirt", "snow")
    TEST = ("dirt", "snow", "desert", "jungle")
    FILLER = "beach"


@register
class SpawriousO2O_medium(OneToOne):
    """As the easy one, with other backgrounds; corgis are tested on snow, which training never shows.

    Source: Lynch et al. 2023, https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/{0,1}/{location}/{breed}/, or {0,1} directly in the data_dir.
    """

    GROUP = ("mountain", "beach", "dirt", "jungle")
    TEST = ("jungle", "dirt", "beach", "snow")
    FILLER = "desert"


@register
class SpawriousO2O_hard(OneToOne):
    """As the easy one, with other backgrounds.

    Source: Lynch et al. 2023, https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/{0,1}/{location}/{breed}/, or {0,1} directly in the data_dir.
    """

    GROUP = ("jungle", "mountain", "snow", "desert")
    TEST = ("mountain", "snow", "desert", "jungle")
    FILLER = "beach"


@register
class SpawriousM2M_easy(ManyToMany):
    """Two breeds share two backgrounds in training, and the other two breeds' in the test.

    Source: Lynch et al. 2023, https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/0/{location}/{breed}/, or 0 directly in the data_dir.
    """

    GROUP = ("desert", "mountain", "dirt", "jungle")
    TEST = ("dirt", "jungle", "mountain", "desert")


@register
class SpawriousM2M_medium(ManyToMany):
    """As the easy one, with other backgrounds.

    Source: Lynch et al. 2023, https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/0/{location}/{breed}/, or 0 directly in the data_dir.
    """

    GROUP = ("beach", "snow", "mountain", "desert")
    TEST = ("desert", "mountain", "beach", "snow")


@register
class SpawriousM2M_hard(ManyToMany):
    """As the easy one, with other backgrounds (DomainBed's; the paper's figure has others: aengusl/spawrious issue 2).

    Source: Lynch et al. 2023, https://arxiv.org/abs/2303.05470; combinations as in DomainBed, of sorted files.
    Licence: MIT. Layout: spawrious224/0/{location}/{breed}/, or 0 directly in the data_dir.
    """

    GROUP = ("dirt", "jungle", "snow", "beach")
    TEST = ("snow", "beach", "dirt", "jungle")

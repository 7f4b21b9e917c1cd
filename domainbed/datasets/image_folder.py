"""Folders of images: one per environment, in it one per class; DomainBed's six sets of this kind.

The counts in ``PUBLISHED_COUNTS`` are those of Bai et al. 2024, "Soft Prompt Generation for Domain Generalization",
appendix A, https://arxiv.org/abs/2404.19286; VLCS' total and TerraIncognita's other counts belong to DomainBed's paper,
https://arxiv.org/abs/2007.01434; SVIRO has none.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from domainbed.datasets.base import ImageEnvironment, Integers, MultipleDomainDataset, augments, image_size, register
from domainbed.images import Images, image_files

ClassFiles = Mapping[str, Sequence[str]]  # class -> its files, relative to the environment's folder


def subfolders(folder: Path) -> list[str]:
    """Names of the folders directly in a folder, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --data_dir names the one above the dataset's own")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def class_files(folder: Path) -> dict[str, list[str]]:
    """The image files of each class of an environment's folder, in the order of torchvision's ``ImageFolder``."""
    return {name: [f"{name}/{file}" for file in image_files(folder / name)] for name in subfolders(folder)}


def labelled(files: ClassFiles) -> tuple[list[str], Integers]:
    """The files (N) of all classes one class after the other, and their labels (N,)."""
    sizes = [len(some) for some in files.values()]
    return [file for some in files.values() for file in some], np.repeat(np.arange(len(sizes)), sizes)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def check_names(what: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises ValueError if the folders found are not the expected ones; it lists both and what differs."""
    if list(found) == list(expected):
        return
    more, less = (sorted(set(a) - set(b)) for a, b in ((found, expected), (expected, found)))
    raise ValueError(
        f"{what}: found {_listed(found)}; expected {_listed(expected)}. Take out or rename: {_listed(more)}; "
        f"missing: {_listed(less)}"
    )


def check_classes(root: Path, environments: Mapping[str, ClassFiles], expected: Sequence[str] = ()) -> list[str]:
    """The classes, which must be the same in all environments and have images in each.

    Args:
        root: the folder above the environments'.
        environments: folder -> its classes' files.
        expected: the classes; empty: those on which most environments agree.

    Raises:
        ValueError: a class is missing or empty somewhere, or there are others; all such places are named.
    """
    usual = tuple(expected) or Counter(map(tuple, environments.values())).most_common(1)[0][0]
    problems = []
    for environment, files in environments.items():
        missing, empty = sorted(set(usual) - set(files)), [name for name, some in files.items() if not some]
        wrong = {"lacks": missing, "has also": sorted(set(files) - set(usual)), "has no images in": empty}
        problems += [f"{environment} {verb} {', '.join(names)}" for verb, names in wrong.items() if names]
    if problems or not usual:
        raise ValueError(
            f"{root}: each environment's folder must hold one folder of images for each class ({_listed(usual)}), "
            f"and nothing but these; {'; '.join(problems) or 'there are no folders of classes'}"
        )
    return list(usual)


class MultipleEnvironmentImageFolder(MultipleDomainDataset):
    """Environments that are folders of folders of images; the latter are the classes.

    Environments and classes are numbered in the order of their folders' names. No confounder is known.

    Source: a tree of the user's, in DomainBed's form. Licence: the tree's. Layout: {environment}/{class}/{image}.

    Args:
        root: the folder of the environments' folders.
        test_envs: environments that are never augmented.
        augment: the others are, when they are trained on.
        hparams: ``image_size``.

    Class attributes:
        FOLDERS: names of the environments' folders, sorted; empty: any, as many as there are ENVIRONMENTS.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folders are not those of the environments, or do not hold the same classes.
    """

    NEEDS_DATA_DIR = True
    NORMALISED = True
    FOLDERS: ClassVar[Sequence[str]] = ()

    def __init__(self, root: str | Path, test_envs: Sequence[int], augment: bool, hparams: Mapping[str, Any]):
        folder, size = Path(root), image_size(hparams)
        found = {name: class_files(folder / name) for name in self._environment_folders(folder)}
        self.CLASSES = check_classes(folder, found, self.CLASSES)
        parts = {environment: labelled(files) for environment, files in found.items()}
        images = Images(folder, tuple(f"{e}/{file}" for e, (files, _) in parts.items() for file in files), size)
        ends = np.cumsum([len(y) for _, y in parts.values()])
        held_out = {*test_envs, *self.VALIDATION_ENVS}
        self.datasets = [
            ImageEnvironment(images, np.arange(end - len(y), end), y, augment=augment and e not in held_out)
            for e, (end, (_, y)) in enumerate(zip(ends, parts.values(), strict=True))
        ]
        self.input_shape, self.num_classes = (3, size, size), len(self.CLASSES)

    def _environment_folders(self, folder: Path) -> list[str]:
        found = subfolders(folder)
        if self.FOLDERS:
            check_names(f"environments of {type(self).__name__} in {folder}", found, self.FOLDERS)
        elif not found or (self.ENVIRONMENTS and len(found) != len(self.ENVIRONMENTS)):
            expected = f"{len(self.ENVIRONMENTS)} ({_listed(self.ENVIRONMENTS)})" if self.ENVIRONMENTS else "at least 1"
            raise ValueError(
                f"{folder} holds {len(found)} folders ({_listed(found)}), each of which is an environment, but "
                f"{type(self).__name__} has {expected}; take out what is none"
            )
        return found


def directory(dataset: str, root: str | Path | None, name: str) -> str:
    """A dataset's folder under the data_dir, with a slash at its end.

    Raises:
        ValueError: no data_dir.
    """
    if root is None:
        raise ValueError(f"{dataset} needs --data_dir: the directory that holds {name}/")
    return os.path.join(root, name, "")


class NamedImageFolder(MultipleEnvironmentImageFolder):
    """An image folder with a known place under the data_dir.

    Source, Licence, Layout: those of the subclass.

    Class attributes:
        DIRECTORY: the folder under the data_dir.
    """

    CHECKPOINT_FREQ = 300
    DIRECTORY: ClassVar[str]

    def __init__(self, root: str | Path | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        self.dir = directory(type(self).__name__, root, self.DIRECTORY)
        super().__init__(self.dir, test_envs, augments(hparams), hparams)


@register
class VLCS(NamedImageFolder):
    """Photographs of five classes from four older datasets.

    Source: Fang, Xu and Rockmore 2013, "Unbiased Metric Learning: On the Utilization of Multiple Datasets and Web
    Images for Softening Bias", ICCV, https://doi.org/10.1109/ICCV.2013.208.
    Licence: not stated by the release; the photographs are those of Caltech101, LabelMe, SUN09 and PASCAL VOC 2007.
    Layout: VLCS/{Caltech101,LabelMe,SUN09,VOC2007}/{class}/.
    """

    ENVIRONMENTS = ("C", "L", "S", "V")
    FOLDERS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    DIRECTORY = "VLCS"
    PUBLISHED_COUNTS = {"all": 10729}
    CLASSES = ("bird", "car", "chair", "dog", "person")


@register
class PACS(NamedImageFolder):
    """Seven classes as paintings, cartoons, photographs and sketches.

    Source: Li, Yang, Song and Hospedales 2017, "Deeper, Broader and Artier Domain Generalization", ICCV,
    https://arxiv.org/abs/1710.03077.
    Licence: not stated by the release.
    Layout: PACS/{art_painting,cartoon,photo,sketch}/{class}/.
    """

    ENVIRONMENTS = ("A", "C", "P", "S")
    FOLDERS = ("art_painting", "cartoon", "photo", "sketch")
    DIRECTORY = "PACS"
    CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    PUBLISHED_COUNTS = {"A": 2048, "C": 2344, "P": 1670, "S": 3929}


@register
class OfficeHome(NamedImageFolder):
    """Things of 65 classes as art, clip art, product pictures and photographs.

    Source: Venkateswara, Eusebio, Chakraborty and Panchanathan 2017, "Deep Hashing Network for Unsupervised Domain
    Adaptation", CVPR, https://arxiv.org/abs/1706.07522.
    Licence: a fair-use notice, quoted by the dataset cards of its copies: non-commercial research and education.
    Layout: office_home/{Art,Clipart,Product,Real World}/{class}/.
    """

    ENVIRONMENTS = ("A", "C", "P", "R")
    NUM_CLASSES = 65
    FOLDERS = ("Art", "Clipart", "Product", "Real World")
    DIRECTORY = "office_home"
    PUBLISHED_COUNTS = {"A": 2427, "C": 4365, "P": 4439, "R": 4357}


@register
class TerraIncognita(NamedImageFolder):
    """Animals of ten classes in front of four camera traps.

    Source: Beery, Van Horn and Perona 2018, "Recognition in Terra Incognita", ECCV, https://arxiv.org/abs/1807.04975,
    cut down as in DomainBed. Its paper counts 24,788 images, the files that can be had now are 24,330: both count.
    Licence: Community Data License Agreement, permissive.
    Layout: terra_incognita/{location_100,location_38,location_43,location_46}/{class}/.
    """

    ENVIRONMENTS = ("L100", "L38", "L43", "L46")
    FOLDERS = ("location_100", "location_38", "location_43", "location_46")
    DIRECTORY = "terra_incognita"
    CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
    PUBLISHED_COUNTS = {"L100": 4741, "L38": 9736, "L43": 3970, "L46": 5883}
    COUNTS_OF_THE_PAPER: ClassVar[Mapping[str, int]] = {"L100": 4879, "L38": 9767, "L43": 4020, "L46": 6122}

    def __init__(self, root: str | Path | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        super().__init__(root, test_envs, hparams)
        if [len(environment) for environment in self.datasets] == list(self.COUNTS_OF_THE_PAPER.values()):
            self.PUBLISHED_COUNTS = dict(self.COUNTS_OF_THE_PAPER)


@register
class DomainNet(NamedImageFolder):
    """345 classes in six styles, without the duplicates of the first release.

    Source: Peng, Bai, Xia, Huang, Saenko and Wang 2019, "Moment Matching for Multi-Source Domain Adaptation", ICCV,
    https://arxiv.org/abs/1812.01754.
    Licence: a fair-use notice, quoted by the wilds package: non-commercial research and education.
    Layout: domain_net/{clipart,infograph,painting,quickdraw,real,sketch}/{class}/.
    """

    ENVIRONMENTS = ("clip", "info", "paint", "quick", "real", "sketch")
    NUM_CLASSES = 345
    FOLDERS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    DIRECTORY = "domain_net"
    CHECKPOINT_FREQ = 1000
    HPARAMS = {"batch_size": (32, lambda r: int(2 ** r.uniform(3, 5)))}
    PUBLISHED_COUNTS = {"clip": 48129, "info": 51605, "paint": 72266, "quick": 172500, "real": 172947, "sketch": 69128}


@register
class SVIRO(NamedImageFolder):
    """What sits on a car's rear seats, seven classes, rendered in ten cars.

    Source: Dias Da Cruz, Wasenmueller, Beise, Stifter and Stricker 2020, "SVIRO: Synthetic Vehicle Interior Rear Seat
    Occupancy Dataset and Benchmark", WACV, https://arxiv.org/abs/2001.03483; the release's archive for DomainBed.
    Licence: CC BY-NC-SA 4.0, as others state it.
    Layout: sviro/{aclass,escape,hilux,i3,lexus,tesla,tiguan,tucson,x5,zoe}/{class}/.
    """

    ENVIRONMENTS = FOLDERS = ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe")
    NUM_CLASSES = 7
    DIRECTORY = "sviro"

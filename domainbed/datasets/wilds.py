"""Releases in the layouts of the ``wilds`` package, which reads their metadata; WILDSCamelyon and WILDSFMoW.

The package is imported late (it brings pandas) and without its question to the network; it never downloads.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from domainbed.datasets.base import ImageEnvironment, MultipleDomainDataset, augments, image_size, register
from domainbed.images import Images
from domainbed.metadata import Problems, Table, escapes, plain_csv, read_csv


def import_wilds(module: str = "wilds") -> ModuleType:
    """Imports wilds or one of its modules.

    At its import wilds starts a thread that asks the package index for its newest release, by a package that asks for
    its own newest release as well. A stand-in answers on the spot, so that no job of a sweep touches the network or
    hangs where there is none.
    """
    stand_in: Any = ModuleType("outdated")
    stand_in.check_outdated = lambda package, version: (False, version)
    before = sys.modules.get("outdated")
    sys.modules["outdated"] = stand_in
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules["outdated"]
        if before is not None:
            sys.modules["outdated"] = before


def release_folder(root: str | None, name: str, version: str, needed: Sequence[str]) -> Path:
    """The folder ``name_vVERSION`` below root, after a look whether it is there with what wilds needs.

    Raises:
        ValueError: no root.
        FileNotFoundError: the root, the folder, or a needed file or folder in it is missing.
    """
    if root is None:
        raise ValueError(f"--data_dir is missing: the directory that holds {name}_v{version}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"--data_dir {root}: no such directory; it must hold {name}_v{version}")
    folder = Path(root, f"{name}_v{version}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; unpack the release there, or mend --data_dir")
    release = f"RELEASE_v{version}.txt"
    if missing := [entry for entry in (*needed, release) if not (folder / entry).exists()]:
        hint = f" (without {release} wilds takes nothing; an empty file will do)" if release in missing else ""
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}{hint}; unpack the whole release there")
    return folder


def read_by_wilds(module: str, class_name: str, folder: Path, ours: Mapping[str, Any] | None = None) -> Any:
    """The dataset object of wilds for the release in a folder; never downloads.

    wilds is given the release's CSV files without what it would trip over: byte-order marks, blanks around cells.

    Args:
        module: of wilds.datasets.
        class_name: in that module.
        folder: as ``release_folder`` returns it.
        ours: attribute of the object -> what we read from the same files; they must agree.

    Raises:
        ValueError: wilds can't read the metadata, or reads something else than we do.
    """
    source = import_wilds(f"wilds.datasets.{module}")
    try:
        with _lenient_pandas(source):
            dataset = getattr(source, class_name)(root_dir=str(folder.parent), download=False)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{folder}: wilds can't read the metadata ({error!r}); is the release whole?") from error
    for attribute, values in (ours or {}).items():
        theirs = _plain(getattr(dataset, attribute))
        if len(theirs) != len(values):
            raise ValueError(f"{folder}: wilds finds {len(theirs)} images in the metadata, we find {len(values)}")
        for row, (a, b) in enumerate(zip(theirs, values, strict=True), 1):
            if a != b:
                raise ValueError(
                    f"{folder}: wilds reads the metadata otherwise than we do: {attribute} of image {row} "
                    f"is {a!r} for wilds, {b!r} for us; mend that row"
                )
    return dataset


@contextmanager
def _lenient_pandas(module: Any) -> Iterator[None]:
    """Lets a module of wilds 2.0 read CSV files as ours, and write to the arrays of its tables.

    Pandas 3 makes these read-only where the file is large. Silenced are what torch says of read-only columns, to which
    nobody writes, and what wilds says of its own groups, which nobody uses.
    """
    pandas = module.pd

    class Frame(pandas.DataFrame):  # type: ignore[name-defined]
        _constructor = property(lambda self: Frame)
        values = property(lambda self: pandas.DataFrame(self).to_numpy(copy=True))

    def read(path: Any, *args: Any, **kwargs: Any) -> Frame:
        return Frame(pandas.read_csv(plain_csv(Path(path)), *args, **kwargs))

    stand_in = ModuleType("pandas")
    stand_in.__dict__.update(vars(pandas), read_csv=read)
    module.pd = stand_in
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable|.*CombinatorialGrouper")
            yield
    finally:
        module.pd = pandas


def _plain(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def image_paths(dataset: Any) -> list[str]:
    """Where a dataset of wilds finds its images, relative to its folder; empty: it keeps no such list."""
    if hasattr(dataset, "full_idxs"):  # numbered files, of which some are left out
        return [f"images/rgb_img_{number}.png" for number in dataset.full_idxs]
    paths = _plain(getattr(dataset, "_input_array", ()))
    return paths if len(paths) == len(dataset) and all(isinstance(path, str) for path in paths) else []


@dataclass(frozen=True, eq=False)
class Inputs(Images):
    """Images that a dataset of wilds reads by its ``get_input``, as no list tells where they lie; they are not cached.

    Attributes:
        dataset: the object of wilds.
    """

    dataset: Any = None

    def open(self, position: int) -> Image.Image:
        """The image at a position, as RGB.

        Raises:
            ValueError: the dataset holds something else than images.
        """
        image = self.dataset.get_input(position)
        if not isinstance(image, Image.Image):
            name = type(self.dataset).__name__
            raise ValueError(f"{name} gives a {type(image).__name__}, no PIL image; give its environments a transform")
        return image.convert("RGB")

    def check(self) -> None:
        """There are no files to be looked at."""

    def content_key(self) -> str:
        """There are no files by which a cache could be known.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self.dataset).__name__} reads its images itself; take --input_pipeline pil")


def image_pool(dataset: Any, paths: Sequence[str], size: int = 224) -> Images:
    """The images of a dataset of wilds: the listed files, or whatever it reads itself where they are not there."""
    folder = Path(getattr(dataset, "data_dir", ""))
    if paths and (_is_file(folder, paths[0]) or not _reads(dataset)):  # if neither, the missing files are named later
        return Images(folder, tuple(paths), size, crop="resized")
    return Inputs(folder, tuple(map(str, range(len(dataset.y_array)))), size, crop="resized", dataset=dataset)


def _is_file(folder: Path, path: str) -> bool:
    return not escapes(path) and (folder / path).is_file()


def _reads(dataset: Any) -> bool:
    try:
        first = dataset.get_input(0)
        if isinstance(first, Image.Image):
            first.load()
    except OSError:
        return False
    return True


class WILDSEnvironment(ImageEnvironment):
    """The images of a dataset of wilds, from all its splits, whose metadata have one value.

    Args:
        wilds_dataset: the object of wilds.
        metadata_name: a field of its metadata.
        metadata_value: the value.
        transform: PIL image -> tensor, in place of the input pipeline and its augmentation.
        images: the pool of all its images; None: its ``image_pool``, at 224 px.
        augment: training draws random crops, flips and colours.

    Attributes:
        name: "hospital_3".
        dataset: the object of wilds.
        indices: (N,) positions in it.
    """

    def __init__(
        self,
        wilds_dataset: Any,
        metadata_name: str,
        metadata_value: int,
        transform: Callable[[Any], Tensor] | None = None,
        images: Images | None = None,
        augment: bool = False,
    ):
        self.name, self.dataset, self.transform = f"{metadata_name}_{metadata_value}", wilds_dataset, transform
        column = wilds_dataset.metadata_array[:, wilds_dataset.metadata_fields.index(metadata_name)]
        self.indices: Tensor = torch.where(column == metadata_value)[0]
        if images is None:  # a transform needs no files
            images = image_pool(wilds_dataset, image_paths(wilds_dataset) if transform is None else ())
        super().__init__(images, self.indices, wilds_dataset.y_array[self.indices], augment=augment)

    def read(self, key: int, rng: np.random.Generator | None = None) -> Any:
        """The image in compact form; with a transform, what that makes of it."""
        if self.transform is None:
            return super().read(key, rng)
        return self.transform(self.dataset.get_input(int(self.indices[key])))


class WILDSDataset(MultipleDomainDataset):
    """A dataset of wilds with one environment for each value of a field of its metadata, over all its splits.

    Args:
        dataset: the object of wilds.
        metadata_name: the field.
        test_envs: environments that are not augmented.
        augment: augment the others.
        hparams: of the run; ``image_size`` is read.

    Raises:
        ValueError: a label is none of the dataset's classes, or there are other environments than ENVIRONMENTS.
    """

    INPUT_SHAPE = (3, 224, 224)

    def __init__(
        self, dataset: Any, metadata_name: str, test_envs: Sequence[int], augment: bool, hparams: Mapping[str, Any]
    ):
        size = image_size(hparams)
        self.input_shape, self.num_classes = (3, size, size), int(dataset.n_classes)
        images = image_pool(dataset, self.image_paths(dataset), size)
        values = self.metadata_values(dataset, metadata_name)
        expected = type(self).ENVIRONMENTS
        if expected is not None and len(values) != len(expected):
            raise ValueError(
                f"{type(self).__name__} has the environments {', '.join(expected)}; the metadata in {images.root} have "
                f"{metadata_name} {', '.join(map(str, values))}; is the release whole?"
            )
        self.datasets = [
            WILDSEnvironment(dataset, metadata_name, v, images=images, augment=augment and e not in test_envs)
            for e, v in enumerate(values)
        ]

    def image_paths(self, dataset: Any) -> list[str]:
        """Files of the images relative to the dataset's folder; override it where they lie elsewhere, to cache them."""
        return image_paths(dataset)

    def metadata_values(self, wilds_dataset: Any, metadata_name: str) -> list[int]:
        """The sorted values of a field of the metadata."""
        column = wilds_dataset.metadata_array[:, wilds_dataset.metadata_fields.index(metadata_name)]
        values: list[int] = torch.unique(column).tolist()
        return values


@register
class WILDSCamelyon(WILDSDataset):
    """Tumour or none, in patches of lymph nodes scanned in five hospitals, which are the environments.

    Source: Bandi et al. 2018, "From Detection of Individual Metastases to Classification of Lymph Node Status at the
    Patient Level: The CAMELYON17 Challenge"; in the form of Koh et al. 2021, "WILDS: A Benchmark of in-the-Wild
    Distribution Shifts", https://arxiv.org/abs/2012.07421, version 1.0, 455,954 patches of 96 px.
    Licence: CC0. Layout: ``camelyon17_v1.0/{metadata.csv, RELEASE_v1.0.txt, patches/patient_*_node_*/*.png}``.
    Differs from WILDS, as DomainBed does: its splits are ignored.
    """

    ENVIRONMENTS = ("hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4")
    CLASSES = ("normal", "tumor")
    NEEDS_DATA_DIR = True
    PUBLISHED_COUNTS = {
        "hospital_0": 59436, "hospital_1": 34904, "hospital_2": 85054, "hospital_3": 129838, "hospital_4": 146722,
    }  # fmt: skip

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        folder = release_folder(root, "camelyon17", "1.0", ("metadata.csv", "patches"))
        columns = {"tumor": range(2), "center": range(5), "node": range(5), "slide": range(50)}
        table = read_csv(folder / "metadata.csv", (*columns, "patient", "x_coord", "y_coord", "split"))
        problems = Problems(table.path)
        for name, allowed in columns.items():
            table.integers(name, allowed, problems)
        problems.raise_if_any("mend the rows or take them out")
        dataset = read_by_wilds("camelyon17_dataset", "Camelyon17Dataset", folder)
        super().__init__(dataset, "hospital", test_envs, augments(hparams), hparams)


@register
class WILDSFMoW(WILDSDataset):
    """What a satellite image shows, of 62 buildings and uses of land; environments are the regions of the world.

    The order of the regions is that in which the metadata first name them, as in WILDS.

    Source: Christie, Fendley, Wilson and Mukherjee 2018, "Functional Map of the World",
    https://arxiv.org/abs/1711.07846; in the form of Koh et al. 2021, "WILDS", https://arxiv.org/abs/2012.07421,
    version 1.1.
    Licence: FMoW Challenge Public License.
    Layout: ``fmow_v1.1/{rgb_metadata.csv, country_code_mapping.csv, RELEASE_v1.1.txt, images/rgb_img_*.png}``.
    Differs from WILDS, as DomainBed does: its splits are ignored.
    """

    ENVIRONMENTS = ("region_0", "region_1", "region_2", "region_3", "region_4", "region_5")
    NUM_CLASSES = 62
    NEEDS_DATA_DIR = True

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        folder = release_folder(root, "fmow", "1.1", ("rgb_metadata.csv", "country_code_mapping.csv", "images"))
        read_csv(folder / "country_code_mapping.csv", ("alpha-3", "region"))
        table = read_csv(folder / "rgb_metadata.csv", ("split", "category", "country_code", "timestamp"))
        self.CLASSES = tuple(import_wilds("wilds.datasets.fmow_dataset").categories)
        problems = Problems(table.path)
        check_words(table, "category", self.CLASSES, problems)
        check_words(table, "split", ("train", "val", "test", "seq"), problems)
        problems.raise_if_any("mend the rows (images are numbered by row, so none may be taken out)")
        dataset = read_by_wilds("fmow_dataset", "FMoWDataset", folder)
        super().__init__(dataset, "region", test_envs, augments(hparams), hparams)


def check_words(table: Table, column: str, allowed: Collection[str], problems: Problems) -> None:
    """Adds a problem for each cell of a column that is not one of the allowed words."""
    words = f"allowed: {', '.join(allowed)}" if len(allowed) < 10 else f"not one of the {len(allowed)} known"
    for line, cell in zip(table.lines, table.columns[column], strict=True):
        if cell not in allowed:
            problems.add(line, f"{column} is {cell!r}; {words}")

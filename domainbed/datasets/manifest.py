"""Datasets whose images and labels stand in a CSV file, which may be all there is: docs/own_data.md."""

import logging
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from domainbed import manifests
from domainbed.datasets.base import ImageEnvironment, Integers, MultipleDomainDataset, augments, image_size
from domainbed.images import Images
from domainbed.manifests import Manifest
from domainbed.metadata import Problems

logger = logging.getLogger(__name__)


class ManifestDataset(MultipleDomainDataset):
    """The images that a CSV file lists, with the columns path, label and, as needed, confounder, environment, split.

    A subclass names the file and, for sweeps and tables, repeats the environments as literals; labels and confounder
    values keep the order of ``CLASSES`` and ``CONFOUNDERS`` where the class has them. Paths in the file are relative
    to its folder.

    Args:
        root: --data_dir.
        test_envs: not trained on.
        hparams: ``image_size`` and ``data_augmentation`` are read.
        confounders: columns whose product forms the groups; None: the column ``confounder``, if there is one.

    Class attributes:
        MANIFEST: the file, relative to --data_dir.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows are bad, or don't suit the class or the arguments; every bad row is listed.
    """

    MANIFEST: ClassVar[str]
    OPTIONS = ("confounders",)
    NEEDS_DATA_DIR = True
    NORMALISED = True

    def __init__(
        self,
        root: str | None,
        test_envs: Sequence[int],
        hparams: dict[str, Any],
        confounders: Sequence[str] | None = None,
    ):
        path, folder = self.where(root)
        manifest = manifests.read(path)
        self._check(manifest, test_envs)
        columns = manifest.confounder_columns(confounders)
        y, c = self._labels(manifest, folder, columns, self.CONFOUNDERS if confounders is None else ())

        held_out = {*test_envs, *self.VALIDATION_ENVS}
        manifest.require_variation(columns, held_out)
        _warn_of_unseen(manifest, self.CLASSES, y, held_out)
        size = image_size(hparams)
        self.input_shape, self.num_classes = (3, size, size), len(self.CLASSES)
        table = manifest.table
        names = tuple(map(posixpath.normpath, table.columns["path"]))
        images = Images(folder, names, size, source=table.path, lines=table.lines)
        pool = ImageEnvironment(images, np.arange(len(names)), y, c)
        self.datasets = [
            pool.take(np.flatnonzero(manifest.e == e), augment=augments(hparams) and e not in held_out)
            for e in range(len(manifest.environments))
        ]

    def _labels(
        self, manifest: Manifest, folder: Path, columns: Sequence[str], declared: Sequence[str]
    ) -> tuple[Integers, Integers | None]:
        """Labels and confounders (N,), whose names are set; all bad rows in one error."""
        if declared and not columns:
            raise ValueError(
                f"{manifest.table.path} has no column confounder, and class {type(self).__name__} has CONFOUNDERS; add "
                "the column, or name others with --confounders"
            )
        problems = Problems(manifest.table.path)
        problems.found += manifest.problems.found
        self.CLASSES, y = manifest.table.categories("label", problems, self.CLASSES or None)
        self.CONFOUNDERS, c = (), None
        if columns:
            self.CONFOUNDERS, c = manifest.confounders(columns, problems, declared or None)
        manifest.table.check_paths("path", folder, problems)
        problems.raise_if_any(manifests.WHAT_TO_DO)
        return y, c

    def where(self, root: str | None) -> tuple[Path, Path]:
        """The CSV file, and the folder to which its paths are relative."""
        path = Path(root or "", self.MANIFEST)
        return path, path.parent

    def _check(self, manifest: Manifest, test_envs: Sequence[int]) -> None:
        """Raises ValueError if the class does not say what the file says, or the official test set is not tested on."""
        needed = {"ENVIRONMENTS": manifest.environments, "VALIDATION_ENVS": manifest.validation_envs}
        needed |= {"TEST_ENVS": manifest.test_envs} if manifest.test_envs else {}
        if any(tuple(getattr(self, name) or ()) != value for name, value in needed.items()):
            raise ValueError(
                f"{manifest.table.path} and class {type(self).__name__} disagree; for this file the class must say "
                + "; ".join(f"{name} = {value!r}" for name, value in needed.items())
            )
        if not set(manifest.test_envs) <= set(test_envs):
            raise ValueError(f"--test_envs must contain {list(manifest.test_envs)}, the rows of split test")


class _FileDataset(ManifestDataset):
    """A dataset that is a CSV file and nothing more: paths are relative to --data_dir, or to the file's folder."""

    NEEDS_DATA_DIR = False

    def where(self, root: str | None) -> tuple[Path, Path]:
        path = Path(self.MANIFEST)
        return path, path.parent if root is None else Path(root)


def from_file(path: str) -> type[ManifestDataset]:
    """The dataset class of a CSV file, called by the file's name without its suffix.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSV file with these columns, or its rows can't be trained and tested on.
    """
    manifest = manifests.read(path)
    doc = f"""The images that {path} lists.

    Source: the file's owner knows.
    Licence: the file's owner knows.
    Layout: {len(manifest.table)} rows with the columns {", ".join(manifest.table.columns)}.
    """
    attributes = {"__doc__": doc, "__module__": __name__, "MANIFEST": str(manifest.table.path)}
    return type(Path(path).stem, (_FileDataset,), attributes | manifest.class_attributes)


def _warn_of_unseen(manifest: Manifest, names: Sequence[str], y: Integers, held_out: set[int]) -> None:
    trained = set(y[~np.isin(manifest.e, list(held_out))].tolist())
    if unseen := [name for label, name in enumerate(names) if label not in trained]:
        logger.warning("%s: label %s never occurs in training", manifest.table.path, ", ".join(unseen))

"""Datasets of features that a frozen network has made of images, once: docs/features.md, "Training on features"."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from domainbed import feature_files
from domainbed.datasets.base import InMemoryEnvironment, MultipleDomainDataset
from domainbed.feature_files import FeatureFile


class FeatureDataset(MultipleDomainDataset):
    """Vectors (D,) in place of images; environments, labels, confounders and split units are the images'.

    Args:
        root: not read; the file holds everything.
        test_envs: not trained on.
        hparams: not read.

    Class attributes:
        FILE: its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, or damaged.
    """

    FILE: ClassVar[str]

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        file = feature_files.read(self.FILE)
        self.input_shape, self.num_classes = (file.about["dim"],), file.about["num_classes"]
        self.datasets = [_environment(file, e) for e in range(len(file.about["environments"]))]


def _environment(file: FeatureFile, e: int) -> InMemoryEnvironment:
    x, y, c, units = (None if array is None else torch.from_numpy(array) for array in file.environment(e))
    assert x is not None
    assert y is not None
    return InMemoryEnvironment(x, y, torch.zeros_like(y) if c is None else c, units)


def from_file(path: str) -> type[FeatureDataset]:
    """The dataset class of a feature file, called by the file's name without its suffix.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, or damaged.
    """
    file = feature_files.read(path)
    images = file.about["dataset"]
    doc = f"""Features of {images}, made by {file.about["featurizer"]}.

    Source: {path}, which python -m domainbed.scripts.extract_features wrote; of the images, see {images}.
    Licence: that of the images.
    """
    attributes = {"__doc__": doc, "__module__": __name__, "FILE": str(file.path)}
    return type(Path(path).stem, (FeatureDataset,), attributes | file.class_attributes)

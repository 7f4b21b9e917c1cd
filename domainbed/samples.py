"""The images that a method with stages may look at between two of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from domainbed.datasets.base import InMemoryEnvironment
from domainbed.loaders import evaluation_batches, examples_of
from domainbed.partitions import Examples
from domainbed.splits import Split


@dataclass(frozen=True)
class Sample:
    """Images that a stage may look at, one split after the other.

    Attributes:
        splits: where they are.
        num_confounders: V.
        device: where they are looked at.
        num_workers: the most processes that open them.
    """

    splits: Sequence[Split]
    num_confounders: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_workers: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    @property
    def examples(self) -> Examples:
        """Their aligned arrays (N,): label y, confounder c and group g (-1 where not annotated), environment e."""
        return examples_of(self.splits, self.num_confounders)

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function makes of all images, in their order, batch by batch: (N, ...), in main memory.

        Args:
            function: images (B, C, H, W), not augmented, -> (B, ...).

        Raises:
            ValueError: there are no images.
        """
        if not len(self):
            raise ValueError("there are no images to look at; a stage that looks at validation images needs some")
        made = [function(x).detach().cpu() for split in self.splits if len(split) for x in self._images(split)]
        return torch.cat(made)

    def _images(self, split: Split) -> Iterator[Tensor]:
        return (x for x, _ in evaluation_batches(split.environment, split.keys, self.num_workers, self.device))

    def replaced(self, features: Tensor) -> list[Split]:
        """The splits with features (N, D) in place of images; all else is as it was."""
        parts = features.split([len(split) for split in self.splits])
        return [_with_features(split, part) for split, part in zip(self.splits, parts, strict=True)]


def _with_features(split: Split, features: Tensor) -> Split:
    n = len(split.environment)
    x = features.new_zeros(n, *features.shape[1:])
    y, c = np.zeros(n, dtype=np.int64), np.full(n, -1)
    x[torch.from_numpy(split.keys)], y[split.keys], c[split.keys] = features, split.y, split.c
    environment = InMemoryEnvironment(x, torch.from_numpy(y), torch.from_numpy(c))
    return replace(split, environment=environment, annotated=None, inferred=None)


@dataclass(frozen=True)
class StageData:
    """What a stage is begun with.

    Attributes:
        training: all training images; the confounders that the annotation budget hides are -1.
        validation: all validation images, the same way; there may be none.
    """

    training: Sample
    validation: Sample

"""A method that trains in stages: what it declares of them, and the images that it may look at between two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainbed.datasets.base import InMemoryEnvironment, Integers
from domainbed.loaders import evaluation_batches, examples_of
from domainbed.partitions import Examples
from domainbed.splits import Split


@dataclass(frozen=True)
class Stage:
    """A part of a run's updates, with minibatches of its own.

    Attributes:
        name: by which ``Algorithm.begin_stage`` is told of it.
        share: of the run's updates, in [0, 1], or the name of the hparam that says it; a stage has at least one
            update, and the last stage takes what is left, whatever its share.
        partition: which examples share a minibatch; None: the partition of the run.
        of_features: its minibatches hold, in place of images, what ``Algorithm.stage_features`` gives for them (B, D):
            computed once, when the stage begins, of images that are not augmented.
    """

    name: str
    share: float | str = 1.0
    partition: str | None = None
    of_features: bool = False


def ends(stages: Sequence[Stage], steps: int, hparams: Mapping[str, Any]) -> list[int]:
    """The number of updates after which each stage is over.

    Raises:
        ValueError: there are fewer updates than stages, or a share is none.
    """
    if steps < len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"{steps} steps are too few for the stages {names}, of one update at least; give more --steps")
    found = [0]
    for number, stage in enumerate(stages[:-1]):
        left = len(stages) - 1 - number
        share = hparams[stage.share] if isinstance(stage.share, str) else stage.share
        if not 0 <= share <= 1:
            raise ValueError(f"hparam {stage.share} is {share}: give the stage's share of all updates, from 0 to 1")
        found.append(min(max(found[-1] + 1, found[-1] + round(share * steps)), steps - left))
    return [*found[1:], steps]


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
        """
        made = [function(x).detach().cpu() for split in self.splits for x in self._images(split)]
        return torch.cat(made)

    def _images(self, split: Split) -> Any:
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



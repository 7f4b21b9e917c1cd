"""Algorithm, splits -> average, per-group and worst-group accuracy, in one pass over each environment."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from domainbed.datasets.base import Integers, confounders
from domainbed.lib.misc import predicted_labels
from domainbed.loaders import evaluation_batches
from domainbed.splits import Split


@dataclass(frozen=True)
class Accuracy:
    """What a split says of an algorithm; accuracies are fractions.

    Attributes:
        average: AA, the mean over the examples.
        groups: accuracy of each non-empty group g = y * V + c; empty where no confounder is known.
        counts: number of examples of each of these groups.
    """

    average: float
    groups: dict[int, float]
    counts: dict[int, int]

    @property
    def worst_group(self) -> int:
        """The group of the lowest accuracy; the smallest number on ties."""
        return min(self.groups, key=lambda g: (self.groups[g], g))

    @property
    def worst(self) -> float:
        """WGA, the accuracy of the worst group."""
        return self.groups[self.worst_group]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context that computes in "fp32" (as is) or "bf16" (matrix products in bfloat16, weights in float32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def measure(correct: NDArray[np.bool_], groups: Integers | None) -> Accuracy:
    """Accuracies from correct (N,) and, where a confounder is known, the groups (N,)."""
    if groups is None:
        return Accuracy(float(correct.mean()), {}, {})
    present, counts = np.unique(groups, return_counts=True)
    hits = np.bincount(groups, weights=correct)[present]
    return Accuracy(
        float(correct.mean()),
        {int(g): float(hit / n) for g, hit, n in zip(present, hits, counts, strict=True)},
        {int(g): int(n) for g, n in zip(present, counts, strict=True)},
    )


def predictions(
    algorithm: Any,
    environment: Any,
    keys: Integers,
    device: torch.device,
    precision: str = "fp32",
    num_workers: int = 0,
) -> tuple[Integers, Integers]:
    """Predicted and true labels (N,) of an environment at keys; one-column logits are cut at 0.

    The algorithm is in evaluation mode meanwhile and in training mode afterwards.
    """
    predicted, true = [], []
    algorithm.eval()
    with torch.no_grad(), autocast(device, precision):
        for x, y in evaluation_batches(environment, keys, num_workers, device):
            predicted.append(predicted_labels(algorithm.predict(x)))
            true.append(torch.as_tensor(y))
    algorithm.train()
    return torch.cat(predicted).cpu().numpy(), torch.cat(true).cpu().numpy()


def evaluate(
    algorithm: Any,
    splits: Sequence[Split],
    num_confounders: int,
    device: torch.device,
    precision: str = "fp32",
    num_workers: int = 0,
) -> dict[tuple[int, str], Accuracy]:
    """Accuracy of each split by its number and kind; splits of one environment share one pass over it."""
    found = {}
    for env in dict.fromkeys(split.env for split in splits):
        here = [split for split in splits if split.env == env]
        keys, environment = np.concatenate([split.keys for split in here]), here[0].environment
        predicted, y = predictions(algorithm, environment, keys, device, precision, num_workers)
        groups = y * num_confounders + confounders(environment)[keys] if num_confounders > 1 else None
        ends = np.cumsum([len(split) for split in here])
        for split, end in zip(here, ends, strict=True):
            part = slice(end - len(split), end)
            found[split.number, split.kind] = measure((predicted == y)[part], None if groups is None else groups[part])
    return found

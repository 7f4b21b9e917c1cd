"""Small helpers at the path that DomainBed's users import: splits, pairs of minibatches, arithmetic on weights."""

import itertools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from domainbed.console import Tee, print_row, print_separator
from domainbed.lib.distributions import (
    Distribution1D,
    GaussianKernel,
    Kernel,
    KernelDensityEstimator,
    Nonparametric,
    Normal,
    continuous_bisect_fun_left,
    estimate_bandwidth,
)
from domainbed.lib.lars import LARS
from domainbed.lib.supervised_contrast import SupConLossLambda
from domainbed.lib.weight_average import ErmPlusPlusMovingAvg
from domainbed.seeding import seed_hash

__all__ = [
    "LARS",
    "Distribution1D",
    "ErmPlusPlusMovingAvg",
    "GaussianKernel",
    "Kernel",
    "KernelDensityEstimator",
    "MovingAverage",
    "Nonparametric",
    "Normal",
    "ParamDict",
    "SupConLossLambda",
    "Tee",
    "accuracy",
    "balanced_weights",
    "continuous_bisect_fun_left",
    "distance",
    "estimate_bandwidth",
    "known_array",
    "l2_between_dicts",
    "labels",
    "make_weights_for_balanced_classes",
    "pdb",
    "predicted_labels",
    "print_row",
    "print_separator",
    "proj",
    "random_pairs_of_minibatches",
    "seed_hash",
    "split_dataset",
    "split_meta_train_test",
]

Batch: TypeAlias = tuple[Tensor, Tensor]


class _SplitDataset(Dataset):
    """Some examples of a dataset, in a given order.

    Args:
        underlying_dataset: where the examples come from.
        keys: their indices there.
    """

    def __init__(self, underlying_dataset: Any, keys: Sequence[int]):
        self.underlying_dataset = underlying_dataset
        self.keys = keys

    def __getitem__(self, key: int) -> Any:
        return self.underlying_dataset[self.keys[key]]

    def __len__(self) -> int:
        return len(self.keys)


def _examples_by_unit(units: Sequence[int]) -> list[list[int]]:
    """The indices of each unit's examples, units in order of first appearance."""
    members: dict[int, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(int(unit), []).append(index)
    return list(members.values())


def _first_units(n: int, num_examples: int, num_units: int) -> int:
    """How many units stand for n of the examples: both parts keep at least one, unless n asks for none or all."""
    if n in (0, num_examples):
        return num_units if n else 0
    if num_units < 2:
        raise ValueError(
            f"all {num_examples} examples come from one unit, which can't be divided into {n} and the rest; "
            "split by example, or ask for none or all of them"
        )
    return min(max(round(n * num_units / num_examples), 1), num_units - 1)


def split_dataset(
    dataset: Any, n: int, seed: int = 0, units: Sequence[int] | None = None
) -> tuple[_SplitDataset, _SplitDataset]:
    """Divides a dataset at random in two.

    Without units, and with units that are all distinct, the parts hold DomainBed's examples in DomainBed's order.

    Args:
        dataset: anything with a length and items.
        n: examples of the first part; with units, the share ``n / len(dataset)`` of the units.
        seed: of the permutation.
        units: for each example the number of what it was made from (a scan, a photograph); examples of one unit
            stay together.

    Returns:
        The first part and the rest.

    Raises:
        ValueError: n is not in [0, len(dataset)], units has another length, or the only unit would have to be divided.
    """
    if not 0 <= n <= len(dataset):
        raise ValueError(f"n is {n}; a dataset of {len(dataset)} examples can give 0 to {len(dataset)} of them")
    if units is not None and len(units) != len(dataset):
        raise ValueError(f"units has {len(units)} entries for {len(dataset)} examples; give one for each")
    members = _examples_by_unit(range(len(dataset)) if units is None else units)
    order = list(range(len(members)))
    np.random.RandomState(seed).shuffle(order)
    cut = _first_units(n, len(dataset), len(members))
    first, rest = ([i for unit in part for i in members[unit]] for part in (order[:cut], order[cut:]))
    return _SplitDataset(dataset, first), _SplitDataset(dataset, rest)


def underlying(part: Any) -> tuple[Any, Sequence[int]]:
    """The dataset that a part is taken from, and the part's positions in it."""
    return (part.dataset, part.indices) if isinstance(part, Subset) else (part.underlying_dataset, part.keys)


def known_array(dataset: Any, name: str) -> np.ndarray | None:
    """An array (N,) int64 that a map-style dataset, or what it is made of, holds as ``y`` (labels) or another name.

    Returns:
        None where it holds none; labels also stand in ``targets`` and in a TensorDataset's second tensor.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [known_array(part, name) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([p for p in parts if p is not None])
    if isinstance(dataset, Subset | _SplitDataset):
        inner, keys = underlying(dataset)
        whole = known_array(inner, name)
        return None if whole is None else whole[np.asarray(keys, dtype=int)]
    known = getattr(dataset, name, None)
    if known is None and name == "y" and isinstance(dataset, TensorDataset):
        known = dataset.tensors[1]
    if known is None and name == "y" and getattr(dataset, "target_transform", None) is None:
        known = getattr(dataset, "targets", None)
    return None if known is None else np.asarray(known, dtype=np.int64)


def labels(dataset: Any) -> np.ndarray:
    """The labels (N,) of any map-style dataset, from its arrays where it has some, else image by image."""
    known = known_array(dataset, "y")
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64) if known is None else known


def balanced_weights(y: np.ndarray) -> np.ndarray:
    """Sampling weights (N,) that make every class that occurs in the labels (N,) equally likely; their sum is 1."""
    _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
    return 1.0 / (counts[classes] * len(counts))


def make_weights_for_balanced_classes(dataset: Any) -> Tensor:
    """Sampling weights under which every class that occurs is equally likely.

    Returns:
        (N,) float: 1 / (examples of the class x number of classes); the sum is 1.
    """
    return torch.from_numpy(balanced_weights(labels(dataset))).float()


def _paired(a: Batch, b: Batch) -> tuple[Batch, Batch]:
    """Two minibatches cut to the length of the shorter."""
    rows = min(len(a[0]), len(b[0]))
    return (a[0][:rows], a[1][:rows]), (b[0][:rows], b[1][:rows])


def random_pairs_of_minibatches(minibatches: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """Pairs each of the E minibatches with its successor in a random circular order.

    Returns:
        E pairs ``((x_i, y_i), (x_j, y_j))``, each cut to its shorter minibatch.
    """
    order = torch.randperm(len(minibatches)).tolist()
    return [_paired(minibatches[i], minibatches[j]) for i, j in zip(order, order[1:] + order[:1], strict=True)]


def split_meta_train_test(minibatches: Sequence[Batch], num_meta_test: int = 1) -> list[tuple[Batch, Batch]]:
    """Draws meta-test minibatches and gives each of the others one of them, in turn.

    Args:
        minibatches: E of them.
        num_meta_test: how many are for meta-test; at most E - 1 are taken, so that something is left to train on
            (DomainBed returns no pair at all then, and MLDG learns nothing).

    Returns:
        A pair ``(meta-train, meta-test)`` for each meta-train minibatch, cut to the shorter.
    """
    order = torch.randperm(len(minibatches)).tolist()
    cut = max(len(order) - num_meta_test, 1)
    return [
        _paired(minibatches[i], minibatches[j]) for i, j in zip(order[:cut], itertools.cycle(order[cut:]), strict=False)
    ]


def predicted_labels(logits: Tensor) -> Tensor:
    """Predictions (B,) int64 of logits (B, K), where a single column is a score with threshold 0."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def accuracy(network: Any, loader: Iterable[Any], weights: Tensor | None, device: str | torch.device) -> float:
    """Weighted share of the examples that an algorithm predicts right; leaves it in train mode.

    Args:
        network: has ``predict(x)`` -> logits (B, K); with one column, its sign is the prediction.
        loader: gives ``(x, y)``.
        weights: one for each example in the loader's order, or None for equal ones.
        device: where the network is.
    """
    right = total = 0.0
    seen = 0
    network.eval()
    with torch.no_grad():
        for x, y in loader:
            hits = (predicted_labels(network.predict(x.to(device))) == y.to(device).flatten()).cpu().double()
            batch_weights = torch.ones(len(hits)) if weights is None else weights[seen : seen + len(hits)].cpu()
            right += (hits * batch_weights).sum().item()
            total += batch_weights.sum().item()
            seen += len(hits)
    network.train()
    return right / total


def pdb() -> None:
    """Opens the debugger in the caller's frame."""
    import pdb as debugger

    debugger.Pdb().set_trace(sys._getframe().f_back)


class MovingAverage:
    """Exponential moving averages of named tensors, through which the newest values keep their gradient.

    Source: Rame et al. 2022, Fishr, https://arxiv.org/abs/2109.02934.

    Args:
        ema: weight of the past in [0, 1).
        oneminusema_correction: divide what ``update`` returns by (1 - ema), so that the size of the newest values'
            gradient does not depend on ema.
    """

    def __init__(self, ema: float, oneminusema_correction: bool = True):
        self.ema = ema
        self.ema_data: dict[str, Tensor] = {}
        self._scale = 1 / (1 - ema) if oneminusema_correction else 1.0

    def update(self, dict_data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes in new values; returns the averages by name, each as a row (1, n). The past starts at zero."""
        averages = {}
        for name, data in dict_data.items():
            average = (1 - self.ema) * data.reshape(1, -1) + self.ema * self.ema_data.get(name, 0.0)
            self.ema_data[name] = average.detach()
            averages[name] = average * self._scale
        return averages


class ParamDict(OrderedDict):
    """Tensors by name (a state dict) that are added, subtracted and scaled entry by entry.

    The other operand is a number, or a mapping with the same names.
    """

    def _apply(self, other: Any, operation: Callable[[Any, Any], Any]) -> "ParamDict":
        if not isinstance(other, Mapping):
            return ParamDict((name, operation(value, other)) for name, value in self.items())
        if self.keys() != other.keys():
            raise KeyError(f"entries that only one side has: {sorted(self.keys() ^ other.keys())}; names must agree")
        return ParamDict((name, operation(value, other[name])) for name, value in self.items())

    def __add__(self, other: Any) -> "ParamDict":
        return self._apply(other, operator.add)

    def __sub__(self, other: Any) -> "ParamDict":
        return self._apply(other, operator.sub)

    def __rsub__(self, other: Any) -> "ParamDict":
        return -self + other

    def __mul__(self, other: Any) -> "ParamDict":
        return self._apply(other, operator.mul)

    def __truediv__(self, other: Any) -> "ParamDict":
        return self._apply(other, operator.truediv)

    def __neg__(self) -> "ParamDict":
        return self * -1

    __radd__ = __add__
    __rmul__ = __mul__


def l2_between_dicts(dict_1: Mapping[str, Tensor], dict_2: Mapping[str, Tensor]) -> Tensor:
    """Mean squared difference over all elements of two mappings with the same names; 0-d.

    Raises:
        KeyError: the names differ.
    """
    differences = ParamDict(dict_1) - ParamDict(dict_2)
    return torch.cat([difference.flatten() for difference in differences.values()]).square().mean()


def distance(h1: nn.Module, h2: nn.Module) -> Tensor:
    """Euclidean distance between the parameters of two networks of the same form; 0-d."""
    difference = [(a - b).flatten() for a, b in zip(h1.parameters(), h2.parameters(), strict=True)]
    return torch.linalg.vector_norm(torch.cat(difference))


@torch.no_grad()
def proj(delta: float, adv_h: nn.Module, h: nn.Module) -> nn.Module:
    """Moves adv_h, in place, to the nearest parameters within distance delta of h's, and returns it."""
    away = distance(adv_h, h)
    if away > delta:
        for moved, center in zip(adv_h.parameters(), h.parameters(), strict=True):
            moved.lerp_(center, 1 - delta / away)
    return adv_h

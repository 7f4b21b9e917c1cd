"""Partition -> endless training minibatches; environment -> single-pass evaluation batches.

What step s draws is a function of (seed, s) alone: it does not depend on the algorithm, on workers or on what was
drawn before, so a method and its control see the same examples.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from domainbed import machine
from domainbed.datasets.base import InMemoryEnvironment, Integers, Split, confounders
from domainbed.lib.misc import balanced_weights, labels
from domainbed.partitions import Examples, Part, rows_per_part

EVALUATION_BATCH = 64  # larger batches are slower on a CPU: their maps leave the cache


class Minibatch(tuple[Tensor, Tensor]):
    """A pair ``x, y`` that also knows confounders, groups, environments and positions.

    Attributes:
        c, g, e, i: (B,) int64: confounder, group, environment, and the example's position in its environment.
    """

    c: Tensor
    g: Tensor
    e: Tensor
    i: Tensor

    def __new__(cls, x: Tensor, y: Tensor, **arrays: Tensor) -> "Minibatch":
        self = super().__new__(cls, (x, y))
        self.__dict__.update(arrays)
        return self

    def __getnewargs__(self) -> tuple[Tensor, Tensor]:  # what copying and pickling rebuild it from
        return self[0], self[1]

    def to(self, device: torch.device | str) -> "Minibatch":
        """The same minibatch on a device."""
        x, y = self
        return Minibatch(x.to(device), y.to(device), **{k: v.to(device) for k, v in self.__dict__.items()})


def examples_of(splits: Sequence[Split], num_confounders: int) -> Examples:
    """The aligned arrays of the splits' examples, one split after the other."""
    return Examples(
        labels=lambda: np.concatenate([labels(split.environment)[split.keys] for split in splits]),
        c=np.concatenate([confounders(split.environment)[split.keys] for split in splits]),
        e=np.concatenate([np.full(len(split), split.env) for split in splits]),
        num_confounders=num_confounders,
    )


def indexes_tensors(environment: Any) -> bool:
    """Whether an environment takes a tensor of positions as index; one with its own way to open an image may not."""
    own = getattr(type(environment), "__getitem__", None)
    return own in (TensorDataset.__getitem__, InMemoryEnvironment.__getitem__)


class _Items(Dataset[tuple[Any, Any, int]]):
    """Image, label and position of the splits' examples one after the other, opened when asked for."""

    def __init__(self, splits: Sequence[Split]):
        self.environments = [split.environment for split in splits]
        self.where = [(s, int(key)) for s, split in enumerate(splits) for key in split.keys]

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: int) -> tuple[Any, Any, int]:
        split, key = self.where[position]
        x, y = self.environments[split][key][:2]
        return x, y, position


class _Steps(Sampler[list[int]]):
    """The positions of all parts of step after step, without end."""

    def __init__(self, draw: Callable[[int], Integers]):
        self.draw = draw

    def __iter__(self) -> Iterator[list[int]]:
        return (self.draw(step).tolist() for step in itertools.count())


class TrainingLoader:
    """Endless lists of minibatches, one per part, drawn with replacement.

    Args:
        splits: the training in-splits.
        partition: function of the examples that returns the parts.
        batch_size: rows per training environment; a part gets its share of their sum.
        num_confounders: V.
        seed: of the draws.
        class_balanced: draw the classes of a part with equal probability.
        num_workers: the most processes that open images (none for data in memory).

    Raises:
        ValueError: the partition does not suit the dataset or the batch size.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        partition: Callable[[Examples], list[Part]],
        batch_size: int,
        num_confounders: int = 1,
        seed: int = 0,
        class_balanced: bool = False,
        num_workers: int = 0,
    ):
        self.splits, self.seed, self.num_workers = splits, seed, num_workers
        self.examples = examples_of(splits, num_confounders)
        self.keys = np.concatenate([split.keys for split in splits])
        self.parts = partition(self.examples)
        self.rows = rows_per_part(self.parts, batch_size, len(splits))
        self._odds = [balanced_weights(self.examples.y[p.positions]) if class_balanced else None for p in self.parts]

    def group_counts(self, num_classes: int) -> tuple[int, ...]:
        """Number of examples of each of the K * V groups; empty where no confounder is known."""
        examples = self.examples
        if examples.num_confounders < 2:
            return ()
        return tuple(np.bincount(examples.g, minlength=num_classes * examples.num_confounders).tolist())

    def draw(self, step: int) -> Integers:
        """Positions (parts * rows,) of step's examples."""
        drawn = []
        for p, (part, odds) in enumerate(zip(self.parts, self._odds, strict=True)):
            rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, p, step]))
            drawn.append(rng.choice(part.positions, self.rows, p=odds))
        return np.concatenate(drawn)

    def __iter__(self) -> Iterator[list[Minibatch]]:
        steps = _Steps(self.draw)
        batches: Iterable[Any] = map(self._gather, map(np.asarray, steps))
        if not all(indexes_tensors(split.environment) for split in self.splits):
            batches = DataLoader(_Items(self.splits), batch_sampler=steps, num_workers=workers(self.num_workers))
        for x, y, positions in batches:
            yield self._minibatches(x, y, positions)

    def _gather(self, positions: Integers) -> tuple[Tensor, Tensor, Tensor]:
        """Images and labels at positions, straight from the environments' tensors; and the positions."""
        e, keys = self.examples.e[positions], self.keys[positions]
        order, pieces = [], []
        for split in self.splits:
            chosen = np.flatnonzero(e == split.env)
            if len(chosen):
                order.append(chosen)
                pieces.append(split.environment[torch.from_numpy(keys[chosen])])
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        x, y = (torch.cat(column)[back] for column in zip(*pieces, strict=True))
        return x, y, torch.from_numpy(positions)

    def _minibatches(self, x: Tensor, y: Tensor, positions: Tensor) -> list[Minibatch]:
        c, e, i = (torch.from_numpy(a)[positions] for a in (self.examples.c, self.examples.e, self.keys))
        columns = {"c": c, "g": y * self.examples.num_confounders + c, "e": e, "i": i}
        parts = {name: column.split(self.rows) for name, column in columns.items()}
        pairs = zip(x.split(self.rows), y.split(self.rows), strict=True)
        return [Minibatch(*pair, **{name: part[p] for name, part in parts.items()}) for p, pair in enumerate(pairs)]


def evaluation_batches(environment: Any, keys: Integers, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) of an environment at keys, once, in their order."""
    if indexes_tensors(environment):
        for some in torch.from_numpy(keys).split(EVALUATION_BATCH):
            yield environment[some]
    else:
        loader = DataLoader(Subset(environment, keys.tolist()), EVALUATION_BATCH, num_workers=workers(num_workers))
        yield from (batch[:2] for batch in loader)


def workers(most: int) -> int:
    """How many loader processes to start: never more than there are cores, and none where there is one."""
    cores = machine.cores()
    return 0 if cores == 1 else min(most, cores)

"""Partition -> endless training minibatches; environment -> single-pass evaluation batches.

What step s draws is a function of (seed, s) alone: it does not depend on the algorithm, on workers or on what was
drawn before, so a method and its control see the same examples.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from domainbed.datasets.base import Integers, Split, confounders, labels
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

    def to(self, device: torch.device | str) -> "Minibatch":
        """The same minibatch on a device."""
        x, y = self
        return Minibatch(x.to(device), y.to(device), **{k: v.to(device) for k, v in self.__dict__.items()})


def examples_of(splits: Sequence[Split], num_confounders: int) -> Examples:
    """The aligned arrays of the splits' examples, one split after the other."""
    return Examples(
        y=np.concatenate([labels(split.environment)[split.keys] for split in splits]),
        c=np.concatenate([confounders(split.environment)[split.keys] for split in splits]),
        e=np.concatenate([np.full(len(split), split.env) for split in splits]),
        num_confounders=num_confounders,
    )


class _Items(Dataset[tuple[Tensor, Any]]):
    """The splits' images and labels one after the other, opened when asked for."""

    def __init__(self, splits: Sequence[Split]):
        self.environments = [split.environment for split in splits]
        self.where = [(s, int(key)) for s, split in enumerate(splits) for key in split.keys]

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, position: int) -> Any:
        split, key = self.where[position]
        return self.environments[split][key]


class _Steps(Sampler[list[int]]):
    """The positions of all parts of step after step, without end."""

    def __init__(self, draw: Callable[[int], Integers]):
        self.draw = draw

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield self.draw(step).tolist()
            step += 1


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
        self._odds = [self._class_odds(part) if class_balanced else None for part in self.parts]

    def _class_odds(self, part: Part) -> np.ndarray:
        """The probability (n,) of each example of a part if its classes are to be equally frequent."""
        y = self.examples.y[part.positions]
        odds = 1 / np.bincount(y)[y]
        return odds / odds.sum()

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
        if all(isinstance(split.environment, TensorDataset) for split in self.splits):
            images: Iterator[Any] = map(self._gather, map(np.asarray, steps))
        else:
            images = iter(DataLoader(_Items(self.splits), batch_sampler=steps, num_workers=workers(self.num_workers)))
        for positions, (x, y) in zip(steps, images, strict=True):
            yield self._minibatches(torch.as_tensor(positions), x, y)

    def _gather(self, positions: Integers) -> tuple[Tensor, Tensor]:
        """Images and labels at positions, straight from the environments' tensors."""
        e, keys = self.examples.e[positions], self.keys[positions]
        order, pieces = [], []
        for split in self.splits:
            chosen = np.flatnonzero(e == split.env)
            if len(chosen):
                order.append(chosen)
                pieces.append(split.environment[torch.from_numpy(keys[chosen])])
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        return torch.cat([x for x, _ in pieces])[back], torch.cat([y for _, y in pieces])[back]

    def _minibatches(self, positions: Tensor, x: Tensor, y: Tensor) -> list[Minibatch]:
        c, e, i = (torch.from_numpy(a)[positions] for a in (self.examples.c, self.examples.e, self.keys))
        columns = {"c": c, "g": y * self.examples.num_confounders + c, "e": e, "i": i}
        parts = {name: column.split(self.rows) for name, column in columns.items()}
        pairs = zip(x.split(self.rows), y.split(self.rows), strict=True)
        return [Minibatch(*pair, **{name: part[p] for name, part in parts.items()}) for p, pair in enumerate(pairs)]


def evaluation_batches(environment: Any, keys: Integers, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) of an environment at keys, once, in their order."""
    if isinstance(environment, TensorDataset):
        for some in torch.from_numpy(keys).split(EVALUATION_BATCH):
            yield environment[some]
    else:
        loader = DataLoader(Subset(environment, keys.tolist()), EVALUATION_BATCH, num_workers=workers(num_workers))
        yield from (batch[:2] for batch in loader)


def workers(most: int) -> int:
    """How many loader processes to start: never more than there are cores, and none where there is one."""
    cores = len(os.sched_getaffinity(0))
    return 0 if cores == 1 else min(most, cores)

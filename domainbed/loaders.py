"""Partition -> endless training minibatches; environment -> single-pass evaluation batches.

What step s draws is a function of (seed, s) alone: it does not depend on the algorithm, on workers or on what was
drawn before, so a method and its control see the same examples.
"""

import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, get_worker_info

from domainbed import machine
from domainbed.datasets.base import (
    InMemoryEnvironment,
    Integers,
    has_masks,
    leaves,
    locate,
    masks,
    read_mask,
    refuse_transforms,
)
from domainbed.interruption import SIGNALS
from domainbed.lib.misc import balanced_weights
from domainbed.partitions import Examples, Part, rows_per_part
from domainbed.splits import Split

EVALUATION_BATCH = 64  # larger batches are slower on a CPU: their maps leave the cache


class Minibatch(tuple[Tensor, Tensor]):
    """A pair ``x, y`` that also knows confounders, groups, environments and positions.

    Attributes:
        c, g, e, i: (B,) int64: confounder, group, environment, and the example's position in its environment;
            confounder and group are -1 where the annotation budget hides them.
        m: (B, H, W) float32 in [0, 1], augmented as x is: 1 on what should matter; only where the loader was told
            to read masks.
    """

    c: Tensor
    g: Tensor
    e: Tensor
    i: Tensor
    m: Tensor

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


def examples_of(splits: Sequence[Split], num_confounders: int, seed: int = 0) -> Examples:
    """The aligned arrays of the splits' examples, one split after the other; the seed is of random subsets."""
    return Examples(
        labels=lambda: np.concatenate([split.y for split in splits]),
        c=np.concatenate([split.c for split in splits]),
        e=np.concatenate([np.full(len(split), split.env) for split in splits]),
        num_confounders=num_confounders,
        seed=seed,
    )


def group_counts(splits: Sequence[Split], num_classes: int, num_confounders: int) -> tuple[int, ...]:
    """Number of annotated examples of each of the K * V groups; empty where no confounder is known."""
    if num_confounders < 2:
        return ()
    groups = examples_of(splits, num_confounders).g
    return tuple(np.bincount(groups[groups >= 0], minlength=num_classes * num_confounders).tolist())


def indexes_tensors(environment: Any) -> bool:
    """Whether an environment takes a tensor of positions as index; one with its own way to open an image may not."""
    own = getattr(type(environment), "__getitem__", None)
    return own in (TensorDataset.__getitem__, InMemoryEnvironment.__getitem__)


def reads_late(environment: Any) -> bool:
    """Whether an environment hands out images in a compact form, to be finished as a batch where the algorithm is.

    Raises:
        ValueError: it is composed of some that do and some that don't.
    """
    (late,) = _alike({hasattr(leaf, "read") and hasattr(leaf, "finish") for leaf in leaves(environment)})
    return late


def _alike(late: set[bool]) -> set[bool]:
    if len(late) > 1:
        raise ValueError("environments mix image files with images in memory; read all of them in one way")
    return late


class _Items(Dataset[tuple[Any, ...]]):
    """Image, label, position, and mask if wanted, of the environments' examples one after the other, opened when asked.

    Args:
        environments: all of them, or a composition of them.
        keys: (N,) for each environment, the examples' positions in it.
        seed: of the augmentation.
        with_masks: read the masks as well.
    """

    def __init__(self, environments: Sequence[Any], keys: Sequence[Integers], seed: int = 0, with_masks: bool = False):
        self.environments, self.seed, self.with_masks = environments, seed, with_masks
        self.where = [(e, int(key)) for e, some in enumerate(keys) for key in some]
        (self.late,) = _alike({reads_late(environment) for environment in environments})

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: tuple[int, int, int] | int) -> tuple[Any, ...]:
        """The example at a position; of ``(position, step, row)``, augmented by the draws of that row of that step."""
        position, *draw = [index] if isinstance(index, int) else index
        e, key = self.where[position]
        x, y = self._read(self.environments[e], key, draw)
        if not self.with_masks:
            return x, y, position
        return x, y, position, read_mask(self.environments[e], key, self._rng(draw))

    def _read(self, environment: Any, key: int, draw: Sequence[int]) -> tuple[Any, Any]:
        if not self.late:
            if draw and get_worker_info() is not None:  # a worker's generators are in no snapshot
                self._seed_globals(draw)
            x, y = environment[key][:2]
            return x, y
        environment, key = locate(environment, key)
        return environment.read(key, self._rng(draw)), int(environment.y[key])

    def _seed_globals(self, draw: Sequence[int]) -> None:
        """Puts the generators that a dataset's own transforms draw from into the state of a ``(step, row)``."""
        seed = int(np.random.SeedSequence([self.seed, *draw]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _rng(self, draw: Sequence[int]) -> np.random.Generator | None:
        """The generator of a ``(step, row)``, always in its first state: image and mask get equal draws."""
        if not draw:
            return None
        step, row = draw
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 1, row, step]))

    def finish(self, x: Any, device: torch.device | str) -> Tensor:
        """A collated batch of images as the algorithm takes them, on its device."""
        x = _to(x, device)
        if not self.late:
            return x
        leaf: Any = next(leaves(self.environments[0]))  # the environments of a dataset finish alike
        return leaf.finish(x)


def _to(x: Any, device: torch.device | str) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    return [_to(part, device) for part in x]


class _Steps(Sampler[list[tuple[int, int, int]]]):
    """``(position, step, row)`` of the rows of step after step from the first one on, without end."""

    def __init__(self, draw: Callable[[int], Integers], first: int):
        self.draw, self.first = draw, first

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in itertools.count(self.first):
            yield [(position, step, row) for row, position in enumerate(self.draw(step).tolist())]


class TrainingLoader:
    """Endless lists of minibatches, one per part, drawn with replacement.

    Args:
        splits: the training in-splits.
        partition: function of the examples that returns the parts.
        batch_size: rows per training environment; a part gets its share of their sum.
        num_confounders: V.
        seed: of the draws, and of what the partition leaves out.
        class_balanced: draw the classes of a part with equal probability.
        num_workers: the most processes that open images (none for data in memory).
        device: where the minibatches shall be.
        num_environments: the number of training environments; default: that of the splits.
        with_masks: minibatches carry the images' masks.
        odds: (N,) of each example to be drawn, relative to the others of its part; None: all are alike. With
            ``class_balanced`` it is multiplied with what makes the classes of a part equally likely.

    Raises:
        ValueError: the partition does not suit the dataset or the batch size; masks are asked for and not known; odds
            are negative, not finite, not one for each example, or 0 in a whole part.
        NotImplementedError: masks are asked for, and the images pass through a transform.
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
        device: torch.device | str = "cpu",
        num_environments: int | None = None,
        with_masks: bool = False,
        odds: NDArray[np.float64] | None = None,
    ):
        if with_masks:
            _check_masks(splits)
        self.splits, self.seed, self.num_workers, self.device = splits, seed, num_workers, device
        self.with_masks = with_masks
        self.examples = examples_of(splits, num_confounders, seed)
        self.keys = np.concatenate([split.keys for split in splits])
        self.parts = partition(self.examples)
        self.rows = rows_per_part(self.parts, batch_size, num_environments or len(splits))
        self._odds = [_probabilities(part, self.examples, class_balanced, odds) for part in self.parts]

    def group_counts(self, num_classes: int) -> tuple[int, ...]:
        """``group_counts`` of the examples that are drawn from."""
        return group_counts(self.splits, num_classes, self.examples.num_confounders)

    def hidden_counts(self, num_classes: int) -> tuple[int, ...]:
        """Number of examples of each of the K labels whose confounder is hidden; empty where none is known."""
        if self.examples.num_confounders < 2:
            return ()
        hidden = self.examples.y[self.examples.c < 0]
        return tuple(np.bincount(hidden, minlength=num_classes).tolist())

    def draw(self, step: int) -> Integers:
        """Positions (parts * rows,) of step's examples."""
        drawn = []
        for p, (part, odds) in enumerate(zip(self.parts, self._odds, strict=True)):
            rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, p, step]))
            drawn.append(rng.choice(part.positions, self.rows, p=odds))
        return np.concatenate(drawn)

    def __iter__(self) -> Iterator[list[Minibatch]]:
        return self.start_at(0)

    def start_at(self, first: int) -> Iterator[list[Minibatch]]:
        """The minibatches of a step and of all after it."""
        if all(indexes_tensors(split.environment) for split in self.splits):
            for step in itertools.count(first):
                yield self._minibatches(*self._gather(self.draw(step)))
        environments, keys = [split.environment for split in self.splits], [split.keys for split in self.splits]
        items = _Items(environments, keys, self.seed, self.with_masks)
        for x, y, positions, *m in _opened(
            items, self.num_workers, self.device, batch_sampler=_Steps(self.draw, first)
        ):
            yield self._minibatches(items.finish(x, self.device), y, positions, *m)

    def _gather(self, positions: Integers) -> tuple[Tensor, ...]:
        """Images and labels at positions, straight from the environments' tensors; the positions; masks if wanted."""
        e, keys = self.examples.e[positions], self.keys[positions]
        order, pieces = [], []
        for split in self.splits:
            chosen = np.flatnonzero(e == split.env)
            if len(chosen):
                order.append(chosen)
                more: Any = [masks(split.environment, keys[chosen])] if self.with_masks else []
                pieces.append((*split.environment[torch.from_numpy(keys[chosen])], *more))
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        x, y, *m = (torch.cat(column)[back] for column in zip(*pieces, strict=True))
        return x, y, torch.from_numpy(positions), *m

    def _minibatches(self, x: Tensor, y: Tensor, positions: Tensor, m: Tensor | None = None) -> list[Minibatch]:
        c, e, i = (torch.from_numpy(a)[positions] for a in (self.examples.c, self.examples.e, self.keys))
        g = torch.where(c < 0, -1, y * self.examples.num_confounders + c)
        columns = {"c": c, "g": g, "e": e, "i": i} | ({} if m is None else {"m": m})
        parts = {name: column.split(self.rows) for name, column in columns.items()}
        pairs = zip(x.split(self.rows), y.split(self.rows), strict=True)
        minibatches = (Minibatch(*xy, **{name: part[p] for name, part in parts.items()}) for p, xy in enumerate(pairs))
        return [minibatch.to(self.device) for minibatch in minibatches]


def _probabilities(
    part: Part, examples: Examples, class_balanced: bool, odds: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    """With what probabilities (n,) a part's examples are drawn; None: all are alike."""
    balance = balanced_weights(examples.y[part.positions]) if class_balanced else None
    if odds is None:
        return balance
    if odds.shape != examples.c.shape:
        raise ValueError(f"odds of shape {odds.shape}: give one for each of the {len(examples.c)} training examples")
    own = odds[part.positions]
    if not (np.isfinite(own).all() and own.min() >= 0 and own.max() > 0):
        found = f"from {own.min()} to {own.max()}"
        raise ValueError(f"the odds of {part.name} are {found}; give finite ones of at least 0, not all of them 0")
    own = own / own.max() * (1.0 if balance is None else balance)
    return own / own.sum()


def _check_masks(splits: Sequence[Split]) -> None:
    if unknown := [split.env for split in splits if not has_masks(split.environment)]:
        raise ValueError(f"no masks are known of the environments {unknown}; give --mask_dir, the folder of your own")
    for split in splits:
        refuse_transforms(split.environment)


def _opened(items: _Items, num_workers: int, device: torch.device | str, **order: Any) -> Iterator[Any]:
    """Batches of items, as their processes open them; the order is drawn from a generator of its own, not torch's."""
    cuda = torch.device(device).type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        items,
        num_workers=workers(num_workers),
        pin_memory=cuda,
        generator=torch.Generator().manual_seed(items.seed),
        **order,
    )
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # workers inherit it: requests to end are for us
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def evaluation_batches(
    environment: Any, keys: Integers, num_workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) on the device and labels (B,) of an environment at keys, once, in their order."""
    if indexes_tensors(environment):
        for some in torch.from_numpy(keys).split(EVALUATION_BATCH):
            x, y = environment[some]
            yield x.to(device), y
        return
    items = _Items([environment], [keys])
    for x, y, _ in _opened(items, num_workers, device, batch_size=EVALUATION_BATCH):
        yield items.finish(x, device), y


def workers(most: int) -> int:
    """How many loader processes to start: never more than there are cores, and none where there is one."""
    cores = machine.cores()
    return 0 if cores == 1 else min(most, cores)

"""Loaders that start their workers once: endless minibatches for training, repeated single passes for evaluation."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from domainbed import machine


def _num_workers(dataset: Any, wanted: int) -> int:
    """Workers worth starting: none for tensors in memory (sending costs more than indexing), at most one per core."""
    while hasattr(dataset, "underlying_dataset"):  # splits
        dataset = dataset.underlying_dataset
    return 0 if isinstance(dataset, TensorDataset) else min(wanted, machine.cores())


class _InfiniteSampler(Sampler):
    """Passes over a sampler again and again."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class InfiniteDataLoader:
    """Endless minibatches of exactly ``batch_size`` examples, drawn with replacement.

    Workers start, and prefetch, in the constructor.

    Args:
        dataset: has a length and items that can be collated.
        weights: (N,) sampling weights, or None for equal ones.
        batch_size: examples of a minibatch; with replacement it may exceed the dataset.
        num_workers: worker processes wanted; tensors in memory get none, other data at most one per core.

    Raises:
        ValueError: the dataset is empty or, without replacement, smaller than a minibatch.
    """

    REPLACEMENT: ClassVar[bool] = True

    def __init__(self, dataset: Any, weights: Sequence[float] | Tensor | None, batch_size: int, num_workers: int):
        size = len(dataset)
        if size < (1 if self.REPLACEMENT else batch_size):
            raise ValueError(
                f"a minibatch of {batch_size} can't be drawn from {size} examples"
                f"{'' if self.REPLACEMENT else ' without replacement'}; choose a smaller batch_size or a larger split"
            )
        sampler: Sampler
        if weights is not None:
            sampler = WeightedRandomSampler(weights, num_samples=batch_size, replacement=self.REPLACEMENT)  # type: ignore[arg-type]
        elif self.REPLACEMENT:  # a pass must hold a whole minibatch, or the endless sampler would spin
            sampler = RandomSampler(dataset, replacement=True, num_samples=max(size, batch_size))
        else:
            sampler = RandomSampler(dataset)
        batches = _InfiniteSampler(BatchSampler(sampler, batch_size, drop_last=True))
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=_num_workers(dataset, num_workers))
        self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self._iterator

    def __len__(self) -> int:
        raise ValueError("an endless loader has no length; count your steps")


class InfiniteDataLoaderWithoutReplacement(InfiniteDataLoader):
    """Endless minibatches; no example comes twice within a pass. What is left of a pass after the last is dropped."""

    REPLACEMENT = False


class FastDataLoader(DataLoader):
    """Each iteration is one shuffled pass over the whole dataset; workers stay alive between passes.

    Args:
        dataset: has a length and items that can be collated.
        batch_size: examples of a minibatch; the last may be smaller.
        num_workers: worker processes wanted; tensors in memory get none, other data at most one per core.
    """

    def __init__(self, dataset: Any, batch_size: int, num_workers: int):
        workers = _num_workers(dataset, num_workers)
        super().__init__(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

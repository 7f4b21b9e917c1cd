"""Which examples share a minibatch: functions of the training splits' arrays that return the parts."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainbed.registry import Registry

Integers = NDArray[np.int64]

ADVICE = (
    "take another dataset, name a confounder (a CSV file's column, --confounders), or take an algorithm and a "
    "partition that need none"
)

REGISTRY: Registry[Any] = Registry("partition", ("environment", "random", "group", "confounder"))
register = REGISTRY.register


@dataclass(frozen=True)
class Examples:
    """The training examples of all splits one after the other, as aligned arrays (N,) int64.

    Attributes:
        labels: gives ``y``, the labels in [0, K), when they are first asked for: some datasets must open every image.
        c: confounder values in [0, V); -1 where the annotation budget hides them.
        e: environments.
        num_confounders: V; 1 where no confounder is known.
        seed: of partitions that leave some examples out.
    """

    labels: Callable[[], Integers]
    c: Integers
    e: Integers
    num_confounders: int
    seed: int = 0

    @functools.cached_property
    def y(self) -> Integers:
        return self.labels()

    @property
    def g(self) -> Integers:
        """Groups y * V + c; -1 where the confounder is hidden."""
        return np.where(self.c < 0, -1, self.y * self.num_confounders + self.c)


class Part(NamedTuple):
    """One part of the partition: a name for messages, and the positions (n,) of its examples."""

    name: str
    positions: Integers


def _by_value(name: str, values: Integers) -> list[Part]:
    return [Part(f"{name} {value}", np.flatnonzero(values == value)) for value in np.unique(values[values >= 0])]


def _require_confounder(partition: str, examples: Examples) -> None:
    if examples.num_confounders < 2:
        raise ValueError(f"partition {partition} needs a dataset that knows its confounder; {ADVICE}")
    known = np.unique(examples.c[examples.c >= 0])
    if not len(known):
        raise ValueError(f"partition {partition} needs annotated images; the annotation budget leaves none, raise it")
    if len(known) == 1:
        raise ValueError(
            f"partition {partition}: the confounder is {known[0]} in all annotated training images, so that it can't "
            "tell groups apart; take environment or random, other --test_envs, or a larger annotation budget"
        )


@register
def environment(examples: Examples) -> list[Part]:
    """One minibatch per training environment, as DomainBed has it (the paper's Uniform Env.)."""
    return _by_value("environment", examples.e)


@register
def random(examples: Examples) -> list[Part]:
    """One minibatch, the natural mix of all training examples (the paper's Random)."""
    return [Part("all examples", np.arange(len(examples.c)))]


@register
def group(examples: Examples) -> list[Part]:
    """One minibatch per non-empty group: the uniform-group sampler (the paper's Uniform Group)."""
    _require_confounder("group", examples)
    return _by_value("group", examples.g)


@register
def confounder(examples: Examples) -> list[Part]:
    """One minibatch per confounder value that occurs."""
    _require_confounder("confounder", examples)
    return _by_value("confounder", examples.c)


def rows_per_part(parts: Sequence[Part], batch_size: int, num_environments: int) -> int:
    """Rows that each part gets, so that a step draws about batch_size x training environments examples in all.

    Raises:
        ValueError: batch_size is not positive, or two rows of each part exceed twice that number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: a step draws at least one example of each part")
    if len(parts) == num_environments:
        return batch_size
    nominal = batch_size * num_environments
    rows = max(2, round(nominal / len(parts)))
    if rows * len(parts) > 2 * nominal:
        needed = math.ceil(len(parts) / num_environments)
        raise ValueError(
            f"batch_size {batch_size} x {num_environments} environments is too small for {len(parts)} parts "
            f"({parts[0].name} to {parts[-1].name}) of two rows each; take a batch_size of at least {needed}"
        )
    return rows

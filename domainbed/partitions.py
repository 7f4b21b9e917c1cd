"""Which examples share a minibatch: functions of the training splits' arrays that return the parts.

Where the annotation budget hides confounders, "not annotated" counts as one more confounder value: no image is lost.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainbed.registry import Registry
from domainbed.seeding import seed_hash

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

ADVICE = (
    "take another dataset, name a confounder (a CSV file's column, --confounders), or take an algorithm and a "
    "partition that need none"
)

REGISTRY: Registry[Any] = Registry(
    "partition", ("environment", "random", "group", "confounder", "label", "group_subset", "label_subset")
)
register = REGISTRY.register

BY_CONFOUNDER = ("group", "confounder", "group_subset")  # of REGISTRY: those that a dataset without one can't have
SINGLE_PART = ("random", "group_subset", "label_subset")  # those that make one minibatch
FEW = 10  # images of each group; a warning says so if a subset keeps fewer


@dataclass(frozen=True)
class Examples:
    """The training examples of all splits one after the other, as aligned arrays (N,) int64.

    Attributes:
        labels: gives ``y``, the labels in [0, K), when they are first asked for: some datasets must open every image.
        c: confounder values in [0, V); -1 where the annotation budget hides them.
        e: environments.
        num_confounders: V; 1 where no confounder is known.
        seed: of partitions that leave some examples out: the run's.
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


def _by_value(name: str, values: Integers, suffix: str = "") -> list[Part]:
    """A part per value that occurs; examples whose value is negative are in none."""
    return [
        Part(f"{name} {value}{suffix}", np.flatnonzero(values == value)) for value in np.unique(values[values >= 0])
    ]


def _check_confounder(partition: str, examples: Examples) -> None:
    if examples.num_confounders < 2:
        raise ValueError(f"partition {partition} needs a dataset that knows its confounder; {ADVICE}")
    values = np.unique(examples.c)  # -1: not annotated
    if len(values) == 1 and values[0] >= 0:
        raise ValueError(
            f"partition {partition}: the confounder is {values[0]} in all training images, so that it can't "
            "tell groups apart; take environment, label or random, or other --test_envs"
        )


def _report_hidden(partition: str, examples: Examples, parts: list[Part]) -> list[Part]:
    """The parts; where the budget hides confounders, a log line says what they are then."""
    if hidden := int((examples.c < 0).sum()):
        names = "; ".join(f"{part.name} ({len(part.positions)})" for part in parts)
        share = f"{hidden} of {len(examples.c)} training images"
        logger.info("partition %s: the confounder of %s is hidden; divided by: %s", partition, share, names)
    return parts


def _groups(partition: str, examples: Examples) -> list[Part]:
    _check_confounder(partition, examples)
    hidden = np.where(examples.c < 0, examples.y, -1)
    parts = _by_value("group", examples.g) + _by_value("label", hidden, ", confounder not annotated")
    return _report_hidden(partition, examples, parts)


def _subset(partition: str, parts: Sequence[Part], seed: int) -> list[Part]:
    """One part: of each of the parts equally many examples, as many as the smallest has, drawn once."""
    smallest = min(parts, key=lambda part: len(part.positions))
    n = len(smallest.positions)
    if n < FEW:
        logger.warning(
            "partition %s keeps %d images of each of %d parts, as many as %s has; "
            "to train on all images, balanced, take --partition %s",
            partition, n, len(parts), smallest.name, partition.removesuffix("_subset"),
        )  # fmt: skip
    rng = np.random.default_rng(seed_hash("subset", seed))  # of its own: no other draw changes
    chosen = [rng.choice(part.positions, n, replace=False) for part in parts]
    return [Part(f"{n} of each {partition.removesuffix('_subset')}", np.sort(np.concatenate(chosen)))]


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
    """One minibatch per non-empty group: the uniform-group sampler (the paper's Uniform Group).

    The images of a label whose confounder is not annotated are a group of their own.
    """
    return _groups("group", examples)


@register
def confounder(examples: Examples) -> list[Part]:
    """One minibatch per confounder value that occurs, and one of the images that are not annotated."""
    _check_confounder("confounder", examples)
    hidden = np.flatnonzero(examples.c < 0)
    parts = _by_value("confounder", examples.c) + [Part("confounder not annotated", hidden)] * (len(hidden) > 0)
    return _report_hidden("confounder", examples, parts)


@register
def label(examples: Examples) -> list[Part]:
    """One minibatch per label that occurs."""
    return _by_value("label", examples.y)


@register
def group_subset(examples: Examples) -> list[Part]:
    """One minibatch, of a subset drawn once: as many images of each group (see ``group``) as the smallest has."""
    return _subset("group_subset", _groups("group_subset", examples), examples.seed)


@register
def label_subset(examples: Examples) -> list[Part]:
    """One minibatch, of a subset drawn once: as many images of each label as the rarest has."""
    return _subset("label_subset", label(examples), examples.seed)


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

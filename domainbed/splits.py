"""Environments -> in-, out- and uda-splits: which images are trained on, held out, tested, annotated."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainbed.datasets.base import Integers, MultipleDomainDataset, confounders
from domainbed.lib import misc

BUDGETS = {"training": "annotation_budget", "validation": "validation_budget"}  # flags


@dataclass(frozen=True)
class Split:
    """Some examples of one environment.

    Attributes:
        env: the environment's number e.
        kind: "in" (trained on, or tested), "out" (held out), "uda" (unlabelled).
        environment: the whole environment.
        keys: (N,) the examples' positions in it.
        number: the number in its record keys: e, but DomainBed counts the uda-splits from 0.
        annotated: (N,) whether training, or selection, may know the example's confounder; None: of all.
        inferred: (N,) what stands for the confounders in training, where nobody annotated them.
    """

    env: int
    kind: str
    environment: Any
    keys: Integers
    number: int
    annotated: NDArray[np.bool_] | None = None
    inferred: Integers | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def y(self) -> Integers:
        """The labels (N,); asked for once, since some environments must open every image for theirs."""
        return misc.labels(self.environment)[self.keys]

    @property
    def c(self) -> Integers:
        """The confounder values (N,) that the budget grants; -1 where they are not annotated."""
        known = confounders(self.environment)[self.keys] if self.inferred is None else self.inferred
        return known if self.annotated is None else np.where(self.annotated, known, -1)

    def only_annotated(self) -> "Split":
        """The examples whose confounder the budget grants."""
        if self.annotated is None:
            return self
        return dataclasses.replace(self.at(self.annotated), annotated=None)

    def at(self, positions: Any) -> "Split":
        """The examples at positions, a slice, a mask (N,) or numbers, with what is known of them."""
        annotated = None if self.annotated is None else self.annotated[positions]
        inferred = None if self.inferred is None else self.inferred[positions]
        return dataclasses.replace(self, keys=self.keys[positions], annotated=annotated, inferred=inferred)


def split_environments(
    dataset: MultipleDomainDataset,
    test_envs: Sequence[int],
    holdout_fraction: float,
    uda_holdout_fraction: float = 0,
    trial_seed: int = 0,
) -> list[Split]:
    """DomainBed's splits: all in-splits, then all non-empty out-splits, then the test environments' uda-splits.

    Environments with ``split_units`` are divided by unit. A dataset with official validation environments is not
    divided at all.

    Raises:
        ValueError: an environment number is out of range, a validation environment is asked for as test
            environment, or nothing is left to train on.
    """
    check_test_envs(dataset, test_envs)
    fraction = 0.0 if dataset.VALIDATION_ENVS else holdout_fraction
    ins: list[Split] = []
    outs: list[Split] = []
    udas: list[Split] = []
    for e, environment in enumerate(dataset):
        seed = misc.seed_hash(trial_seed, e)
        units = getattr(environment, "split_units", None)
        everything = np.arange(len(environment))
        out, rest = _divide(everything, int(len(environment) * fraction), seed, units)
        if e in test_envs:
            uda, rest = _divide(rest, int(len(rest) * uda_holdout_fraction), seed, units)
            if len(uda):
                udas.append(Split(e, "uda", environment, uda, number=len(udas)))
        ins.append(Split(e, "in", environment, rest, e))
        outs.append(Split(e, "out", environment, out, e))
    return [*ins, *filter(len, outs), *udas]


def _divide(keys: Integers, n: int, seed: int, units: Integers | None) -> tuple[Integers, Integers]:
    """The first n (about n, by unit) of the keys in DomainBed's permutation, and the rest."""
    first, second = misc.split_dataset(keys, n, seed, units=None if units is None else list(units[keys]))
    return keys[np.asarray(first.keys, dtype=np.int64)], keys[np.asarray(second.keys, dtype=np.int64)]


def check_test_envs(dataset: MultipleDomainDataset, test_envs: Sequence[int]) -> None:
    """Raises ValueError for test environments that the dataset lacks, or that leave the wrong ones to train on."""
    if len(set(test_envs)) < len(test_envs):
        raise ValueError(f"--test_envs {' '.join(map(str, test_envs))}: name each environment once")
    name, allowed = type(dataset).__name__, [e for e in range(len(dataset)) if e not in dataset.VALIDATION_ENVS]
    for e in test_envs:
        if e not in allowed:
            raise ValueError(f"--test_envs {e}: {name} has the test environments {allowed} ({dataset.ENVIRONMENTS})")
    official = set(dataset.TEST_ENVS or ()) if dataset.VALIDATION_ENVS else set()
    if not official <= set(test_envs):
        raise ValueError(f"--test_envs must contain {sorted(official)}, the official test set of {name}")
    if set(test_envs) >= set(allowed):
        raise ValueError(f"--test_envs {list(test_envs)} leaves no environment of {name} to train on; name fewer")


def training_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """The in-splits of the environments that are trained on."""
    held_out = {*test_envs, *dataset.VALIDATION_ENVS}
    return [split for split in splits if split.kind == "in" and split.env not in held_out]


def validation_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """What selection may look at: the official validation environments, else the training environments' out-splits."""
    if dataset.VALIDATION_ENVS:
        return [split for split in splits if split.kind == "in" and split.env in dataset.VALIDATION_ENVS]
    return [split for split in splits if split.kind == "out" and split.env not in test_envs]


def selection_splits(dataset: MultipleDomainDataset, splits: Sequence[Split], test_envs: Sequence[int]) -> list[Split]:
    """The splits that some selection method or table reads: all but the training environments' in-splits."""
    trained = {split.env for split in training_splits(dataset, splits, test_envs)}
    return [split for split in splits if split.kind != "in" or split.env not in trained]


def annotate(splits: Sequence[Split], budget: float, trial_seed: int = 0, of: str = "training") -> list[Split]:
    """Training or validation splits of which only a share of the images keeps its confounder.

    Which ones is a function of the trial seed, and a larger budget contains a smaller one.

    Args:
        budget: the share, from 0 to 1; all splits together keep ``round(budget * images)``.
        of: "training" or "validation", whose draws are not the same.

    Raises:
        ValueError: the budget is no such share.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"--{BUDGETS[of]} {budget}: give the share of the {of} images, from 0 to 1")
    if budget == 1 or not splits:
        return list(splits)
    ranks = [_annotation_order(split, trial_seed, of) for split in splits]
    order = np.argsort(np.concatenate(ranks), kind="stable")
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[: round(budget * len(order))]] = True
    ends = np.cumsum([len(split) for split in splits])
    return [
        dataclasses.replace(split, annotated=chosen[end - len(split) : end])
        for split, end in zip(splits, ends, strict=True)
    ]


def _annotation_order(split: Split, trial_seed: int, of: str) -> NDArray[np.float64]:
    """A number for each example; those with the smallest ones are annotated first."""
    name = "annotation" if of == "training" else f"{of} annotation"
    rng = np.random.RandomState(misc.seed_hash(name, trial_seed, split.env))
    return rng.random_sample(len(split.environment))[split.keys]

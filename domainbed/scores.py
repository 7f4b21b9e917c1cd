"""Accuracies of groups -> what tables report and selection maximises; all are fractions."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


def aa_wga(aa: float, wga: float) -> float:
    """The score by which the paper chooses a checkpoint: (AA + WGA) / 2.

    Source: eX2L, arXiv 2605.06368, equation 5.
    """
    return (aa + wga) / 2


def adjusted_average(acc: Mapping[int, float], training: Mapping[int, int]) -> float | None:
    """Adjusted average accuracy: the groups' accuracies, each weighted by the group's share of the training images.

    Args:
        acc: accuracy of each non-empty group of what was measured.
        training: training images of each group of this run.

    Returns:
        None where a group of the training images has no accuracy (the weights are not spread over the others), or
        no training image is known.

    Source: Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020, https://arxiv.org/abs/1911.08731,
    for Waterbirds; the weights here are those of the data that the run trained on.
    """
    weights = {g: n for g, n in training.items() if n}
    if not weights or not weights.keys() <= acc.keys():
        return None
    return sum(n * acc[g] for g, n in weights.items()) / sum(weights.values())


def group_mean(acc: Mapping[int, float]) -> float:
    """The unweighted mean over the non-empty groups, of which there must be one."""
    return sum(acc.values()) / len(acc)


class Pooled(NamedTuple):
    """Average and worst-group accuracy of several splits taken as one, fractions: what selection goes by."""

    aa: float
    wga: float


class Granted(NamedTuple):
    """What the validation budget lets selection know of several splits taken as one, fractions.

    AA is over all examples, since their labels are known; WGA is over the annotated ones, None where none is.
    """

    aa: float
    wga: float | None

    def score(self, criterion: Callable[[float, float], float] = aa_wga) -> float:
        """What selection maximises: the criterion of AA and WGA; AA alone where no example is annotated."""
        return self.aa if self.wga is None else criterion(self.aa, self.wga)


class PooledMeans(NamedTuple):
    """Adjusted average accuracy and group mean of several splits taken as one, fractions; None: not to be had."""

    adjusted: float | None
    group_mean: float | None

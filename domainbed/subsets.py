"""Which images of a split are explained: a fixed, seeded subset, and the share of the split that each stands for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domainbed.datasets.base import Integers, confounders
from domainbed.lib.misc import seed_hash
from domainbed.splits import Split


@dataclass(frozen=True)
class Subset:
    """Some images of a split.

    Attributes:
        keys: (n,) their positions in the environment, ascending.
        groups: (n,) int64 g = y * V + c; all 0 where no confounder is known.
        grouped: whether one is known.
        sizes: images of the whole split in each of its groups.
    """

    keys: Integers
    groups: Integers
    grouped: bool
    sizes: Mapping[int, int]

    @property
    def counts(self) -> dict[int, int]:
        """Images of the subset in each group."""
        return {g: int((self.groups == g).sum()) for g in self.sizes}

    @property
    def weights(self) -> NDArray[np.float64]:
        """(n,) the share of the split that each image stands for; their sum is 1.

        The weighted mean over the subset is an unbiased estimate of the mean over the split, although small groups
        are overrepresented in the subset.
        """
        counts, total = self.counts, sum(self.sizes.values())
        shares = {g: size / total / counts[g] for g, size in self.sizes.items()}
        return np.array([shares[int(g)] for g in self.groups])


def choose(split: Split, n: int, seed: int, num_confounders: int) -> Subset:
    """About n images of a split, about as many of each group, but all of a smaller one; at least one of each.

    Which ones is a function of the seed, the environment and the split alone, and a larger n contains a smaller one.

    Args:
        num_confounders: V; 1 where no confounder is known: then they are drawn uniformly.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"{n} images to explain: give 1 or more")
    groups = np.zeros(len(split), dtype=np.int64)
    if num_confounders > 1:
        groups = split.y * num_confounders + confounders(split.environment)[split.keys]
    rng = np.random.RandomState(seed_hash("explained", seed, split.env))
    order = np.argsort(rng.random_sample(len(split.environment))[split.keys], kind="stable")
    sizes = {int(g): int(size) for g, size in zip(*np.unique(groups, return_counts=True), strict=True)}
    firsts = [order[groups[order] == g][:quota] for g, quota in quotas(sizes, n).items()]
    taken = np.concatenate(firsts)
    taken = taken[np.argsort(split.keys[taken])]
    return Subset(split.keys[taken], groups[taken], num_confounders > 1, sizes)


def quotas(sizes: Mapping[int, int], n: int) -> dict[int, int]:
    """How many of each group to take: what small groups can't give is shared by the larger ones; at least one each."""
    found, left = {}, n
    for place, g in enumerate(sorted(sizes, key=lambda g: (sizes[g], g))):
        found[g] = min(sizes[g], max(1, left // (len(sizes) - place)))
        left -= found[g]
    return found

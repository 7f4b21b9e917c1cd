"""Environments composed from a pool: which image goes where, for given proportions or shares of the groups.

Everything here is a function of the pool's arrays, the request and a seed; no image is opened.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from domainbed.datasets.base import ImageEnvironment, InMemoryEnvironment, Integers, MultipleDomainDataset, augments
from domainbed.images import Images
from domainbed.messages import not_found

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Pool = TypeVar("Pool", ImageEnvironment, InMemoryEnvironment)

ROUNDING = 0.01  # how far printed proportions may be from a sum of 1
TOLERANCE = 1e-6  # of an image


def compose(pool: Pool, proportions: ArrayLike, seed: int = 0, sizes: Sequence[int] | None = None) -> list[Pool]:
    """Divides a pool into disjoint environments with given proportions of the groups.

    ``compose(pool, [[[0.4, 0.1], [0.1, 0.4]], [[0.3, 0.2], [0.2, 0.3]]])`` makes two environments; in the first, 40 %
    of the images are of label 0 and confounder 0, 10 % of label 0 and confounder 1.

    Args:
        pool: images with labels y and confounders c.
        proportions: (E, K, V) fractions, each environment's sum is 1 (printed ones may miss it by .01).
        seed: of the permutation of each group.
        sizes: images of each environment; None: the ``largest_sizes``.

    Returns:
        E environments; their counts are the proportions' within one image a group.

    Raises:
        ValueError: the proportions or sizes can't be had from this pool; the message names the group.
    """
    table = np.asarray(proportions, dtype=float)
    if table.ndim != 3:
        raise ValueError(f"proportions have the shape {table.shape}; give a table (environments, labels, confounders)")
    if pool.c is None:
        raise ValueError("the pool knows no confounder; give it an array c")
    if pool.split_units is not None:
        raise ValueError("the pool's images belong together (split_units), and composing would part them")
    groups = group_numbers(pool.y, pool.c, table.shape[1:])
    names = [f"label {y}, confounder {c}" for y, c in np.ndindex(table.shape[1:])]
    return [_taken(pool, keys) for keys in composed(groups, table.reshape(len(table), -1), seed, sizes, names)]


def group_numbers(y: Integers, c: Integers, shape: Sequence[int]) -> Integers:
    """Groups g = y * V + c (N,) of labels and confounders (N,) that must fit a table (K, V)."""
    for name, values, n in (("label", y, shape[0]), ("confounder", c, shape[1])):
        if len(values) and not 0 <= values.min() <= values.max() < n:
            raise ValueError(
                f"the table is for {name}s 0 to {n - 1}, and the pool's go from {values.min()} to {values.max()}"
            )
    return y * shape[1] + c


def _taken(pool: Pool, keys: Integers) -> Pool:
    if isinstance(pool, ImageEnvironment):
        return pool.take(keys)
    x, y = pool.tensors
    masks = None if pool.masks is None else torch.from_numpy(pool.masks[keys])
    return InMemoryEnvironment(x[keys], y[keys], torch.from_numpy(pool.c[keys]), masks=masks)


def composed(
    groups: Integers,
    proportions: ArrayLike,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[Integers]:
    """Positions of the images of each environment; as ``compose``, for groups (N,) and proportions (E, G)."""
    wanted = _checked_proportions(proportions)
    return deal(groups, composed_counts(np.bincount(groups, minlength=wanted.shape[1]), wanted, sizes, names), seed)


def _checked_proportions(proportions: ArrayLike) -> Floats:
    """Proportions (E, G) whose rows are fractions and sum to exactly 1."""
    table = np.asarray(proportions, dtype=float)
    sums = table.sum(axis=1)
    if (table < 0).any() or (abs(sums - 1) > ROUNDING).any():
        raise ValueError(f"proportions are fractions that sum to 1 in each environment; these sum to {sums.round(4)}")
    return table / sums[:, None]


def composed_counts(
    available: ArrayLike,
    proportions: ArrayLike,
    sizes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Integers:
    """Images (E, G) that each environment takes of each group, within one image of the proportions.

    Args:
        available: (G,) images that there are.
        proportions: (E, G).
        sizes: of the environments; None: the largest that fit.
        names: of the groups, for messages.

    Raises:
        ValueError: a group has no image or too few, or an environment would be empty.
    """
    have, wanted = np.asarray(available, dtype=np.int64), _checked_proportions(proportions)
    if len(have) != wanted.shape[1]:
        raise ValueError(f"the pool has {len(have)} groups, the proportions are for {wanted.shape[1]}")
    called = np.array(names or [f"group {g}" for g in range(len(have))])
    if len(empty := called[wanted.any(axis=0) & (have == 0)]):
        raise ValueError(f"the proportions ask for groups of which there is no image: {'; '.join(empty)}")
    if len(few := called[wanted.sum(axis=0) > have + TOLERANCE]):
        raise ValueError(f"too few images for one in each environment of the groups {'; '.join(few)}")
    totals = largest_sizes(have, wanted) if sizes is None else np.asarray(sizes, dtype=np.int64)
    if len(totals) != len(wanted) or (totals < 1).any():
        raise ValueError(f"sizes of the {len(wanted)} environments: {totals.tolist()}; each needs an image or more")
    exact = totals[:, None] * wanted
    if (short := _short(totals, wanted, have)).any():
        raise ValueError(
            f"the sizes {totals.tolist()} need {np.ceil(exact.sum(axis=0)[short]).astype(int).tolist()} images of the "
            f"groups {'; '.join(called[short])}, and there are {have[short].tolist()}; "
            f"{largest_sizes(have, wanted).tolist()} fit"
        )
    counts = rounded(exact, have)
    assert (abs(counts - exact) < 1).all()
    assert (counts.sum(axis=1) == totals).all()
    assert (counts.sum(axis=0) <= have).all()
    return counts


def _short(sizes: Integers, proportions: Floats, available: NDArray[Any]) -> NDArray[np.bool_]:
    """Which groups (G,) have too few images for environments of these sizes."""
    short: NDArray[np.bool_] = sizes @ proportions > available + TOLERANCE
    return short


def rounded(exact: Floats, available: Integers) -> Integers:
    """Whole numbers (E, G) next to the exact ones, nearest first, with their row sums and no more than is available.

    The row sums of the exact numbers must be whole. That such numbers exist, and that the corner in which the simplex
    method ends holds them, is the integrality of transport problems.
    """
    from scipy.optimize import linprog

    (n, m), floor = exact.shape, np.floor(exact + 1e-6)
    up = linprog(
        (floor - exact).ravel(),
        A_ub=np.tile(np.eye(m), n),
        b_ub=available - floor.sum(axis=0),
        A_eq=np.kron(np.eye(n), np.ones(m)),
        b_eq=np.round(exact.sum(axis=1)) - floor.sum(axis=1),
        bounds=np.stack([np.zeros(n * m), (exact - floor).ravel() > 1e-6], axis=1),
        method="highs-ds",
    )
    assert up.success, up.message
    return (floor + np.round(up.x).reshape(n, m)).astype(np.int64)


def largest_sizes(available: ArrayLike, proportions: Floats) -> Integers:
    """Sizes (E,) with the largest sum for which the groups suffice.

    No environment is empty, or smaller than half the size that all could have alike; of several solutions the one
    whose smallest environment is largest. One image for each environment must fit.
    """
    from scipy.optimize import linprog  # half a second to import

    have, n = np.asarray(available, dtype=float), len(proportions)
    alike = _most(have, proportions.sum(axis=0))
    least = min(max(alike / 2, 1), alike) * (1 - 1e-9)
    # The unknowns are fractions of the sizes that the environments could have alone, and the groups' rows fractions of
    # what there is: else the solver's tolerances would swallow small proportions.
    alone = np.array([_most(have, row) for row in proportions])
    used = (proportions * alone[:, None]).T[have > 0] / have[have > 0, None]
    total = -alone / alone.max()
    fractions = (np.minimum(least / alone, 1)[:, None] * [1, 0]) + [0, 1]
    room = linprog(total, A_ub=used, b_ub=np.ones(len(used)), bounds=fractions)
    # Second programme, in (fractions, their environments' smallest size / alike): keep the sum, raise the smallest.
    bounds = np.block([[used, np.zeros((len(used), 1))], [-np.eye(n), alike / alone[:, None]], [total, 0]])
    limits = [*np.ones(len(used)), *np.zeros(n), room.fun + 1e-10]
    even = linprog([*np.zeros(n), -1], A_ub=bounds, b_ub=limits, bounds=[*fractions, (0, None)])
    sizes = np.floor((even if even.success else room).x[:n] * alone + 1e-5).astype(np.int64)
    return _fitted(np.maximum(sizes, 1), proportions, have)


def _most(available: Floats, needed: Floats) -> float:
    """The largest factor of what is needed (G,) for which there is enough."""
    return float((available[needed > 0] / needed[needed > 0]).min())


def _fitted(sizes: Integers, proportions: Floats, available: Floats) -> Integers:
    """Sizes (E,) that fit; those given may be too large by the solver's tolerance."""
    while (short := _short(sizes, proportions, available)).any():
        use = sizes * proportions[:, short.argmax()]
        sizes[np.where(sizes > 1, use, -1).argmax()] -= 1
    return sizes


def largest_remainder(exact: Floats) -> Integers:
    """Whole numbers next to the exact ones whose sum is theirs (rounded); ties go to the first."""
    counts = np.floor(exact + 1e-9).astype(np.int64)
    missing = round(exact.sum()) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def deal(groups: Integers, counts: Integers, seed: int) -> list[Integers]:
    """Deals the images of each group out at random: sorted positions of counts[e, g] images for each environment e.

    A group's permutation depends on the seed, its number and its images only.
    """
    parts: list[list[Integers]] = [[] for _ in counts]
    for g in range(counts.shape[1]):
        order = np.random.default_rng([seed, g]).permutation(np.flatnonzero(groups == g))
        for part, piece in zip(parts, np.split(order, np.cumsum(counts[:, g])), strict=False):
            part.append(piece)
    dealt = [np.sort(np.concatenate(part)) for part in parts]
    found = np.stack([np.bincount(groups[part], minlength=counts.shape[1]) for part in dealt])
    assert np.array_equal(found, counts), "an environment's groups are not those that were asked for"
    return dealt


def divide(groups: Integers, shares: ArrayLike, seed: int = 0) -> list[Integers]:
    """Divides each group in given shares among environments: sorted positions of each environment.

    Args:
        groups: (N,) in [0, G).
        shares: (E, G) fractions of each group that an environment gets; a column's sum is at most 1, and where it is
            1 every image is dealt.
        seed: of the permutation of each group.
    """
    return deal(groups, divided_counts(np.bincount(groups, minlength=np.shape(shares)[1]), shares), seed)


def divided_counts(available: ArrayLike, shares: ArrayLike) -> Integers:
    """Images (E, G) that each environment gets when groups of the available sizes (G,) are divided in shares (E, G)."""
    have, table = np.asarray(available, dtype=np.int64), np.asarray(shares, dtype=float)
    if table.ndim != 2 or len(have) != table.shape[1]:
        raise ValueError(f"shares have the shape {table.shape}; give a table (environments, {len(have)} groups)")
    if (table < 0).any() or (table.sum(axis=0) > 1 + 1e-9).any():
        raise ValueError(f"a group's shares are fractions with a sum of at most 1; here {table.sum(axis=0).tolist()}")
    return np.stack([largest_remainder(column) for column in (table * have).T], axis=1)


def stratified_split(groups: Integers, fractions: Sequence[float], seed: int) -> list[Integers]:
    """Divides examples at random into parts that hold every class (or group) in the same proportions.

    Args:
        groups: (N,) class or group of each example.
        fractions: of each part, each above 0; their sum is 1.
        seed: of the permutation of each group.

    Returns:
        Sorted positions of each part; a group with at least as many examples as there are parts is in all of them.

    Raises:
        ValueError: the fractions are no such fractions.
    """
    if min(fractions, default=0) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {list(fractions)}: give one above 0 for each part, with the sum 1")
    available = np.bincount(groups)
    counts = divided_counts(available, np.outer(fractions, np.ones(len(available))) / sum(fractions))
    for g in np.flatnonzero(available >= len(fractions)):
        while (counts[:, g] == 0).any():
            counts[counts[:, g].argmax(), g] -= 1
            counts[counts[:, g].argmin(), g] += 1
    return deal(groups, counts, seed)


class ComposedDataset(MultipleDomainDataset):
    """Two training environments composed of an official training split; the official validation and test splits.

    Hparams:
        environments: "shares": each group of the training split is divided in SHARES among the two environments;
            "subsample": their groups have the PROPORTIONS, with as many images of the training split as fit;
            "pooled": the groups of all splits together are divided in SHARES, so that training sees validation and
            test images.
        data_seed: of the permutations.

    Class attributes:
        SHARES: (2, K, V) fraction of each group that an environment gets.
        PROPORTIONS: (2, K, V) fraction of an environment that each group makes up.
        PUBLISHED_COUNTS: of the official splits, of which these files' are in ``split_counts``.
    """

    VALIDATION_ENVS = (2,)
    TEST_ENVS = (3,)
    HPARAMS = {"environments": "shares", "data_seed": 0}
    NEEDS_DATA_DIR = True
    SPLITS = ("train", "validation", "test")
    READINGS = ("shares", "subsample", "pooled")
    SHARES: ClassVar[Any]
    PROPORTIONS: ClassVar[Any]

    split_counts: Mapping[str, tuple[int, ...]]

    def lay_out(
        self, images: Images, splits: Integers, y: Integers, c: Integers, by: Integers, hparams: Mapping[str, Any]
    ) -> None:
        """Sets environments, shape, number of classes and ``split_counts``.

        Args:
            images: the pool, with the source of its metadata; the arrays are aligned with it.
            splits: (N,) 0 train, 1 validation, 2 test.
            y, c: (N,) labels and confounders.
            by: (N,) the confounder of SHARES and PROPORTIONS.
            hparams: of the run.

        Raises:
            ValueError: a split or an environment has no image, the confounder never varies in training, or the
                environments can't be composed of what there is.
        """
        self.input_shape, self.num_classes = (3, images.size, images.size), len(self.CLASSES)
        official = [np.flatnonzero(splits == split) for split in range(len(self.SPLITS))]
        g = y * len(self.CONFOUNDERS) + c
        counts = (np.bincount(g[keys], minlength=self.num_classes * len(self.CONFOUNDERS)) for keys in official)
        self.split_counts = {name: tuple(n.tolist()) for name, n in zip(self.SPLITS, counts, strict=True)}
        self._check(images.source, official, c)
        environments = [*self._training(official[0], y * np.shape(self.SHARES)[2] + by, hparams), *official[1:]]
        if empty := [name for name, keys in zip(self.ENVIRONMENTS or (), environments, strict=True) if not len(keys)]:
            raise ValueError(f"{type(self).__name__}: too few training images; none is left for {', '.join(empty)}")
        pool = ImageEnvironment(images, np.arange(len(images)), y, c)
        self.datasets = [pool.take(keys, augment=e < 2 and augments(hparams)) for e, keys in enumerate(environments)]

    def _check(self, source: Path | None, official: Sequence[Integers], c: Integers) -> None:
        name = type(self).__name__
        if empty := [split for split, keys in zip(self.SPLITS, official, strict=True) if not len(keys)]:
            raise ValueError(f"{name}: {source} gives no image to {' and '.join(empty)}; is the file whole?")
        require_variation(source, c[official[0]], self.CONFOUNDERS)

    def _training(self, train: Integers, groups: Integers, hparams: Mapping[str, Any]) -> list[Integers]:
        """Positions of the training environments' images, by the reading that the hparams name."""
        reading, seed = hparams.get("environments", self.HPARAMS["environments"]), hparams.get("data_seed", 0)
        if reading not in self.READINGS:
            raise ValueError(not_found("reading of the hparam environments", str(reading), self.READINGS))
        shares = np.reshape(self.SHARES, (2, -1))
        if reading == "pooled":
            logger.warning(
                "%s, environments pooled: training sees images of the validation and test splits, so that its "
                "accuracies on them are no estimates of anything; use it to rebuild printed tables only",
                type(self).__name__,
            )
            return divide(groups, shares, seed)
        if reading == "shares":
            return [train[keys] for keys in divide(groups[train], shares, seed)]
        names = [f"{label}, {by}" for label in self.CLASSES for by in type(self).CONFOUNDERS]  # those of PROPORTIONS
        try:
            parts = composed(groups[train], np.reshape(self.PROPORTIONS, (2, -1)), seed, names=names)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__}, environments {reading}: {error}; complete the release's training split, or "
                """take --hparams '{"environments": "shares"}'"""
            ) from error
        return [train[keys] for keys in parts]


def require_variation(source: Path | None, c: Integers, names: Sequence[str]) -> None:
    """Raises ValueError if the confounder of all training images c (N,) is one of its names (V,)."""
    if len(values := np.unique(c)) == 1:
        raise ValueError(
            f"{source}: all training images have the confounder {names[values[0]]!r}; there is nothing spurious to "
            "learn: choose another one, or look whether the file is whole"
        )

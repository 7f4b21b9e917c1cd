"""What a user should know of the data before training starts, as log messages."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domainbed.datasets.base import Integers, MultipleDomainDataset
from domainbed.loaders import group_counts
from domainbed.splits import Split

logger = logging.getLogger(__name__)


def report_release(dataset: MultipleDomainDataset) -> None:
    """Warns if there are more or fewer images than the official release is known to have."""
    sizes = dict(zip(dataset.ENVIRONMENTS or (), map(len, dataset), strict=False)) | {"all": sum(map(len, dataset))}
    sizes |= {name: int(np.sum(counts)) for name, counts in getattr(dataset, "split_counts", {}).items()}
    published = {name: int(np.sum(counts)) for name, counts in dataset.PUBLISHED_COUNTS.items() if name in sizes}
    differing = [f"{name}: {sizes[name]} images, {n} published" for name, n in published.items() if sizes[name] != n]
    if differing:
        logger.warning("%s is not the official release here: %s", type(dataset).__name__, "; ".join(differing))


def report_unseen(dataset: Any, trained: Sequence[Split], tested: Sequence[Split]) -> None:
    """Says which groups of the test environments training never shows."""
    shown, asked = (_counts(dataset, splits) for splits in (trained, tested))
    if len(unseen := np.flatnonzero((asked > 0) & (shown == 0))):
        names = _names(dataset, unseen)
        logger.info("%d of %d test groups never occur in training: %s", len(unseen), (asked > 0).sum(), names)


def report_budget(splits: Sequence[Split]) -> None:
    """Says how many training images keep their confounder, if not all do."""
    if any(split.annotated is not None for split in splits):
        kept = sum(int((split.c >= 0).sum()) for split in splits)
        logger.info("%d of %d training images keep their confounder", kept, sum(map(len, splits)))


def report_not_annotated(dataset: Any, trained: Sequence[Split], known: Sequence[Split]) -> None:
    """Warns of groups of the training images that nothing can balance, since the budget annotates only others.

    It looks at annotations that the budget hides, for this message alone.
    """
    present, annotated = (_counts(dataset, splits) for splits in (trained, known))
    lost = np.flatnonzero((present > 0) & (annotated == 0))
    if len(lost) and annotated.any():
        names = _names(dataset, lost)
        logger.warning("no image is annotated of %d training group(s): %s; raise the budget", len(lost), names)


def report_inferred(num_confounders: int, agreement: Mapping[str, float]) -> None:
    """Says how many values pseudo-confounders have, and how far they are the true ones, where these are known."""
    found = ", ".join(f"{name} {value:.2f}" for name, value in agreement.items()) or "no true ones are known"
    logger.info("pseudo-confounders: %d values; agreement with the true ones: %s", num_confounders, found)


def _counts(dataset: Any, splits: Sequence[Split]) -> Integers:
    return np.asarray(group_counts(splits, dataset.num_classes, dataset.num_confounders), dtype=np.int64)


def _names(dataset: Any, groups: Integers) -> str:
    return "; ".join(map(dataset.group_name, groups.tolist()))

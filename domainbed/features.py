"""What an algorithm's last linear layer is given, for a fixed subset of test and held-out images; its scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domainbed import feature_scores, subsets
from domainbed.datasets.base import Integers, confounders
from domainbed.feature_maps import evaluating
from domainbed.feature_scores import Floats, Score
from domainbed.loaders import evaluation_batches
from domainbed.splits import Split

IMAGES = 2000
CONSTANT = 1e-6  # a feature whose std is at most this share of its mean is a constant with float32's rounding


@dataclass(frozen=True)
class Features:
    """Penultimate features of test images, then of held-out images that are distributed as the training images are.

    Attributes:
        x: (n, D).
        y, c, e: (n,) label, confounder (0 where none is known) and environment.
        tested: (n,) which are test images.
        grouped: whether a confounder is known.
    """

    x: Floats
    y: Integers
    c: Integers
    e: Integers
    tested: NDArray[np.bool_]
    grouped: bool


@contextmanager
def penultimate(algorithm: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Images (B, C, H, W) -> their penultimate features (B, D): ``with penultimate(algorithm) as features: ...``.

    They are what the last ``nn.Linear`` that ``predict`` runs is given, if it turns (B, D) into the logits' (B, K);
    else, where the head is something else, what the algorithm's ``featurizer`` gives. So any class written for
    DomainBed will do that has either, however its networks are named. It is in evaluation mode meanwhile.
    """
    seen: dict[str, Any] = {}

    def note_linear(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen["given"], seen["made"] = inputs[0], output

    def note_featurizer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen["featurizer"] = output

    def features(x: Tensor) -> Tensor:
        seen.clear()
        return _taken(algorithm, seen, algorithm.predict(x))

    linears = [module for module in algorithm.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(note_linear) for module in linears]
    if isinstance(featurizer := getattr(algorithm, "featurizer", None), nn.Module):
        handles.append(featurizer.register_forward_hook(note_featurizer))
    try:
        with evaluating(algorithm), torch.no_grad():
            yield features
    finally:
        for handle in handles:
            handle.remove()


def _taken(algorithm: Any, seen: Mapping[str, Any], logits: Tensor) -> Tensor:
    given, featurizer = seen.get("given"), seen.get("featurizer")
    if isinstance(given, Tensor) and given.ndim == 2 and seen["made"].shape == logits.shape:
        return given
    if isinstance(featurizer, Tensor) and featurizer.ndim == 2:
        return featurizer
    raise ValueError(
        f"{type(algorithm).__name__} has no penultimate features: its predict ends in no nn.Linear that gives the "
        "logits, and runs no attribute `featurizer` that gives (B, D); make its head an nn.Linear, or name the network "
        "before the head featurizer"
    )


def collect(
    algorithm: Any,
    tested: Sequence[Split],
    held_out: Sequence[Split],
    num_confounders: int,
    device: torch.device,
    n: int = IMAGES,
    seed: int = 0,
    num_workers: int = 0,
) -> Features:
    """The features of about n test images and about n held-out ones; which ones depends on seed and splits alone.

    Both are shared evenly by their splits, and within a split by its groups as far as small ones go
    (``subsets.choose``): rare groups are about as visible as frequent ones, and label and confounder tell less of each
    other than they do in all images.

    Args:
        tested: in-splits of the test environments.
        held_out: what validation uses (``splits.validation_splits``); may be empty.

    Raises:
        ValueError: n is below 1; the algorithm has no such features, or they are not finite.
    """
    columns: list[tuple[NDArray[Any], ...]] = []
    with penultimate(algorithm) as features:
        for some, test in ((tested, True), (held_out, False)):
            for split in some:
                keys = subsets.choose(split, max(1, n // len(some)) if n > 0 else n, seed, num_confounders).keys
                batches = evaluation_batches(split.environment, keys, num_workers, device)
                found = [(features(x).float().cpu().numpy(), np.asarray(y.cpu())) for x, y in batches]
                x, y = (np.concatenate(column) for column in zip(*found, strict=True))
                c, e = confounders(split.environment)[keys], np.full(len(keys), split.env)
                columns.append((x, y, c, e, np.full(len(keys), test)))
    x, y, c, e, is_test = (np.concatenate(column) for column in zip(*columns, strict=True))
    if not np.isfinite(x).all():
        raise ValueError(f"{type(algorithm).__name__}'s features are not finite (did it diverge?); leave this run out")
    return Features(x, y, c, e, is_test, num_confounders > 1)


def scores(found: Features, x: Floats, metric: str = "cosine", seed: int = 0) -> dict[str, Score]:
    """All scores of ``feature_scores`` by name, of the features or of an embedding x (n, d) of them.

    Those of label and confounder are of the test images alone; those of the environment, and the distance of test and
    held-out images, of all.
    """
    test = found.tested
    values: Mapping[str, tuple[Floats, Integers]] = {
        "label": (x[test], found.y[test]),
        "confounder": (x[test], found.c[test]),
        "environment": (x, found.e),
    }
    named = {f"silhouette {name}": feature_scores.silhouette(*pair, metric) for name, pair in values.items()}
    named |= {f"purity {name}": feature_scores.purity(*pair, metric) for name, pair in values.items()}
    named |= {f"probe {name}": feature_scores.probe(*pair, seed) for name, pair in values.items()}
    return named | {
        "probe confounder given label": feature_scores.probe_given(x[test], found.c[test], found.y[test], seed),
        "proxy A-distance": feature_scores.proxy_a_distance(x, test, seed),
    }


def label_alone(found: Features, seed: int = 0) -> Floats:
    """(n, K): features that hold the label and, beside it, only a little noise: what it alone says of the rest."""
    values, inverse = np.unique(found.y, return_inverse=True)
    noise = np.random.default_rng(seed).normal(scale=0.01, size=(len(inverse), len(values)))
    made: Floats = np.eye(len(values))[inverse] + noise
    return made


def project(x: Floats) -> Floats:
    """(n, 2): the two directions in which standardised features (n, D) vary most; those that only round are left 0."""
    precise = np.asarray(x, dtype=np.float64)
    mean, std = precise.mean(axis=0), precise.std(axis=0)
    varies = std > CONSTANT * np.abs(mean)
    scaled = np.where(varies, (precise - mean) / np.where(varies, std, 1.0), 0.0)
    _, _, directions = np.linalg.svd(scaled, full_matrices=False)
    found: Floats = scaled @ directions[:2].T
    return found


def embed(x: Floats, seed: int = 0) -> Floats:
    """(n, 2): UMAP of features (n, D) by cosine distance; the same for the same seed, on the same machine.

    Raises:
        ImportError: umap-learn is missing.
        ValueError: too few images.

    Source: McInnes, Healy and Melville, UMAP, https://arxiv.org/abs/1802.03426.
    """
    if len(x) < 5:
        raise ValueError(f"UMAP of {len(x)} images: give 5 or more, or leave it out")
    umap = require_umap()
    found: Floats = umap.UMAP(
        n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, n_jobs=1
    ).fit_transform(np.asarray(x, dtype=np.float32))
    return found


def require_umap() -> Any:
    """The package umap.

    Raises:
        ImportError: umap-learn is missing.
    """
    import warnings

    try:
        with warnings.catch_warnings():  # of a part of it that is not used here
            warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
            import umap
    except ImportError as error:
        raise ImportError("UMAP needs umap-learn: pip install 'domainbed-ex2l[report]'; or --no_umap") from error
    return umap

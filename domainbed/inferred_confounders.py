"""Stand-ins for confounders that nobody annotated: from how a quickly trained network sees the training images.

One ERM network is trained for a few passes on the training images, with labels and nothing else. A method makes a
pseudo-confounder c' for each image of its features and logits; in training c' then takes the confounder's place, for
any algorithm and partition. docs/inferred_confounders.md says how well c' agrees with true confounders.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import random
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from domainbed import feature_scores, interruption, partitions, run_directory, snapshots
from domainbed.algorithms.base import Task, build
from domainbed.algorithms.erm import ERM
from domainbed.datasets.base import Integers, confounders
from domainbed.evaluation import autocast
from domainbed.feature_maps import evaluating
from domainbed.loaders import TrainingLoader
from domainbed.registry import Registry
from domainbed.samples import Sample
from domainbed.seeding import seed_hash
from domainbed.splits import Split

logger = logging.getLogger(__name__)

FILE = "inferred_confounders.npz"
PASSES = 5  # over the training images: shortcuts are learned, rare images not yet by heart; see the docs
MOST_CLUSTERS = 8
SILHOUETTE_IMAGES = 2000  # on which a number of clusters is judged; all pairs of more take long
WITHIN_SHARE = 0.5  # of the variance within labels; further directions are mostly noise, and let the label in again
HARD_SHARE = 0.1  # of a label's images, where none is an error; halves would make sampling by group sampling by label
TINY = 10  # images

REGISTRY: Registry[Any] = Registry("way to infer confounders", ("george", "errors", "ex2l"))
register = REGISTRY.register

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What the quickly trained network makes of the N training images.

    Attributes:
        features: (N, D), penultimate.
        logits: (N, K).
        y: labels (N,) in [0, K).
        seed: of whatever a method draws.
    """

    features: Floats
    logits: Floats
    y: Integers
    seed: int = 0


@dataclass(frozen=True)
class Inferred:
    """Pseudo-confounders of the training images.

    Attributes:
        splits: the training splits with c' in place of c, all of it known.
        num_confounders: V, how many values c' has.
        agreement: see ``agreement``; empty where the true confounder is not known.
    """

    splits: list[Split]
    num_confounders: int
    agreement: dict[str, float]


@register
def george(seen: Seen) -> Integers:
    """Clusters of each label's features: c' is the number of the image's cluster among those of its label.

    k-means with the number of clusters, 2 to 8, of the highest silhouette. A value means nothing across labels: use
    c' for groups (y, c'), not as a confounder by itself.

    Source: Nimit Sohoni, Jared Dunnmon, Geoffrey Angus, Albert Gu and Christopher Re, No Subclass Left Behind:
        Fine-Grained Robustness in Coarse-Grained Classification Problems, NeurIPS 2020,
        https://arxiv.org/abs/2011.12945.
    Differs: the network is trained for 5 passes, not to the end; no UMAP before clustering; k-means in place of a
        Gaussian mixture, whose covariances small labels can't fill; at most 8 clusters; no overclustering; silhouettes
        are of at most 2,000 images.
    """
    found = np.zeros(len(seen.y), dtype=np.int64)
    for label in np.unique(seen.y):
        of_label = seen.y == label
        found[of_label] = clusters(seen.features[of_label], seen.seed)
    return found


@register
def errors(seen: Seen) -> Integers:
    """c' = 1 where the network errs, else 0; where it errs nowhere, 1 for each label's tenth of the highest losses.

    For two labels this is also where the objective of EIIL (environment inference) is highest: with the gradient
    d_i = sum_k p_ik z_ik - z_iy of image i's loss to a scale of its logits, EIIL seeks shares q_i of a first
    environment that maximise (sum_i q_i d_i)^2 + (sum_i (1 - q_i) d_i)^2. That is convex in q, and highest where q
    tells d_i > 0 from d_i < 0; d_i > 0 means an error, and with two labels each error has it.

    Source: Evan Liu et al., Just Train Twice: Improving Group Robustness without Training Group Information, ICML
        2021, https://arxiv.org/abs/2107.09044; Elliot Creager, Joern-Henrik Jacobsen and Richard Zemel, Environment
        Inference for Invariant Learning, ICML 2021, https://arxiv.org/abs/2010.07249.
    Differs: JTT repeats the images of the error set, here they get a value of their own; it tunes how long to train
        with annotated validation images, here it is 5 passes; it does not say what to do without errors.
    """
    wrong = seen.logits.argmax(axis=1) != seen.y
    if wrong.any():
        return wrong.astype(np.int64)
    logger.warning(
        "the quickly trained network errs on no training image; the %g%% of each label's images with the highest "
        "losses take the errors' place. A smaller lr or a larger weight_decay would leave it errors",
        100 * HARD_SHARE,
    )
    return _hardest(seen)


def _hardest(seen: Seen) -> Integers:
    logits, y = torch.from_numpy(seen.logits).double(), torch.from_numpy(seen.y)
    losses = F.cross_entropy(logits, y, reduction="none").numpy()
    found = np.zeros(len(seen.y), dtype=np.int64)
    for label in np.unique(seen.y):
        of_label = np.flatnonzero(seen.y == label)
        order = np.argsort(-losses[of_label], kind="stable")
        found[of_label[order[: math.ceil(HARD_SHARE * len(of_label))]]] = 1
    return found


@register
def ex2l(seen: Seen) -> Integers:
    """Clusters of all images' features, seen in the directions in which images of one label differ most.

    What makes images of one label differ is not the label; so the directions are the principal ones within labels,
    which explain half of the variance there, and features are projected on them as they are: with each label's mean
    left in, since taking it out would take the confounder along that goes with the label, and the majorities of all
    labels would fall together. k-means with the number of clusters, 2 to 8, of the highest silhouette; values mean
    the same across labels.

    Source: the future work that the eX2L paper suggests: confounder labels from clusters of the features of a quickly
        trained network.
    Differs: the paper gives no algorithm; the directions, k-means and the silhouette are ours.
    """
    means = np.stack([seen.features[seen.y == label].mean(axis=0) for label in np.unique(seen.y)])
    within = seen.features - means[np.unique(seen.y, return_inverse=True)[1]]
    variances, directions = np.linalg.eigh(within.T.astype(np.float64) @ within.astype(np.float64))  # rising
    explained = np.cumsum(variances[::-1])
    kept = 1 + int(np.searchsorted(explained, WITHIN_SHARE * explained[-1]))
    return clusters(seen.features @ directions[:, ::-1][:, :kept], seen.seed)


def clusters(x: NDArray[np.floating[Any]], seed: int) -> Integers:
    """The number of each point's cluster (N,), by k-means with the k from 2 to 8 of the highest silhouette.

    Fewer than three different points are one cluster, 0.
    """
    chosen = np.random.default_rng(seed).permutation(len(x))[:SILHOUETTE_IMAGES]
    best, found = -math.inf, np.zeros(len(x), dtype=np.int64)
    for k in range(2, min(MOST_CLUSTERS, len(x) - 1) + 1):
        labels = _k_means(x, k, seed)
        if len(np.unique(labels)) < k or len(np.unique(x[chosen], axis=0)) <= k:
            break
        score = feature_scores.silhouette(x[chosen], labels[chosen], "euclidean").value
        if score is not None and score > best:
            best, found = score, labels
    return found


def _k_means(x: NDArray[np.floating[Any]], k: int, seed: int) -> Integers:
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # that there are fewer different points is seen from the labels
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        found: Integers = KMeans(k, n_init=5, random_state=seed).fit(x).labels_.astype(np.int64)
    return found


@dataclass(frozen=True)
class Setting:
    """The run that pseudo-confounders are for.

    Attributes:
        num_classes, input_shape: K and (C, H, W).
        hparams: the run's; the quick network is an ERM with its backbone, optimizer and batch size.
        steps: the run's updates; the quick network gets those of five passes, but never more than the run.
        seed: the run's.
        device: where the quick network is trained.
        num_confounders: how many values the true confounder has; 1: it is not known.
        num_workers: the most processes that open images.
        precision: "fp32" or "bf16".
    """

    num_classes: int
    input_shape: Sequence[int]
    hparams: dict[str, Any]
    steps: int
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_confounders: int = 1
    num_workers: int = 0
    precision: str = "fp32"


def infer(name: str, trained: Sequence[Split], setting: Setting, directory: Path | None = None) -> Inferred:
    """Training splits with pseudo-confounders; the same for equal arguments, on the same machine.

    True confounders are looked at for the agreement only, and the global random generators stay as they were.

    Args:
        name: of the method.
        trained: the training splits.
        directory: the run's, where the values are kept for the run to go on with; None: nowhere.

    Raises:
        NotImplementedError: no such method.
        ValueError: all images got the same value, or the quick network diverged.
    """
    method, y = REGISTRY[name], np.concatenate([split.y for split in trained])
    identity = _identity(name, trained, y, setting)
    values = None if directory is None else read(directory, identity)
    if values is None:
        with interruption.at_once():
            values = method(look(trained, setting))
        if directory is not None:
            write(directory, values, identity)
    if len(np.unique(values)) < 2:
        raise ValueError(
            f"{name} finds no two values in the training images, as the quickly trained network sees them; take "
            "another way to infer confounders, another lr, or annotated confounders"
        )
    _report_tiny(values, y)
    found = {}
    if setting.num_confounders > 1:
        found = agreement(values, np.concatenate([confounders(s.environment)[s.keys] for s in trained]), y)
    return Inferred(_with_values(trained, values), int(values.max()) + 1, found)


def look(trained: Sequence[Split], setting: Setting) -> Seen:
    """Trains the quick network, and says what it makes of the training images."""
    seed, device = seed_hash("inferred confounders", setting.seed), setting.device
    hidden = [dataclasses.replace(split, annotated=np.zeros(len(split), bool), inferred=None) for split in trained]
    with _own_randomness(seed):
        network = _trained(hidden, setting, seed)
        with evaluating(network), torch.no_grad():
            features = Sample(hidden, 1, device, setting.num_workers).map(network.featurizer).float()
            logits = torch.cat([_logits(network, some, device) for some in features.split(SILHOUETTE_IMAGES)])
    if not torch.isfinite(features).all() or not torch.isfinite(logits).all():
        raise ValueError("the quickly trained network, from which confounders are inferred, diverged; lower the lr")
    return Seen(features.numpy(), logits.numpy(), np.concatenate([split.y for split in trained]), seed)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """The global generators, seeded for the body and put back after it."""
    states = snapshots.random_states()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        snapshots.set_random_states(states)


def _trained(splits: Sequence[Split], setting: Setting, seed: int) -> Any:
    rows, natural, device = setting.hparams["batch_size"], partitions.REGISTRY["random"], setting.device
    minibatches = TrainingLoader(splits, natural, rows, seed=seed, num_workers=setting.num_workers, device=device)
    updates = max(1, min(setting.steps, math.ceil(PASSES * sum(map(len, splits)) / minibatches.rows)))
    task = Task(tuple(setting.input_shape), setting.num_classes, num_domains=1, steps=updates)
    network = build(ERM, task, setting.hparams).to(device).train()
    for step in itertools.islice(minibatches, updates):
        with autocast(device, setting.precision):
            network.update(step)
    return network


def _logits(network: Any, features: Tensor, device: torch.device) -> Tensor:
    found: Tensor = network.classifier(features.to(device)).float().cpu()
    return found


def _with_values(trained: Sequence[Split], values: Integers) -> list[Split]:
    parts = np.split(values, np.cumsum([len(split) for split in trained])[:-1])
    return [
        dataclasses.replace(split, annotated=None, inferred=part) for split, part in zip(trained, parts, strict=True)
    ]


def _report_tiny(values: Integers, y: Integers) -> None:
    places, counts = np.unique(np.stack([y, values]), axis=1, return_counts=True)
    tiny = [f"label {p[0]}, value {p[1]}: {n} images" for p, n in zip(places.T, counts, strict=True) if n < TINY]
    if tiny:
        logger.warning("inferred groups of less than %d images: %s", TINY, "; ".join(tiny))


def agreement(values: Integers, true: Integers, y: Integers) -> dict[str, float]:
    """How far pseudo-confounders (N,) are the true ones, over all images and within labels.

    ``nmi`` and ``ami`` are normalised and adjusted mutual information (0 by chance, 1 the same but for names),
    ``accuracy`` the share of images that are right when each pseudo-value is given a true value of its own as well as
    possible, ``majority`` the accuracy of a single value for all. ``... within labels`` is the plain mean over the
    labels that have two true values or more, with names given anew in each; left out if there is none.
    """
    labels = [label for label in np.unique(y) if len(np.unique(true[y == label])) > 1]
    found = _scores(values, true)
    scores = [_scores(values[y == label], true[y == label]) for label in labels]
    if not scores:
        return found
    return found | {f"{name} within labels": float(np.mean([score[name] for score in scores])) for name in found}


def _scores(values: Integers, true: Integers) -> dict[str, float]:
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(true, values)
    matched = table[linear_sum_assignment(-table)].sum()
    return {
        "nmi": float(normalized_mutual_info_score(true, values)),
        "ami": float(adjusted_mutual_info_score(true, values)),
        "accuracy": float(matched / len(true)),
        "majority": float(table.sum(axis=1).max() / len(true)),
    }


def _identity(name: str, trained: Sequence[Split], y: Integers, setting: Setting) -> str:
    """What tells the values of one set of images and settings from those of another; machines may differ."""
    own = {"name": name, "hparams": setting.hparams, "steps": setting.steps, "seed": setting.seed}
    own |= {"shape": [*setting.input_shape, setting.num_classes], "precision": setting.precision}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for split in trained:
        digest.update(f"environment {split.env}: {len(split)}".encode() + split.keys.astype(np.int64).tobytes())
    digest.update(y.astype(np.int64).tobytes())
    return digest.hexdigest()


def write(directory: Path, values: Integers, identity: str) -> None:
    """Keeps the values (N,) of a run in its directory."""
    with run_directory.whole(directory / FILE) as file:
        np.savez_compressed(file, values=values, identity=np.array(identity))


def read(directory: Path, identity: str) -> Integers | None:
    """The values (N,) that a run has kept; None if there are none, or they are of other images or settings."""
    try:
        with np.load(directory / FILE, allow_pickle=False) as content:
            if str(content["identity"]) != identity:
                return None
            values: Integers = content["values"]
            return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s can't be read and is made anew: %s", directory / FILE, error)
        return None

"""Features (n, D) and what is known of their images -> how features cluster, and what can be read off them.

Nothing here knows networks or datasets. A score that can't be had, as of one value only, is None. docs/features.md says
how they are read.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

NEIGHBOURS = 10
TEST_SHARE = 0.3  # of the images on which a probe is judged
FEWEST = 10  # images of each value that a probe needs: 7 to learn from, 3 to be judged by


class Score(NamedTuple):
    """A number, and what it would be of features that know nothing; None where there is none."""

    value: float | None
    chance: float | None


NONE = Score(None, None)


def silhouette(features: Floats, values: Integers, metric: str = "cosine") -> Score:
    """Mean silhouette coefficient in [-1, 1]: 1 compact and far apart, 0 interleaved, below 0 mixed.

    Args:
        values: (n,) what each image is of; the clusters.
        metric: "cosine" for features; "euclidean" where the origin means nothing, as in an embedding.

    Returns:
        NONE for a single value, or where no two images share one.

    Source: Rousseeuw, Silhouettes, J. Comput. Appl. Math. 20 (1987), 53-65.
    """
    if not 1 < len(np.unique(values)) < len(values):
        return NONE
    from sklearn.metrics import silhouette_score

    return Score(float(silhouette_score(features, values, metric=metric)), 0.0)


def purity(features: Floats, values: Integers, metric: str = "cosine", k: int = NEIGHBOURS) -> Score:
    """(p - q) / (1 - q): p the mean share of an image's k nearest others that have its value, q the same by chance.

    So 1 is pure and 0 is chance, however many values there are and however often each occurs: q is the chance that two
    different images share a value, which tends to the sum of the values' squared shares.

    Returns:
        NONE for a single value, or k images or fewer.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    n = len(values)
    if len(counts) < 2 or n <= k:
        return NONE
    from sklearn.neighbors import NearestNeighbors

    searched = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(features)
    neighbours = searched.kneighbors(return_distance=False)  # of each image, without itself
    p = float((inverse[neighbours] == inverse[:, None]).mean())
    q = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    return Score((p - q) / (1 - q), 0.0)


def probe(features: Floats, values: Integers, seed: int = 0) -> Score:
    """Balanced accuracy, on images held out, of a linear classifier that reads the value off the features.

    Logistic regression (L2, C = 1) of standardised features, its losses weighted so that all values count alike; 30 %
    of the images of each value, drawn by the seed, judge it. Chance is 1 / values.

    Returns:
        NONE for a single value, or if one has less than FEWEST images.
    """
    counts = np.unique(values, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < FEWEST:
        return NONE
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, x_test, t, t_test = train_test_split(
        np.asarray(features, dtype=np.float64), values, test_size=TEST_SHARE, stratify=values, random_state=seed
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000)).fit(x, t)
    return Score(float(balanced_accuracy_score(t_test, model.predict(x_test))), 1 / len(counts))


def probe_given(features: Floats, values: Integers, given: Integers, seed: int = 0) -> Score:
    """``probe`` among the images of one given value at a time; the mean over the given values.

    What two quantities that go together tell of each other is thereby no part of it. Given values whose images have no
    probe are left out.

    Returns:
        NONE if that leaves none.
    """
    found = [probe(features[given == one], values[given == one], seed) for one in np.unique(given)]
    known = [(value, chance) for value, chance in found if value is not None and chance is not None]
    if not known:
        return NONE
    value, chance = np.mean(known, axis=0)
    return Score(float(value), float(chance))


def proxy_a_distance(features: Floats, tested: NDArray[np.bool_], seed: int = 0) -> Score:
    """2 (1 - 2 err) of a probe for which of two samples an image is from: 0 alike, 2 fully told apart.

    Chance scatters around 0, so it can come out a little below.

    Args:
        tested: (n,) which of the images are of the second sample.

    Returns:
        NONE where ``probe`` has none.

    Source: Ben-David et al., Analysis of Representations for Domain Adaptation, NeurIPS 2006.
    """
    score = probe(features, tested.astype(np.int64), seed)
    return NONE if score.value is None else Score(2 * (2 * score.value - 1), 0.0)

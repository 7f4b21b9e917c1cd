"""L1 logistic regression of features (N, D) that gives every group the same say: fitted, tuned, averaged, folded.

Nothing here knows networks. Letters: N images, D features, K classes, G groups; groups are any integers, (N,).
"""

import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

logger = logging.getLogger(__name__)

CS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)  # weights of the losses that tuning tries
UNTUNED_C = CS[0]  # few images need the weakest penalty: with a stronger one all weights may be 0
MAX_ITER = 10_000
TOLERANCE = 1e-6


class Linear(NamedTuple):
    """A linear classifier: logits (N, K) are ``x @ weight.T + bias``; weight is (K, D), bias (K,)."""

    weight: Floats
    bias: Floats

    def logits(self, x: Floats) -> Floats:
        return x @ self.weight.T + self.bias


def fit(x: Floats, y: Integers, num_classes: int, c: float) -> Linear:
    """Minimises ``||w||_1 + |b| + c * sum_i log(1 + exp(-s_i (w x_i + b)))``, s_i = 1 in the class and -1 elsewhere.

    Two classes take one such w: their logits are -(w x + b) / 2 and (w x + b) / 2, so that softmax gives the model's
    probabilities and either class has weights to be explained by. More classes take one w each, against all others.

    The solver is liblinear, whose |b| the penalty contains. A softmax over all classes would need saga: with 4 classes,
    200 images and 1280 features, c = 1, it takes 8 seconds where this takes .06.

    Raises:
        ValueError: there are fewer than two classes, or images of some class are missing.
    """
    check_classes(y, num_classes)
    ones = [1] if num_classes == 2 else range(num_classes)
    found = [_against_rest(x, y == k, c) for k in ones]
    weight, bias = np.stack([w for w, _ in found]), np.array([b for _, b in found])
    if num_classes == 2:
        return Linear(np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2)
    return Linear(weight, bias)


def check_classes(y: Integers, num_classes: int) -> None:
    """Raises ValueError unless there are two classes at least, and images of each."""
    if num_classes < 2:
        raise ValueError(f"logistic regression tells classes apart, and there is {num_classes}; take two or more")
    if len(missing := np.setdiff1d(np.arange(num_classes), y)):
        raise ValueError(
            f"none of the {len(y)} images to learn from has label {', '.join(map(str, missing))}, which could never be "
            f"predicted then; give images of all {num_classes} classes"
        )


def _against_rest(x: Floats, positive: NDArray[np.bool_], c: float) -> tuple[Floats, float]:
    """Weights (D,) and intercept of one class against the others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # "penalty" is deprecated since scikit-learn 1.8, before which l1_ratio was not enough
    older = LogisticRegression().get_params().get("penalty") == "l2"
    l1: dict[str, Any] = {"penalty": "l1"} if older else {"l1_ratio": 1.0}
    model = LogisticRegression(C=c, solver="liblinear", tol=TOLERANCE, max_iter=MAX_ITER, random_state=0, **l1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in our words
        model.fit(x, positive)
    if model.n_iter_.max() >= MAX_ITER:
        logger.warning(
            "logistic regression of %d images with C = %g is not at its optimum after %d passes; its weights are used "
            "as they are",
            len(x),
            c,
            MAX_ITER,
        )
    return model.coef_[0], float(model.intercept_[0])


def balanced_subset(groups: Integers, rng: np.random.Generator) -> Integers:
    """Positions of a random subset, in order, with as many images of each group as the smallest one has."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    size = min(map(len, members))
    return np.sort(np.concatenate([rng.choice(some, size, replace=False) for some in members]))


def halves(groups: Integers, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Positions of a random half of each group, and those of its other half, which has the odd one."""
    first = [rng.permutation(np.flatnonzero(groups == g))[: np.sum(groups == g) // 2] for g in np.unique(groups)]
    chosen = np.sort(np.concatenate(first))
    return chosen, np.setdiff1d(np.arange(len(groups)), chosen)


def worst_group_accuracy(predicted: Integers, y: Integers, groups: Integers) -> float:
    """The accuracy in the group in which it is lowest."""
    return min(float((predicted == y)[groups == group].mean()) for group in np.unique(groups))


def tuned_c(x: Floats, y: Integers, groups: Integers, num_classes: int, rng: np.random.Generator) -> float:
    """Of ``CS`` the value whose fit to a group-balanced half of the images has the best worst group in the other half.

    Ties: the largest. Where a group has one image there are no such halves, and it is ``UNTUNED_C``.
    """
    values, counts = np.unique(groups, return_counts=True)
    if counts.min() < 2:
        logger.warning(
            "%d of %d groups have a single image, so that C can't be tuned: it is %g, and each fit sees one image of "
            "each group; annotate more images",
            np.sum(counts < 2),
            len(values),
            UNTUNED_C,
        )
        return UNTUNED_C
    judged, learned = halves(groups, rng)
    learned = learned[balanced_subset(groups[learned], rng)]

    def score(c: float) -> float:
        logits = fit(x[learned], y[learned], num_classes, c).logits(x[judged])
        return worst_group_accuracy(logits.argmax(1), y[judged], groups[judged])

    return max(CS, key=score)


def averaged(
    x: Floats, y: Integers, groups: Integers, num_classes: int, c: float, fits: int, rng: np.random.Generator
) -> Linear:
    """The mean of the weights and biases of fits, each to a group-balanced subset of its own."""
    subsets = [balanced_subset(groups, rng) for _ in range(fits)]
    found = [fit(x[some], y[some], num_classes, c) for some in subsets]
    return Linear(np.mean([one.weight for one in found], axis=0), np.mean([one.bias for one in found], axis=0))


def folded(linear: Linear, mean: Floats, scale: Floats) -> Linear:
    """The classifier of x that has the logits which ``linear`` has of ``(x - mean) / scale``; both are (D,)."""
    weight = linear.weight / scale
    return Linear(weight, linear.bias - weight @ mean)

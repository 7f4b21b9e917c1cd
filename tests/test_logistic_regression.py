import inspect
import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from domainbed import logistic_regression
from domainbed.logistic_regression import CS, UNTUNED_C, Linear, averaged, balanced_subset, fit, folded, halves, tuned_c


def data(n: int = 60, d: int = 12, num_classes: int = 2, seed: int = 0):
    """Features of which three tell the classes apart, labels, and two groups of unequal size in each class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % num_classes
    x = rng.normal(size=(n, d))
    x[:, :3] += rng.normal(size=(num_classes, 3))[y]
    return x, y, 2 * y + (rng.random(n) < 0.3)


def slopes(x, positive, weight, bias, c):
    """The derivative of c * sum_i log(1 + exp(-s_i (w x_i + b))) in each w_j, and in b."""
    total = [0.0] * (len(weight) + 1)
    for row, is_positive in zip(x, positive, strict=True):
        sign = 1 if is_positive else -1
        slope = -c * sign / (1 + np.exp(sign * (sum(w * v for w, v in zip(weight, row, strict=True)) + bias)))
        for j, value in enumerate([*row, 1.0]):
            total[j] += slope * value
    return total


def assert_optimal(x, positive, weight, bias, c):
    """Karush, Kuhn and Tucker: the slope is -sign(w) where w is not 0, and within [-1, 1] where it is."""
    for slope, w in zip(slopes(x, positive, weight, bias, c), [*weight, bias], strict=True):
        assert slope == pytest.approx(-np.sign(w), abs=2e-3) if w else abs(slope) <= 1.002


@pytest.mark.parametrize("c", [1.0, 0.3, 0.1])
def test_two_classes_are_at_the_optimum_and_share_it(c):
    x, y, _ = data()
    weight, bias = fit(x, y, 2, c)
    assert_optimal(x, y == 1, 2 * weight[1], 2 * bias[1], c)
    assert np.count_nonzero(weight[1]) > 0
    assert (weight[0] == -weight[1]).all()
    assert bias[0] == -bias[1]
    assert c > 0.5 or (weight[1] == 0).any()


def test_softmax_of_two_classes_is_the_models_probability():
    x, y, _ = data()
    model = LogisticRegression(C=0.5, solver="liblinear", tol=1e-6, **l1())
    powers = np.exp(fit(x, y, 2, 0.5).logits(x))
    expected = model.fit(x, y).predict_proba(x)
    assert powers / powers.sum(1, keepdims=True) == pytest.approx(expected, abs=1e-4)


def l1():
    """What asks this scikit-learn for the L1 penalty."""
    default = inspect.signature(LogisticRegression).parameters["l1_ratio"].default
    return {"penalty": "l1"} if default is None else {"l1_ratio": 1.0}


def test_three_classes_are_each_at_the_optimum_against_the_others():
    x, y, _ = data(90, num_classes=3)
    weight, bias = fit(x, y, 3, 0.5)
    assert weight.shape == (3, 12)
    for k in range(3):
        assert np.count_nonzero(weight[k]) > 0
        assert_optimal(x, y == k, weight[k], bias[k], 0.5)


def test_a_strong_penalty_leaves_no_weight():
    x, y, _ = data()
    assert not fit(x, y, 2, 1e-3).weight.any()


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([0, 0, 1], 3, "none of the 3 images to learn from has label 2, .*all 3 classes"),
        ([0, 0, 0], 2, "none of the 3 images to learn from has label 1, "),
        ([0, 0, 0], 1, "tells classes apart, and there is 1"),
    ],
)
def test_classes_that_could_never_be_predicted_are_an_error(labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        fit(np.eye(3), np.array(labels), num_classes, 1.0)


def test_a_fit_that_has_not_converged_is_told_of_and_used(monkeypatch, caplog):
    x, y, _ = data()
    fit(x, y, 2, 1.0)
    assert not caplog.records
    monkeypatch.setattr(logistic_regression, "MAX_ITER", 1)
    assert np.isfinite(fit(x, y, 2, 1.0).weight).all()
    assert "60 images with C = 1 is not at its optimum after 1 passes" in caplog.text


def test_balanced_subsets_have_the_smallest_groups_size_and_are_drawn_anew():
    groups = np.repeat([7, 0, 3], [9, 4, 6])
    rng = np.random.default_rng(0)
    drawn = [balanced_subset(groups, rng) for _ in range(30)]
    for subset in drawn:
        assert len(set(subset.tolist())) == len(subset)
        assert np.unique(groups[subset], return_counts=True)[1].tolist() == [4, 4, 4]
    assert len({tuple(subset) for subset in drawn}) > 20
    assert set(np.concatenate(drawn).tolist()) == set(range(19))  # nothing is left out for ever


def test_halves_hold_half_of_each_group():
    groups = np.repeat([5, 1, 2], [8, 3, 2])
    one, other = halves(groups, np.random.default_rng(0))
    assert sorted([*one, *other]) == list(range(13))
    assert [np.sum(groups[one] == g) for g in (5, 1, 2)] == [4, 1, 1]
    assert one.tolist() != halves(groups, np.random.default_rng(1))[0].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_tuned_c_is_the_best_of_a_written_out_search(seed):
    x, y, groups = data(120, 30, seed=seed)
    rng = np.random.default_rng(seed)
    judged, learned = halves(groups, rng)
    chosen = learned[balanced_subset(groups[learned], rng)]
    scores = {}
    for c in (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01):
        model = LogisticRegression(C=c, solver="liblinear", tol=1e-6, random_state=0, **l1()).fit(x[chosen], y[chosen])
        right = {}
        for i in judged:
            decision = model.intercept_[0] + sum(w * v for w, v in zip(model.coef_[0], x[i], strict=True))
            right.setdefault(groups[i], []).append((decision > 0) == y[i])
        scores[c] = min(sum(values) / len(values) for values in right.values())
    best = [c for c in scores if scores[c] == max(scores.values())]
    assert len(set(scores.values())) > 1  # the search has something to choose
    assert tuned_c(x, y, groups, 2, np.random.default_rng(seed)) == max(best)


def test_tuning_can_prefer_a_strong_penalty():
    rng = np.random.default_rng(1)
    y = np.arange(40) % 2
    x = np.concatenate([(2 * y - 1)[:, None] + 0.9 * rng.normal(size=(40, 1)), rng.normal(size=(40, 200))], axis=1)
    assert tuned_c(x, y, y, 2, np.random.default_rng(0)) < 1


def test_a_group_of_one_image_leaves_c_at_its_default(caplog):
    x, y, _ = data(20)
    groups = np.where(np.arange(20) == 0, 9, y)
    assert tuned_c(x, y, groups, 2, np.random.default_rng(0)) == UNTUNED_C == CS[0]
    assert "1 of 3 groups have a single image" in caplog.text
    assert len(balanced_subset(groups, np.random.default_rng(0))) == 3


def test_the_average_has_the_mean_of_the_models_logits():
    x, y, groups = data(90, num_classes=3)
    rng = np.random.default_rng(5)
    subsets = [balanced_subset(groups, rng) for _ in range(4)]
    expected = sum(fit(x[some], y[some], 3, 0.7).logits(x) for some in subsets) / 4
    assert averaged(x, y, groups, 3, 0.7, 4, np.random.default_rng(5)).logits(x) == pytest.approx(expected)
    assert len({tuple(some) for some in subsets}) == 4


def test_folding_takes_the_standardisation_into_the_classifier():
    rng = np.random.default_rng(0)
    x, linear = rng.normal(3, 2, (7, 4)), Linear(rng.normal(size=(3, 4)), rng.normal(size=3))
    mean, scale = x.mean(0), x.std(0)
    assert folded(linear, mean, scale).logits(x) == pytest.approx(linear.logits((x - mean) / scale))


def test_equal_data_give_equal_fits_and_no_logging(caplog):
    caplog.set_level(logging.WARNING)
    x, y, groups = data()
    one, other = (averaged(x, y, groups, 2, 1.0, 3, np.random.default_rng(0)) for _ in range(2))
    assert (one.weight == other.weight).all()
    assert (one.bias == other.bias).all()
    assert not caplog.records


def test_tuning_fits_on_a_balanced_half(monkeypatch):
    groups = np.repeat([0, 1, 2, 3], [40, 8, 8, 40])
    z = np.stack([groups, np.random.default_rng(0).normal(size=len(groups))], axis=1).astype(float)
    own_fit, seen = logistic_regression.fit, []

    def noting(x, *more, **options):
        seen.append(np.bincount(x[:, 0].astype(int), minlength=4).tolist())
        return own_fit(x, *more, **options)

    monkeypatch.setattr(logistic_regression, "fit", noting)
    logistic_regression.tuned_c(z, groups // 2, groups, 2, np.random.default_rng(1))
    assert seen
    assert all(counts == [4, 4, 4, 4] for counts in seen)

import math

import numpy as np
import pytest
import torch


def slow_mmd(x, y):
    """Kernel by kernel and row by row."""

    def mean_kernel(a, b):
        total = 0.0
        for u in a:
            for v in b:
                square = sum((s - t) ** 2 for s, t in zip(u, v, strict=True))
                total = total + sum(torch.exp(-(10.0**power) * square) for power in range(-3, 4))
        return total / (len(a) * len(b))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def slow_coral(x, y):
    """Entry by entry."""

    def moments(a):
        mean = [sum(a[:, j]) / len(a) for j in range(a.shape[1])]
        covariance = {
            (j, k): sum((u[j] - mean[j]) * (u[k] - mean[k]) for u in a) / (len(a) - 1)
            for j in range(a.shape[1])
            for k in range(a.shape[1])
        }
        return mean, covariance

    (mean1, covariance1), (mean2, covariance2) = moments(x), moments(y)
    means = sum((s - t) ** 2 for s, t in zip(mean1, mean2, strict=True)) / len(mean1)
    return means + sum((covariance1[key] - covariance2[key]) ** 2 for key in covariance1) / len(covariance1)


@pytest.mark.parametrize(("name", "distance"), [("MMD", slow_mmd), ("CORAL", slow_coral)])
def test_updates_equal_written_out_training(build, minibatches, slow_network, name, distance):
    algorithm = build(name, mmd_gamma=3.0)
    slow = slow_network(algorithm)
    for _ in range(2):
        step = algorithm.update(minibatches)
        features = [slow.featurizer(x) for x, _ in minibatches]
        risk = sum(slow.risk(x, y) for x, y in minibatches) / 3
        penalty = sum(distance(features[i], features[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        slow.adam.descend(risk + 3.0 * penalty)
        assert step == pytest.approx({"loss": risk.item(), "penalty": penalty.item()}, rel=1e-8)
        slow.assert_equal()


@pytest.mark.parametrize("name", ["MMD", "CORAL"])
def test_penalty_weight_changes_the_weights(build, minibatches, name):
    results = []
    for weight in (0.0, 3.0):
        algorithm = build(name, mmd_gamma=weight)
        algorithm.update(minibatches)
        results.append(next(algorithm.featurizer.parameters()).detach().clone())
    assert not torch.allclose(*results)


@pytest.mark.parametrize("name", ["MMD", "CORAL"])
def test_distance_is_symmetric_and_zero_for_equal_features(build, name):
    algorithm, generator = build(name), np.random.default_rng(0)
    x, y = torch.from_numpy(generator.normal(size=(6, 4))), torch.from_numpy(generator.normal(size=(5, 4)))
    assert algorithm.mmd(x, x).item() == pytest.approx(0, abs=1e-12)
    assert algorithm.mmd(x, y).item() == pytest.approx(algorithm.mmd(y, x).item())
    assert algorithm.mmd(x, y).item() > 0


def test_coral_sees_numpys_covariance(build):
    x = np.random.default_rng(0).normal(size=(6, 4))
    y = x @ np.diag([1.0, 2.0, 1.0, 1.0]) + 3.0
    expected = np.mean((x.mean(0) - y.mean(0)) ** 2) + np.mean((np.cov(x.T) - np.cov(y.T)) ** 2)
    assert build("CORAL").mmd(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(expected)


def test_kernel_takes_other_widths(build):
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert build("MMD").gaussian_kernel(x, y, gamma=[0.5]).item() == pytest.approx(math.exp(-1))
    assert build("MMD").my_cdist(x, x).item() == pytest.approx(1e-30)


def test_one_minibatch_has_no_penalty(build, minibatches):
    assert build("CORAL").update(minibatches[:1])["penalty"] == 0.0


@pytest.mark.parametrize("name", ["MMD", "CORAL"])
def test_the_distance_is_not_rounded_under_autocast(build, name):
    algorithm = build(name).float()
    x, y = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    expected = algorithm.mmd(x, y + 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert algorithm.mmd(x, y + 0.01).item() == pytest.approx(expected.item(), rel=1e-6)

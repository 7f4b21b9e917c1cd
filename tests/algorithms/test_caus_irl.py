import numpy as np
import pytest
import torch

from domainbed import algorithms

NAMES = ["CausIRL_MMD", "CausIRL_CORAL"]


def slow_mmd(a, b):
    """Pair by pair, kernel by kernel."""

    def mean_kernel(x, y):
        squares = [sum((s - t) ** 2 for s, t in zip(u, v, strict=True)) for u in x for v in y]
        return sum(torch.exp(-(10.0**power) * square) for square in squares for power in range(-3, 4)) / len(squares)

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def slow_coral(a, b):
    means = [sum(rows) / len(rows) for rows in (a, b)]
    covariances = [
        sum(torch.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)
        for rows, mean in zip((a, b), means, strict=True)
    ]
    return ((means[0] - means[1]) ** 2).mean() + ((covariances[0] - covariances[1]) ** 2).mean()


@pytest.mark.parametrize(("name", "distance"), [("CausIRL_MMD", slow_mmd), ("CausIRL_CORAL", slow_coral)])
def test_updates_equal_written_out_training(build, minibatches, slow_network, name, distance):
    algorithm = build(name, mmd_gamma=3.0)
    slow, cuts = slow_network(algorithm), np.random.RandomState(5)
    np.random.seed(5)
    for _ in range(3):
        step = algorithm.update(minibatches)
        first, second, risk = [], [], 0.0
        for x, y in minibatches:
            cut, features = cuts.randint(0, len(x)), slow.featurizer(x)
            first, second = [*first, *features[:cut]], [*second, *features[cut:]]
            risk = risk + slow.risk(x, y) / 3
        penalty = distance(first, second)
        slow.adam.descend(risk + 3.0 * penalty)
        assert step == pytest.approx({"loss": risk.item(), "penalty": penalty.item()}, rel=1e-7)
        slow.assert_equal()


@pytest.mark.parametrize("name", NAMES)
def test_the_control_is_the_mean_risk_and_the_penalty_changes_the_weights(build, minibatches, slow_network, name):
    control, method = build(name, **algorithms.get_algorithm_class(name).CONTROL), build(name, mmd_gamma=3.0)
    slow = slow_network(control)
    for _ in range(3):
        slow.adam.descend(sum(slow.risk(x, y) for x, y in minibatches) / 3)
        control.update(minibatches)
        method.update(minibatches)
    slow.assert_equal()
    assert not torch.allclose(control.network[0].input.weight, method.network[0].input.weight)


@pytest.mark.parametrize("name", NAMES)
def test_one_minibatch_is_enough(build, minibatches, name):
    np.random.seed(0)
    assert max(build(name).update(minibatches[:1])["penalty"] for _ in range(5)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_less_than_two_rows_has_no_penalty(build, minibatches, monkeypatch, name):
    algorithm, (x, y) = build(name), minibatches[0]
    for cut in (0, 1, 6):  # 7 rows: shares of 0 and 7, 1 and 6, 6 and 1
        monkeypatch.setattr(np.random, "randint", lambda high, cut=cut: cut)
        assert algorithm.update([(x, y)])["penalty"] == 0.0
    monkeypatch.setattr(np.random, "randint", lambda high: 2)
    assert algorithm.update([(x, y)])["penalty"] > 0.0


@pytest.mark.parametrize("name", NAMES)
def test_single_rows_train(build, minibatches, name):
    step = build(name).update([(x[:1], y[:1]) for x, y in minibatches])
    assert step["penalty"] == 0.0
    assert np.isfinite(step["loss"])

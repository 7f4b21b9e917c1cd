import pytest
import torch

from domainbed import algorithms


def surrogate(weights, gradients):
    """A loss with those gradients."""
    return sum((weight * gradient).sum() for weight, gradient in zip(weights, gradients, strict=True))


@pytest.mark.parametrize("n_meta_test", [1, 2])
def test_updates_equal_written_out_training(build, minibatches, slow_network, n_meta_test):
    mldg = build("MLDG", mldg_beta=0.7, n_meta_test=n_meta_test)
    slow = slow_network(mldg)
    weights = slow.adam.weights
    for seed in range(4):
        torch.manual_seed(seed)
        order = torch.randperm(3).tolist()
        pairs = [(order[0], order[2]), (order[1], order[2])] if n_meta_test == 1 else [(order[0], order[1])]
        total, gradients = 0.0, [torch.zeros_like(weight) for weight in weights]
        for i, j in pairs:
            clone = slow_network(mldg)  # a fresh Adam too
            (x1, y1), (x2, y2) = minibatches[i], minibatches[j]
            n = min(len(y1), len(y2))
            train = clone.risk(x1[:n], y1[:n])
            before = torch.autograd.grad(train, clone.adam.weights, retain_graph=True)
            clone.adam.descend(train)
            test = clone.risk(x2[:n], y2[:n])
            after = torch.autograd.grad(test, clone.adam.weights)
            gradients = [g + (a + 0.7 * b) / 3 for g, a, b in zip(gradients, before, after, strict=True)]
            total += (train.item() + 0.7 * test.item()) / 3
        slow.adam.descend(surrogate(weights, gradients))
        torch.manual_seed(seed)
        assert mldg.update(minibatches) == {"loss": pytest.approx(total, rel=1e-9)}
        slow.assert_equal()


def test_without_beta_it_is_erm_on_the_meta_train_minibatches(build, minibatches):
    x, y = minibatches[0]
    alike = [(x, y), (x, y)]
    results = {}
    for beta in (0.0, 1.0):
        mldg = build("MLDG", mldg_beta=beta, optimizer="sgd", momentum=0.0, weight_decay=0.0)
        mldg.update(alike)
        results[beta] = mldg.classifier.weight.detach()
    erm = build("ERM", optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.005)  # divided by E = 2
    erm.update(alike[:1])
    torch.testing.assert_close(results[0.0], erm.classifier.weight.detach())
    assert not torch.allclose(results[0.0], results[1.0])


def test_two_minibatches_learn_though_both_are_asked_for_meta_test(build, minibatches):
    mldg = build("MLDG", n_meta_test=2, weight_decay=0.0)
    before = mldg.classifier.weight.detach().clone()
    assert mldg.update(minibatches[:2])["loss"] > 0
    assert not torch.allclose(before, mldg.classifier.weight)


def test_batch_statistics_follow_the_clones(build, minibatches):
    mldg = build("MLDG", n_meta_test=1)
    norm = torch.nn.BatchNorm1d(5).double()
    mldg.network.insert(0, norm)
    torch.manual_seed(0)
    order = torch.randperm(3).tolist()
    expected = torch.zeros(5, dtype=torch.float64)
    for i, j in ((order[0], order[2]), (order[1], order[2])):
        rows = min(len(minibatches[i][0]), len(minibatches[j][0]))
        for k in (i, j):
            expected = 0.9 * expected + 0.1 * minibatches[k][0][:rows].mean(0)
    torch.manual_seed(0)
    mldg.update(minibatches)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 4


def test_frozen_weights_stay(build, minibatches):
    mldg = build("MLDG", weight_decay=0.1)
    mldg.featurizer.requires_grad_(False)
    before = [weight.clone() for weight in mldg.featurizer.parameters()]
    mldg.update(minibatches)
    assert all(torch.equal(*pair) for pair in zip(before, mldg.featurizer.parameters(), strict=True))


def test_meta_testing_on_nothing_is_refused(build):
    with pytest.raises(ValueError, match="hparam n_meta_test is 0; give 1 or more minibatches"):
        build("MLDG", n_meta_test=0)


def test_one_minibatch_is_refused():
    task = algorithms.base.Task((5,), 3, 1)
    with pytest.raises(ValueError, match="MLDG compares at least 2 minibatches, this partition has 1"):
        algorithms.MLDG.from_task(task, {})

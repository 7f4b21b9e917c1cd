import copy

import pytest
import torch

from domainbed import state_trees


def gradient_rows(cross_entropy, classifier, features, y):
    """One backward pass per image: the gradients of all the classifier's weights in one row, (B, n)."""
    rows = []
    for feature, label in zip(features, y, strict=True):
        risk = cross_entropy(classifier(feature[None]), label[None])
        gradients = torch.autograd.grad(risk, classifier.weights, create_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def slow_variance(cross_entropy, classifier, features, y):
    rows = gradient_rows(cross_entropy, classifier, features, y)
    mean = sum(rows) / len(rows)
    return sum((row - mean) ** 2 for row in rows) / len(rows)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_updates_equal_written_out_training(build, minibatches, slow_network, cross_entropy, nonlinear):
    fishr = build("Fishr", **{"lambda": 50.0}, penalty_anneal_iters=2, ema=0.8, nonlinear_classifier=nonlinear)
    slow, past = slow_network(fishr), [0.0, 0.0, 0.0]
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for update in range(4):
        step = fishr.update(minibatches)
        features = slow.featurizer(x).split([7, 6, 5])
        averages = []
        for e, part in enumerate(features):
            average = 0.2 * slow_variance(cross_entropy, slow.classifier, part, minibatches[e][1]) + 0.8 * past[e]
            past[e] = average.detach()
            averages.append(average / 0.2)
        mean = sum(averages) / 3
        penalty = sum(((average - mean) ** 2).mean() for average in averages) / 3
        nll = cross_entropy(slow.logits(x), y)
        if update == 2:
            slow.adam.reset()
        loss = nll + (50.0 if update >= 2 else 0.0) * penalty
        slow.adam.descend(loss)
        expected = {"loss": loss.item(), "nll": nll.item(), "penalty": penalty.item()}
        assert step == pytest.approx(expected, rel=1e-8)
        slow.assert_equal()
    assert fishr.update_count.tolist() == [4]


def test_variances_of_a_linear_classifier_have_a_closed_form(build):
    """The gradient is error (K,) times feature (D,), so its square's mean is a product of matrices of squares."""
    fishr = build("Fishr")
    features, y = torch.randn(9, fishr.featurizer.n_outputs, dtype=torch.float64), torch.arange(9) % 3
    error = fishr.classifier(features).softmax(1) - torch.eye(3)[y]
    variances = fishr._gradient_variances(features, y)
    expected = (error**2).T @ features**2 / 9 - (error.T @ features / 9) ** 2
    torch.testing.assert_close(variances["weight"], expected)
    torch.testing.assert_close(variances["bias"], (error**2).mean(0) - error.mean(0) ** 2)


def test_penalty_reaches_the_featurizer(build, minibatches):
    fishr = build("Fishr")
    features = [fishr.featurizer(x) for x, _ in minibatches]
    labels = torch.cat([y for _, y in minibatches])
    penalty = fishr._penalty(torch.cat(features), labels, [len(part) for part in features])
    gradients = torch.autograd.grad(penalty, [*fishr.featurizer.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_lambda_changes_the_weights_and_zero_is_erm(build, minibatches):
    off, on, erm = (
        build("Fishr", **{"lambda": 0.0}, penalty_anneal_iters=0),
        build("Fishr", **{"lambda": 1000.0}, penalty_anneal_iters=0),
        build("ERM"),
    )
    for _ in range(3):
        nll = erm.update(minibatches)["loss"]
        assert off.update(minibatches)["loss"] == pytest.approx(nll)
        on.update(minibatches)
    torch.testing.assert_close(off.classifier.weight, erm.classifier.weight)
    assert not torch.allclose(on.classifier.weight, erm.classifier.weight)


def test_equal_minibatches_have_no_penalty(build, minibatches):
    assert build("Fishr").update([minibatches[0]] * 3)["penalty"] == pytest.approx(0, abs=1e-20)


def test_averages_go_on_in_a_fresh_instance(build, minibatches):
    whole, fresh = build("Fishr", penalty_anneal_iters=1), build("Fishr", penalty_anneal_iters=1)
    whole.update(minibatches)
    state_trees.restore(copy.deepcopy(state_trees.capture(whole)), fresh)  # a copy, as a file is
    assert fresh.update(minibatches) == whole.update(minibatches)


def test_autocast_keeps_the_variances_in_float32(build, minibatches):
    fishr = build("Fishr").float()
    with torch.autocast("cpu", torch.bfloat16):
        fishr.update([(x.float(), y) for x, y in minibatches])
    assert {v.dtype for average in fishr.ema_per_domain for v in average.ema_data.values()} == {torch.float32}


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_ema_outside_its_range_is_refused(build, ema):
    with pytest.raises(ValueError, match=r"hparam ema is .*; it weighs the past, give a number in \[0, 1\)"):
        build("Fishr", ema=ema)


def test_gradients_are_those_of_float32_under_autocast(build):
    fishr = build("Fishr").float()
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = fishr._gradient_variances(features, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = fishr._gradient_variances(features, y)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)

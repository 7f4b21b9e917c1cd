import pytest
import torch


def slow_gradients(slow, minibatches):
    """For each weight tensor, the gradients of the three minibatches' risks; and the risks' mean."""
    risks = [slow.risk(x, y) for x, y in minibatches]
    gradients = [torch.autograd.grad(risk, slow.adam.weights) for risk in risks]
    return list(zip(*gradients, strict=True)), sum(risk.item() for risk in risks) / 3


def slow_masked_mean(gradients, tau):
    """Entry by entry."""
    flat = [gradient.flatten().tolist() for gradient in gradients]
    kept = [abs(sum((g > 0) - (g < 0) for g in entry)) / len(entry) >= tau for entry in zip(*flat, strict=True)]
    share = sum(kept) / len(kept) or 1.0
    values = [sum(e) / len(e) / share if keep else 0.0 for e, keep in zip(zip(*flat, strict=True), kept, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view_as(gradients[0])


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_updates_equal_written_out_training(build, minibatches, slow_network, tau):
    algorithm = build("ANDMask", tau=tau)
    slow = slow_network(algorithm)
    for _ in range(3):
        step = algorithm.update(minibatches)
        gradients, loss = slow_gradients(slow, minibatches)
        masked = [slow_masked_mean(of_weight, tau) for of_weight in gradients]
        assert any((gradient == 0).any() for gradient in masked)
        # A loss with those gradients:
        slow.adam.descend(sum((g * w).sum() for g, w in zip(masked, slow.adam.weights, strict=True)))
        assert step == {"loss": pytest.approx(loss, rel=1e-9)}
        slow.assert_equal()


def test_a_hand_made_mask(build):
    gradients = torch.tensor([[1.0, 1.0, -3.0, 0.0], [2.0, -1.0, -1.0, 0.0], [3.0, 4.0, -2.0, 5.0]])
    strict, lax = build("ANDMask", tau=1.0), build("ANDMask", tau=0.3)
    assert strict.gradient_mask(gradients).tolist() == [1, 0, 1, 0]
    assert lax.gradient_mask(gradients).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(strict._masked_mean(gradients), torch.tensor([4.0, 0, -4, 0]))


def test_what_the_minibatches_want_differently_stays(build, minibatches):
    """From even odds, one minibatch of class 1 and two of class 0 agree only that class 2 should be rarer."""
    algorithm = build("ANDMask", tau=1.0, weight_decay=0.0)
    with torch.no_grad():
        algorithm.classifier.weight.zero_(), algorithm.classifier.bias.zero_()
    algorithm.update([(x, torch.full_like(y, k)) for (x, y), k in zip(minibatches, (0, 0, 1), strict=True)])
    assert algorithm.classifier.bias.tolist() == pytest.approx([0, 0, -0.01])


def test_tau_zero_is_the_mean_risk_and_one_is_not(build, minibatches):
    plain, masked, equal = build("ANDMask", tau=0.0), build("ANDMask", tau=1.0), build("GroupDRO", groupdro_eta=0.0)
    for _ in range(3):
        loss = equal.update(minibatches)["loss"]
        assert plain.update(minibatches)["loss"] == pytest.approx(loss)
        masked.update(minibatches)
    torch.testing.assert_close(plain.classifier.weight, equal.classifier.weight)
    assert not torch.allclose(masked.classifier.weight, equal.classifier.weight)


@pytest.mark.parametrize("name", ["ANDMask", "SANDMask", "IGA"])
def test_frozen_and_unused_parameters_stay(build, minibatches, name):
    algorithm = build(name)
    algorithm.featurizer.input.weight.requires_grad_(False)
    algorithm.featurizer.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    algorithm.optimizer = algorithm.new_optimizer()
    frozen = algorithm.featurizer.input.weight.clone()
    bias = algorithm.featurizer.input.bias.detach().clone()
    algorithm.update(minibatches)
    assert torch.equal(algorithm.featurizer.input.weight, frozen)
    assert algorithm.featurizer.unused.tolist() == [1, 1]
    assert not torch.equal(algorithm.featurizer.input.bias, bias)


@pytest.mark.parametrize("name", ["ANDMask", "SANDMask"])
@pytest.mark.parametrize("tau", [-0.1, 1.5])
def test_tau_outside_its_range_is_refused(build, name, tau):
    with pytest.raises(ValueError, match=rf"hparam tau is {tau}; .* give a number in \[0, 1\]"):
        build(name, tau=tau)

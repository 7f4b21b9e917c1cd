import math

import pytest
import torch


def slow_mask(entries, tau, k):
    """max(0, tanh(k (|mean sign| - tau) / unbiased variance)) of one entry's gradients."""
    mean = sum(entries) / len(entries)
    variance = sum((g - mean) ** 2 for g in entries) / (len(entries) - 1)
    excess = abs(sum((g > 0) - (g < 0) for g in entries)) / len(entries) - tau
    if variance == 0:
        return 1.0 if excess > 0 else 0.0
    return max(0.0, math.tanh(k * excess / variance))


def slow_masked_mean(gradients, tau, k):
    entries = list(zip(*(gradient.flatten().tolist() for gradient in gradients), strict=True))
    mask = [slow_mask(entry, tau, k) for entry in entries]
    share = sum(mask) / len(mask) + 1e-10
    values = [m * sum(entry) / len(entry) / share for m, entry in zip(mask, entries, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view_as(gradients[0])


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    algorithm = build("SANDMask", tau=0.5, k=0.02)
    slow = slow_network(algorithm)
    for _ in range(3):
        step = algorithm.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        by_weight = zip(*(torch.autograd.grad(risk, slow.adam.weights) for risk in risks), strict=True)
        masked = [slow_masked_mean(gradients, 0.5, 0.02) for gradients in by_weight]
        slow.adam.descend(sum((g * w).sum() for g, w in zip(masked, slow.adam.weights, strict=True)))
        assert step == {"loss": pytest.approx(sum(risk.item() for risk in risks) / 3, rel=1e-9)}
        slow.assert_equal()
    assert algorithm.update_count.tolist() == [3]


def test_a_hand_made_mask(build):
    gradients = torch.tensor([[1.0, 1.0, -2.0, 0.0], [3.0, -1.0, -2.0, 0.0]], dtype=torch.float64)
    mask = build("SANDMask", tau=0.5, k=2.0).gradient_mask(gradients)
    assert mask.tolist() == pytest.approx([math.tanh(2 * 0.5 / 2), 0, 1, 0])  # agree; opposed; equal; dead


def test_equal_gradients_at_the_limit_are_masked(build):
    gradients = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    assert build("SANDMask", tau=1.0).gradient_mask(gradients).tolist() == [0, 0]
    assert build("SANDMask", tau=0.0).gradient_mask(gradients).tolist() == [1, 0]


def test_at_tau_one_nothing_is_learned_and_below_it_is(build, minibatches):
    results = []
    for tau in (1.0, 0.5):
        algorithm = build("SANDMask", tau=tau, weight_decay=0.0)
        before = algorithm.classifier.weight.detach().clone()
        algorithm.update(minibatches)
        results.append(torch.equal(algorithm.classifier.weight, before))
    assert results == [True, False]


def test_the_mask_changes_the_weights(build, minibatches):
    masked, plain = build("SANDMask", tau=0.5), build("GroupDRO", groupdro_eta=0.0)
    for _ in range(3):
        masked.update(minibatches)
        plain.update(minibatches)
    assert not torch.allclose(masked.classifier.weight, plain.classifier.weight)


def test_a_steepness_of_zero_is_refused(build):
    with pytest.raises(ValueError, match=r"hparam k is 0.0; it is a steepness, give a number above 0"):
        build("SANDMask", k=0.0)


def test_the_default_that_masks_everything_is_warned_of(build, caplog):
    build("SANDMask", tau=0.5)
    assert not caplog.messages
    build("SANDMask")
    assert caplog.messages == ["SANDMask with tau 1, DomainBed's default, masks every gradient: nothing is learned"]

import pytest
import torch
from torch import nn


def slow_penalty(slow, risks):
    """Sum over the minibatches of the squared distance of their gradients, as one long row, from the rows' mean."""
    rows = []
    for risk in risks:
        gradients = torch.autograd.grad(risk, slow.adam.weights, create_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    mean = sum(rows) / len(rows)
    return sum(((row - mean) ** 2).sum() for row in rows)


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    iga = build("IGA", penalty=5.0)
    slow = slow_network(iga)
    for _ in range(3):
        step = iga.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        mean, penalty = sum(risks) / 3, slow_penalty(slow, risks)
        slow.adam.descend(mean + 5 * penalty)
        assert step == pytest.approx({"loss": mean.item(), "penalty": penalty.item()}, rel=1e-8)
        slow.assert_equal()


def test_penalty_zero_is_the_mean_risk_and_more_is_not(build, minibatches):
    off, on, plain = build("IGA", penalty=0.0), build("IGA"), build("GroupDRO", groupdro_eta=0.0)
    for _ in range(3):
        assert off.update(minibatches)["loss"] == pytest.approx(plain.update(minibatches)["loss"])
        on.update(minibatches)
    torch.testing.assert_close(off.classifier.weight, plain.classifier.weight)
    assert not torch.allclose(on.classifier.weight, plain.classifier.weight)


def test_a_large_penalty_brings_the_gradients_together(build, minibatches):
    last = {}
    for weight in (0.0, 100.0):
        iga = build("IGA", penalty=weight, weight_decay=0.0)
        last[weight] = [iga.update(minibatches)["penalty"] for _ in range(60)][-1]
    assert last[100.0] < 0.1 * last[0.0]


def test_equal_minibatches_have_no_penalty(build, minibatches):
    assert build("IGA").update([minibatches[0]] * 3)["penalty"] == pytest.approx(0, abs=1e-20)


def test_frozen_and_unused_parameters_are_left_out(build, minibatches):
    iga = build("IGA")
    iga.featurizer.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    iga.featurizer.input.weight.requires_grad_(False)
    before = iga.featurizer.input.weight.clone()
    iga.update(minibatches)
    assert iga.featurizer.unused.tolist() == [1, 1]
    assert torch.equal(iga.featurizer.input.weight, before)

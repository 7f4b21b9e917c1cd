import pytest
import torch


def test_updates_anneal_and_restart_adam(build, minibatches, slow_network):
    vrex = build("VREx", vrex_lambda=20.0, vrex_penalty_anneal_iters=2)
    slow = slow_network(vrex)
    for update in range(4):
        step = vrex.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        mean = sum(risks) / 3
        penalty = sum((risk - mean) ** 2 for risk in risks) / 3
        if update == 2:
            slow.adam.reset()
        loss = mean + (20.0 if update >= 2 else 1.0) * penalty
        slow.adam.descend(loss)
        expected = {"loss": loss.item(), "nll": mean.item(), "penalty": penalty.item()}
        assert step == pytest.approx(expected, rel=1e-8)
        slow.assert_equal()


def test_penalty_weight_changes_the_weights(build, minibatches):
    results = []
    for weight in (0.0, 20.0):
        vrex = build("VREx", vrex_lambda=weight, vrex_penalty_anneal_iters=0)
        for _ in range(3):  # Adam's first step knows only the signs
            vrex.update(minibatches)
        results.append(vrex.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_order_of_the_minibatches_does_not_matter(build, minibatches):
    forward, backward = build("VREx"), build("VREx")
    assert forward.update(minibatches) == pytest.approx(backward.update(minibatches[::-1]), rel=1e-9)

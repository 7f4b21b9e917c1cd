import pytest
import torch

from domainbed import algorithms

GAME = {"t_lambda": 0.7, "delta": 0.2, "d_steps_per_g": 3, "lr_d": 0.4}


class SlowSGD:
    def __init__(self, weights, lr, weight_decay):
        self.weights, self.lr, self.weight_decay = weights, lr, weight_decay

    def descend(self, loss):
        for weight, gradient in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
            weight.data -= self.lr * (gradient + self.weight_decay * weight.detach())


def surrogate(weights, gradients):
    """A loss with those gradients."""
    return sum((weight * gradient).sum() for weight, gradient in zip(weights, gradients, strict=True))


def slow_gap(cross_entropy, slow, adversary, minibatches):
    risks = [cross_entropy(adversary(slow.featurizer(x)), y) for x, y in minibatches]
    return 0.7 * (max(risks) - min(risks))


def slow_projection(adversary, center, delta):
    """Whether the adversary was too far away and had to be moved back."""
    away = sum(((a - c) ** 2).sum() for a, c in zip(adversary, center, strict=True)).sqrt().item()
    for a, c in zip(adversary, center, strict=True):
        a.data = c.data + min(1.0, delta / away) * (a.data - c.data)
    return away > delta


@pytest.mark.parametrize("gda", [False, True])
def test_updates_equal_a_written_out_game(build, minibatches, slow_network, slow_mlp, slow_adam, cross_entropy, gda):
    transfer = build("Transfer", gda=gda, **GAME)
    slow, adversary = slow_network(transfer), slow_mlp(transfer.adv_classifier)
    groups = slow.featurizer.weights, slow.classifier.weights
    of_features, of_classes = ((SlowSGD if gda else slow_adam)(weights, 0.01, 0.1) for weights in groups)
    ascent, projections = SlowSGD(adversary.weights, 0.4, 0.0), []
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(2):
        loss = slow.risk(x, y)
        gradients = torch.autograd.grad(loss, [*groups[0], *groups[1]])
        of_features.descend(surrogate(groups[0], gradients[: len(groups[0])]))
        of_classes.descend(surrogate(groups[1], gradients[len(groups[0]) :]))
        of_features.descend(slow_gap(cross_entropy, slow, adversary, minibatches))
        for a, c in zip(adversary.weights, groups[1], strict=True):
            a.data = c.data.clone()
        for _ in range(3):
            gap = slow_gap(cross_entropy, slow, adversary, minibatches)
            ascent.descend(-gap)
            projections.append(slow_projection(adversary.weights, groups[1], 0.2))
        expected = {"loss": pytest.approx(loss.item(), rel=1e-8), "gap": pytest.approx(gap.item(), rel=1e-8)}
        assert transfer.update(minibatches) == expected
        slow.assert_equal()
        adversary.assert_equal()
    assert set(projections) == {True, False}
    torch.testing.assert_close(transfer.predict(x), slow.logits(x))


def weights(algorithm):
    modules = (algorithm.featurizer, algorithm.classifier)
    return torch.cat([weight.detach().flatten() for module in modules for weight in module.parameters()])


def test_the_control_is_erm_and_the_method_is_not(build, minibatches):
    results = {}
    for name, hparams in (("ERM", {}), ("Transfer", {}), ("Transfer", algorithms.Transfer.CONTROL)):
        algorithm = build(name, **hparams)
        for _ in range(3):
            values = algorithm.update(minibatches)
        results[name, bool(hparams)] = weights(algorithm)
    assert values["gap"] == 0
    torch.testing.assert_close(results["ERM", False], results["Transfer", True])
    assert not torch.allclose(results["ERM", False], results["Transfer", False])


def test_descent_and_ascent_train_featurizer_and_classifier(build, minibatches):
    """In DomainBed, gda trains neither."""
    transfer = build("Transfer", gda=True, weight_decay=0.0, momentum=0.9)
    before = [weight.detach().clone() for weight in transfer.parameters()]
    transfer.update(minibatches)
    assert not any(torch.equal(*pair) for pair in zip(before, transfer.parameters(), strict=True))
    (group,) = transfer.optimizer.param_groups
    assert (type(transfer.optimizer), group["momentum"]) == (torch.optim.SGD, 0.0)


@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_adversary_stays_near_the_classifier(build, minibatches, delta):
    transfer = build("Transfer", delta=delta, lr_d=5.0)
    for _ in range(2):
        transfer.update(minibatches)
        away = algorithms.l2_between_dicts(transfer.adv_classifier.state_dict(), transfer.classifier.state_dict())
        assert (away * 15).sqrt().item() == pytest.approx(delta, rel=1e-6, abs=1e-12)  # 4 x 3 weights and 3 biases


def test_the_adversary_raises_the_gap(build, minibatches):
    gaps = [build("Transfer", d_steps_per_g=steps, lr=0.0, lr_d=0.1).update(minibatches)["gap"] for steps in (1, 5, 20)]
    assert gaps == sorted(set(gaps))


def test_state_has_domainbeds_roots(build, minibatches):
    transfer = build("Transfer")
    transfer.update(minibatches)
    state = transfer.state_dict()
    assert {name.split(".")[0] for name in state} == {"update_count", "featurizer", "classifier", "adv_classifier"}
    assert state["update_count"].tolist() == [0]


@pytest.mark.parametrize(("given", "least"), [({"d_steps_per_g": 0}, 1), ({"delta": -0.5}, 0)])
def test_a_game_without_moves_is_refused(build, given, least):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"hparam {name} is {value}; give {least} or more"):
        build("Transfer", **given)


def test_one_minibatch_is_refused():
    with pytest.raises(ValueError, match="Transfer compares at least 2 minibatches, this partition has 1"):
        algorithms.Transfer.from_task(algorithms.base.Task((5,), 3, 1), {})


def test_the_adversary_begins_at_the_classifier(build):
    transfer = build("Transfer")
    pairs = zip(transfer.adv_classifier.parameters(), transfer.classifier.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_the_gap_is_not_rounded_under_autocast(build, minibatches):
    transfer = build("Transfer").float()
    features, labels = [torch.randn(7, 4), torch.randn(6, 4)], [y for _, y in minibatches[:2]]
    expected = transfer._gap(features, labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert transfer._gap(features, labels).item() == pytest.approx(expected, rel=1e-6)

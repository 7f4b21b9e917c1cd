"""Optimizers by name, and each method's control."""

import pytest
import torch

from domainbed import algorithms, hparams_registry, registry
from domainbed.algorithms.base import make_optimizer
from domainbed.algorithms.explained import ExplainedERM

CONTROLS = {name: registry.attribute("algorithms", name, "CONTROL", {}) for name in registry.names("algorithms")}
OF_ERM = [  # that train on plain vectors in one stage; the others show it in tests of their own
    name
    for name, control in CONTROLS.items()
    if control
    and issubclass(getattr(algorithms, name), algorithms.ERM)
    and not issubclass(getattr(algorithms, name), ExplainedERM)
    and not getattr(algorithms, name).NEEDS_MASKS
    and not getattr(algorithms, name).NEEDS_CONFOUNDERS
    and not getattr(algorithms, name).STAGES
    and name != "URM"  # whose control keeps its activation
]


class SlowSGD:
    """Descends ``v <- momentum v + gradient + weight_decay w``, ``w <- w - lr v``."""

    def __init__(self, weights, lr, weight_decay, momentum):
        self.weights, self.lr, self.weight_decay, self.momentum = weights, lr, weight_decay, momentum
        self.velocities = [torch.zeros_like(weight) for weight in weights]

    def descend(self, loss):
        gradients = torch.autograd.grad(loss, self.weights)
        for weight, velocity, gradient in zip(self.weights, self.velocities, gradients, strict=True):
            velocity.mul_(self.momentum).add_(gradient + self.weight_decay * weight.detach())
            weight.data -= self.lr * velocity


@pytest.mark.parametrize(("given", "momentum"), [({}, 0.9), ({"momentum": 0.5}, 0.5), ({"momentum": 0}, 0.0)])
def test_updates_with_sgd_equal_written_out_training(build, minibatches, slow_network, given, momentum):
    erm = build("ERM", optimizer="sgd", **given)
    slow = slow_network(erm)
    sgd = SlowSGD(slow.adam.weights, 0.01, 0.1, momentum)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(4):
        erm.update(minibatches)
        sgd.descend(slow.risk(x, y))
        slow.assert_equal()


def test_the_restart_at_the_switch_forgets_the_momentum(build, minibatches, slow_network):
    vrex = build("VREx", optimizer="sgd", vrex_lambda=2.0, vrex_penalty_anneal_iters=2)
    slow = slow_network(vrex)
    for update in range(4):
        if update in (0, 2):
            sgd = SlowSGD(slow.adam.weights, 0.01, 0.1, 0.9)
        vrex.update(minibatches)
        risk = torch.stack([slow.risk(x, y) for x, y in minibatches])
        sgd.descend(risk.mean() + (2.0 if update >= 2 else 1.0) * risk.var(correction=0))
        slow.assert_equal()


@pytest.mark.parametrize("given", [{}, {"optimizer": "adam"}, {"optimizer": "adam", "momentum": 0.1}])
def test_adam_is_the_default_bit_by_bit(given):
    torch.manual_seed(0)
    ours, torchs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    torchs.load_state_dict(ours.state_dict())
    optimizers = [
        make_optimizer(ours.parameters(), 0.01, 0.1, given, betas=(0.5, 0.9)),
        torch.optim.Adam(torchs.parameters(), lr=0.01, weight_decay=0.1, betas=(0.5, 0.9)),
    ]
    for x in torch.randn(5, 2, 4):
        for network, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, torchs.weight)
    assert make_optimizer(ours.parameters(), 1.0, 0.0, given).defaults["betas"] == (0.9, 0.999)


def test_an_unknown_optimizer_is_refused(build):
    with pytest.raises(ValueError, match="hparam optimizer is 'sdg'; take adam or sgd"):
        build("ERM", optimizer="sdg")


@pytest.mark.parametrize("name", ["DANN", "CDANN"])
def test_both_optimizers_of_the_game_follow_the_hparam(build, name):
    dann = build(name, optimizer="sgd", momentum=0.25, lr_g=0.02, lr_d=0.03, weight_decay_d=0.2)
    for optimizer, lr, weight_decay in ((dann.gen_opt, 0.02, 0.0), (dann.disc_opt, 0.03, 0.2)):
        assert isinstance(optimizer, torch.optim.SGD)
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (lr, weight_decay, 0.25)


def weights(algorithm):
    return [*algorithm.featurizer.state_dict().values(), *algorithm.classifier.state_dict().values()]


def trained(build, minibatches, name, **hparams):
    """Weights of featurizer and classifier after three updates."""
    algorithm = build(name, **hparams)
    for step in range(3):
        algorithm.update([(x.roll(step, 1), y) for x, y in minibatches])
    return weights(algorithm)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", OF_ERM)
def test_a_control_is_erm_and_the_method_is_not(build, minibatches, name, optimizer):
    alike = [(x[:5], y[:5]) for x, y in minibatches]  # so that the mean over minibatches is that over images
    erm = trained(build, alike, "ERM", optimizer=optimizer)
    control = trained(build, alike, name, optimizer=optimizer, **CONTROLS[name])
    for a, b in zip(erm, control, strict=True):
        torch.testing.assert_close(a, b)
    anneal = [key for key in hparams_registry.default_hparams(name, "Debug28") if key.endswith("anneal_iters")]
    method = trained(build, alike, name, optimizer=optimizer, **dict.fromkeys(anneal, 0))
    assert not all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(erm, method, strict=True))


def test_which_methods_have_a_control():
    assert {"IRM", "GroupDRO", "CORAL", "MMD", "VREx", "SGT"} <= set(OF_ERM)
    assert CONTROLS["DANN"] == CONTROLS["CDANN"] == {"lambda": 0.0}
    assert CONTROLS["ERM"] == CONTROLS["Mixup"] == {}


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control])
def test_controls_are_hparams_of_their_class(name):
    cls = algorithms.get_algorithm_class(name)
    assert CONTROLS[name] == cls.CONTROL
    hparams_registry.check_given(cls, "Debug28", CONTROLS[name])


@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_what_is_not_read_is_in_the_shared_table(name):
    cls = algorithms.get_algorithm_class(name)
    assert set(registry.attribute("algorithms", name, "UNREAD_HPARAMS", ())) == set(cls.UNREAD_HPARAMS)
    assert set(cls.UNREAD_HPARAMS) <= hparams_registry.SHARED.keys() - cls.HPARAMS.keys()

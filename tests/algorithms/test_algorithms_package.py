import numpy as np
import pytest
import torch
from torch import nn

from domainbed import algorithms, hparams_registry, registry
from domainbed.algorithms.base import DOMAINBED_ORDER, REGISTRY
from domainbed.algorithms.erm import ERM

PLUGIN = '''
import torch
import torch.nn.functional as F

from domainbed.algorithms.base import register
from domainbed.algorithms.erm import ERM


@register
class WorstRisk(ERM):
    """ERM on a soft maximum of the risks: ``t * logsumexp(risk / t)``; risk is (E,), in nats."""

    HPARAMS = {"worst_risk_t": (1.0, lambda r: 10 ** r.uniform(-1, 1))}  # default, how to draw

    def update(self, minibatches, unlabeled=None):
        risk = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches])  # (E,)
        t = self.hparams["worst_risk_t"]
        loss = t * torch.logsumexp(risk / t, dim=0)
        self.step(loss)  # zero_grad, backward, step
        return {"loss": loss.item(), "worst_risk": risk.max().item()}
'''


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    monkeypatch.setattr(REGISTRY, "names", list(REGISTRY.names))


@pytest.mark.usefixtures("own_registry")
def test_a_plugin_file_is_a_whole_algorithm(tmp_path, monkeypatch, build, minibatches):
    path = tmp_path / "worst_risk_example.py"
    path.write_text(PLUGIN)
    monkeypatch.setenv(registry.PLUGINS_VARIABLE, str(path))
    registry.load_plugins("algorithms")

    assert REGISTRY.names[-1] == "WorstRisk"
    assert algorithms.get_algorithm_class("WorstRisk") is algorithms.WorstRisk
    assert hparams_registry.default_hparams("WorstRisk", "Debug28")["worst_risk_t"] == 1.0
    assert 0.1 < hparams_registry.random_hparams("WorstRisk", "Debug28", 1)["worst_risk_t"] < 10
    step = build("WorstRisk").update(minibatches)
    assert step["loss"] > step["worst_risk"] > 0


def test_pasted_class_set_from_outside_is_found(monkeypatch, minibatches):
    class Pasted(algorithms.ERM):
        def __init__(self, input_shape, num_classes, num_domains, hparams):
            super().__init__(input_shape, num_classes, num_domains, hparams)
            self.register_buffer("update_count", algorithms.torch.tensor([0]))
            self.network = algorithms.nn.Sequential(self.featurizer, self.classifier)

        def update(self, minibatches, unlabeled=None):
            pairs = algorithms.random_pairs_of_minibatches(minibatches)
            loss = sum(algorithms.F.cross_entropy(self.network(x), y) for (x, y), _ in pairs) / len(pairs)
            grads = algorithms.autograd.grad(loss, self.network.parameters())
            for parameter, grad in zip(self.network.parameters(), grads, strict=True):
                parameter.grad = grad
            self.optimizer.step()
            return {"loss": loss.item()}

    monkeypatch.setattr(algorithms, "Pasted", Pasted, raising=False)
    assert algorithms.get_algorithm_class("Pasted") is Pasted
    assert registry.attribute("algorithms", "Pasted", "MIN_PARTS") == 1
    hparams = hparams_registry.default_hparams("Pasted", "Debug28")
    assert hparams == hparams_registry.default_hparams("ERM", "Debug28")
    pasted = Pasted((5,), 3, 3, hparams | {"mlp_width": 4, "mlp_depth": 2, "mlp_dropout": 0.0})
    assert pasted.double().update(minibatches)["loss"] > 0


def test_replacing_a_class_from_outside_wins(monkeypatch):
    class Mine(ERM):
        pass

    monkeypatch.setattr(algorithms, "ERM", Mine)
    assert algorithms.get_algorithm_class("ERM") is Mine


@pytest.mark.parametrize("name", ["np", "torch", "OrderedDict", "ALGORITHMS", "concatenate", "missing"])
def test_names_that_are_no_algorithm_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"algorithm not found: {name}"):
        algorithms.get_algorithm_class(name)


def test_miss_names_the_nearest():
    with pytest.raises(NotImplementedError, match="algorithm not found: GroupDR0; did you mean GroupDRO"):
        algorithms.find("GroupDR0")


def test_unknown_attribute_is_an_attribute_error():
    assert not hasattr(algorithms, "NoSuchThing")


def test_names_that_domainbeds_users_import():
    assert algorithms.np is np
    assert algorithms.torch is torch
    assert algorithms.nn is nn
    assert algorithms.copy.deepcopy([1]) == [1]
    assert algorithms.networks.Featurizer
    assert issubclass(algorithms.CORAL, algorithms.AbstractMMD)
    assert issubclass(algorithms.CDANN, algorithms.AbstractDANN)
    assert issubclass(algorithms.IRM, algorithms.Algorithm)


def test_list_is_live_and_in_domainbeds_order():
    assert algorithms.ALGORITHMS is REGISTRY.names
    known = [name for name in algorithms.ALGORITHMS if name in DOMAINBED_ORDER]
    assert known == sorted(known, key=DOMAINBED_ORDER.index)
    assert {"ERM", "IRM", "GroupDRO", "Mixup", "CORAL", "MMD", "DANN", "CDANN", "VREx"} <= set(known)
    read = registry.names("algorithms")  # from the files, without an import
    assert [name for name in algorithms.ALGORITHMS if name in read] == read

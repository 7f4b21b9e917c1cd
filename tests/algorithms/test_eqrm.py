import copy
import math

import pytest
import torch

from domainbed import state_trees
from domainbed.algorithms.base import REGISTRY, Task

SWITCH = {"eqrm_burnin_iters": 1.5, "eqrm_lr": 0.003, "eqrm_quantile": 0.8}  # the third update is the quantile's first


def slow_quantile(values, q):
    """Bisection between the quantiles of the outer kernels, through which autograd goes step by step."""
    mean = sum(values) / len(values)
    width = 1.06 * (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 / len(values) ** 0.2
    reach = width * math.sqrt(2) * torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64))
    low, high = min(values) + reach, max(values) + reach
    for _ in range(60):
        middle = (low + high) / 2
        below = sum((1 + torch.erf((middle - v) / width / math.sqrt(2))) / 2 for v in values) / len(values)
        low, high = (low, middle) if below > q else (middle, high)
    return (low + high) / 2


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    eqrm = build("EQRM", **SWITCH)
    slow = slow_network(eqrm)
    for update in range(5):
        step = eqrm.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        if update == 2:
            slow.adam.reset()
            slow.adam.lr = 0.003
        loss = slow_quantile(risks, 0.8) if update >= 2 else sum(risks) / 3
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-8)}
        slow.assert_equal()
    assert eqrm.update_count.tolist() == [5]


def test_quantile_changes_the_weights(build, minibatches):
    results = []
    for quantile in (0.5, 0.99):
        eqrm = build("EQRM", **SWITCH | {"eqrm_quantile": quantile})
        for _ in range(5):
            eqrm.update(minibatches)
        results.append(eqrm.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_burn_in_is_the_mean_risk(build, minibatches):
    eqrm, plain = build("EQRM"), build("GroupDRO", groupdro_eta=0.0)
    for _ in range(3):
        assert eqrm.update(minibatches) == pytest.approx(plain.update(minibatches))
    torch.testing.assert_close(eqrm.classifier.weight, plain.classifier.weight)


def test_without_burn_in_the_first_update_has_the_second_learning_rate(build, minibatches):
    eqrm = build("EQRM", eqrm_burnin_iters=0, eqrm_lr=0.003)
    eqrm.update(minibatches)
    assert eqrm.optimizer.param_groups[0]["lr"] == 0.003


class Greatest:
    """The greatest risk, whatever the probability."""

    def estimate_parameters(self, x):
        self.greatest = x.max()

    def icdf(self, q):
        return self.greatest


def test_another_distribution(build, minibatches):
    plain = build("EQRM", eqrm_burnin_iters=0)
    eqrm = type(plain)((5,), 3, 3, plain.hparams, dist=Greatest()).double()
    eqrm.load_state_dict(plain.state_dict())
    with torch.no_grad():
        risks = [torch.nn.functional.cross_entropy(plain.predict(x), y).item() for x, y in minibatches]
    assert eqrm.update(minibatches)["loss"] == pytest.approx(max(risks))


@pytest.mark.parametrize("dist", [None, Greatest()])
def test_no_graph_outlives_its_update(build, minibatches, dist):
    plain = build("EQRM", eqrm_burnin_iters=0)
    eqrm = type(plain)((5,), 3, 3, plain.hparams, dist=dist).double()
    eqrm.update(minibatches)
    kept = [value for value in vars(eqrm.dist).values() if isinstance(value, torch.Tensor)]
    assert kept
    assert not any(value.requires_grad for value in kept)
    assert copy.deepcopy(eqrm).update(minibatches) == eqrm.update(minibatches)


def test_quantiles_go_on_in_a_fresh_instance(build, minibatches):
    whole, fresh = build("EQRM", **SWITCH), build("EQRM", **SWITCH)
    for _ in range(3):
        whole.update(minibatches)
    state_trees.restore(copy.deepcopy(state_trees.capture(whole)), fresh)
    for _ in range(2):
        assert fresh.update(minibatches) == whole.update(minibatches)
    assert torch.equal(fresh.classifier.weight, whole.classifier.weight)


def test_state_is_domainbeds(build):
    state = build("EQRM").state_dict()
    assert [*state][:2] == ["update_count", "alpha"]
    assert (state["alpha"].dtype, state["alpha"].shape, state["alpha"].item()) == (torch.float64, (), 0.75)


def test_second_learning_rate_goes_on_in_a_fresh_instance(build, minibatches):
    whole, fresh = build("EQRM", **SWITCH), build("EQRM", **SWITCH)
    for _ in range(3):
        whole.update(minibatches)
    state_trees.restore(state_trees.capture(whole), fresh)
    assert fresh.optimizer.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize("quantile", [0.0, 1.0, 1.5, math.nan])
def test_impossible_quantiles_are_refused(build, quantile):
    with pytest.raises(ValueError, match=rf"hparam eqrm_quantile is {quantile}; give a probability in \(0, 1\)"):
        build("EQRM", eqrm_quantile=quantile)


@pytest.mark.parametrize("name", ["ANDMask", "SANDMask", "IGA", "Fishr", "EQRM"])
def test_one_minibatch_is_refused(build, name):
    with pytest.raises(ValueError, match=f"{name} compares at least 2 minibatches"):
        REGISTRY[name].from_task(Task((5,), 3, 1), build(name).hparams)

import pytest
import torch

from domainbed.algorithms import Algorithm
from domainbed.algorithms.base import Task


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    erm = build("ERM")
    slow = slow_network(erm)
    for _ in range(3):
        step = erm.update(minibatches)
        loss = slow.risk(torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches]))
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        assert type(step["loss"]) is float
        slow.assert_equal()


def test_attributes_that_other_peoples_subclasses_use(build, minibatches):
    erm = build("ERM")
    assert erm.network[0] is erm.featurizer
    assert erm.network[1] is erm.classifier
    assert {name.split(".")[0] for name in erm.state_dict()} == {"featurizer", "classifier", "network"}
    assert erm.featurizer.n_outputs == 4
    assert erm.optimizer.param_groups[0]["lr"] == 0.01
    x, _ = minibatches[0]
    torch.testing.assert_close(erm.predict(x), erm.network(x))
    assert erm.predict(x).shape == (7, 3)


def test_hparams_are_the_callers_dict(build):
    hparams = build("ERM").hparams
    algorithm = Algorithm((5,), 3, 3, hparams)
    assert algorithm.hparams is hparams


@pytest.mark.parametrize("name", ["MMD", "CORAL", "DANN", "CDANN"])
def test_methods_that_compare_minibatches_refuse_one(build, name):
    algorithm = type(build(name))
    with pytest.raises(ValueError, match=f"{name} compares at least 2 minibatches, this partition has 1"):
        algorithm.from_task(Task((5,), 3, 1), {})

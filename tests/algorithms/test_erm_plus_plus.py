import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed import algorithms
from domainbed.lib.lars import LARS
from domainbed.lib.weight_average import ErmPlusPlusMovingAvg


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def data(minibatches):
    return torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])


def test_updates_equal_a_written_out_run(build, minibatches, slow_network, slow_adam):
    """Two updates of the classifier, five of everything; the mean begins with the third update's weights."""
    erm = build("ERMPlusPlus", linear_steps=1, linear_lr=0.05)
    erm.sma_start_iter = 4
    slow = slow_network(erm)
    linear_adam = slow_adam(slow.classifier.weights, 0.05, 0.1)
    x, y = data(minibatches)
    averaged = []
    for update in range(7):
        step = erm.update(minibatches)
        loss = slow.risk(x, y)
        (linear_adam if update < 2 else slow.adam).descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-8)}
        slow.assert_equal()
        weights = [weight.detach().clone() for weight in slow.adam.weights]
        averaged = [*averaged, weights] if update >= 3 else [weights]
        mean = [sum(some) / len(some) for some in zip(*averaged, strict=True)]
        for expected, weight in zip(mean, erm.network_sma.parameters(), strict=True):
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-10)
    assert (erm.global_iter, erm.sma_count, len(averaged)) == (7, 4, 5)
    for weight, expected in zip(slow.adam.weights, mean, strict=True):
        weight.data = expected
    torch.testing.assert_close(erm.predict(x).detach(), slow.logits(x).detach())


def test_without_its_ingredients_it_is_erm(build, minibatches):
    x, _ = data(minibatches)
    erm, plain = build("ERMPlusPlus", linear_steps=-1), build("ERM")
    for _ in range(3):
        assert erm.update(minibatches) == plain.update(minibatches)
    torch.testing.assert_close(erm.predict(x), plain.predict(x), rtol=0, atol=0)


def test_the_average_and_the_first_phase_matter(build, minibatches):
    x, _ = data(minibatches)
    erm, plain = build("ERMPlusPlus", linear_steps=0), build("ERM")
    before = flat(erm.featurizer)
    erm.update(minibatches)
    assert torch.equal(flat(erm.featurizer), before)
    assert all(parameter.grad is None for parameter in erm.featurizer.parameters())
    erm.update(minibatches)
    assert not torch.equal(flat(erm.featurizer), before)
    erm = build("ERMPlusPlus", linear_steps=-1)
    erm.sma_start_iter = 2
    for _ in range(3):
        erm.update(minibatches), plain.update(minibatches)
    assert torch.equal(flat(erm.network), flat(plain.network))
    assert not torch.allclose(erm.predict(x), plain.predict(x))


def test_statistics_are_averaged_and_their_counts_are_not():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    moving = ErmPlusPlusMovingAvg(network)
    moving.sma_start_iter = 2
    seen = []
    for n in range(3):
        network(torch.randn(8, 3) + n)
        moving.update_sma()
        seen.append(network[0].running_mean.clone())
    torch.testing.assert_close(moving.network_sma[0].running_mean, sum(seen) / 3)
    assert moving.network_sma[0].num_batches_tracked == 0


def with_batch_norm(build, **hparams):
    erm = build("ERMPlusPlus", linear_steps=-1, **hparams)
    erm.featurizer = nn.Sequential(nn.BatchNorm1d(5), erm.featurizer).double()
    erm.network = nn.Sequential(erm.featurizer, erm.classifier)
    ErmPlusPlusMovingAvg.__init__(erm, erm.network)
    return erm


def test_the_averaged_network_sees_the_images_of_a_step(build, minibatches):
    x, _ = data(minibatches)
    frozen, erm = with_batch_norm(build, freeze_bn=True), with_batch_norm(build)
    for algorithm in (frozen, erm):
        algorithm.update(minibatches)
    copied = frozen.network_sma[0][0].running_mean
    torch.testing.assert_close(copied, 0.1 * x.mean(0))
    torch.testing.assert_close(erm.network_sma[0][0].running_mean, 0.9 * copied + 0.1 * x.mean(0))
    assert all(parameter.grad is None for parameter in erm.network_sma.parameters())


def test_its_dropout_draws_as_in_domainbed(build, minibatches):
    """Masks are drawn twice in an update: one for the network, one for the average."""
    states = []
    for rate in (0.0, 0.5):
        erm = build("ERMPlusPlus", mlp_dropout=rate)
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(type(erm.network_sma), "forward", watched(nn.Sequential.forward, seen))
            erm.update(minibatches)
        states.append(len([module for module in seen if module in (erm.network, erm.network_sma)]))
    assert states == [1, 2]


def watched(function, seen):
    def call(self, x):
        seen.append(self)
        return function(self, x)

    return call


def test_the_learning_rate_falls_where_the_risk_does_not(build, minibatches):
    erm = build("ERMPlusPlus", linear_steps=0, lr=0.01)
    loaders = [minibatches[:2], minibatches[2:]]
    assert erm.set_lr(eval_loaders_iid=loaders) is None
    assert erm.set_lr(schedule=[[0.5]]) == [[0.5]]
    erm.update(minibatches)
    found = [copy.deepcopy(erm.set_lr(eval_loaders_iid=loaders, device="cpu")) for _ in range(7)]
    rates = [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001, 0.0]
    assert found == [[[pytest.approx(rate)] for rate in rates[: n + 1]] for n in range(7)]
    with torch.no_grad():
        (a, b), (c,) = ([F.cross_entropy(erm.predict(x), y).item() for x, y in loader] for loader in loaders)
    assert erm.scheduler.best == pytest.approx(((a + b) / 2 + c) / 2)
    assert not erm.network_sma.training


def test_a_falling_risk_keeps_the_learning_rate(build, minibatches):
    erm = build("ERMPlusPlus", linear_steps=-1, lr=0.01)
    for _ in range(6):
        erm.update(minibatches)
        schedule = erm.set_lr(eval_loaders_iid=[minibatches])
    assert schedule == [[0.01]] * 6


def test_a_schedule_is_followed_to_its_end_and_beyond(build):
    erm = build("ERMPlusPlus", linear_steps=-1)
    left = erm.set_lr(schedule=[[0.5], [0.25]])
    assert (left, erm.optimizer.param_groups[0]["lr"]) == ([[0.25]], 0.5)
    left = erm.set_lr(schedule=left)
    assert (left, erm.set_lr(schedule=left), erm.optimizer.param_groups[0]["lr"]) == ([], [], 0.25)
    with pytest.raises(ValueError, match="neither validation loaders nor a schedule"):
        erm.set_lr()


def test_a_model_predicts_by_the_averaged_weights(build, minibatches):
    erm, fresh = build("ERMPlusPlus", linear_steps=1), build("ERMPlusPlus")
    erm.sma_start_iter = 2
    for _ in range(3):
        erm.update(minibatches)
    fresh.load_state_dict(erm.state_dict())
    x, _ = data(minibatches)
    assert torch.equal(fresh.predict(x), erm.predict(x))
    assert not torch.equal(erm.network(x), erm.predict(x))


def test_lars_moves_each_layer_by_a_share_of_its_weights():
    torch.manual_seed(0)
    matrix, bias, zero = (nn.Parameter(w) for w in (torch.randn(3, 2), torch.randn(3), torch.zeros(2, 2)))
    optimizer = LARS([matrix, bias, zero], lr=0.5, weight_decay=0.1, momentum=0.8, trust_coefficient=0.01)
    slow = [(w.detach().clone(), torch.zeros_like(w)) for w in (matrix, bias, zero)]
    for _ in range(3):
        optimizer.zero_grad()
        (matrix.pow(3).sum() + bias.exp().sum() + zero.sum()).backward()
        optimizer.step()
        w, momentum = slow[0]
        d = 3 * w**2 + 0.1 * w
        momentum.mul_(0.8).add_(0.01 * w.norm() / d.norm() * d)
        w -= 0.5 * momentum
        w, momentum = slow[1]
        momentum.mul_(0.8).add_(w.exp())
        w -= 0.5 * momentum
        for parameter, (expected, _) in zip((matrix, bias), slow[:2], strict=True):
            torch.testing.assert_close(parameter.detach(), expected)
    first = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([first], lr=0.5)
    first.sum().backward()
    optimizer.step()
    assert torch.equal(first.detach(), torch.full((2, 2), -0.5))  # weights of norm 0 have the rate 1
    assert "mu" in optimizer.state[first]


def test_lars_takes_a_closure_and_no_negative_numbers():
    weight = nn.Parameter(torch.ones(2))

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.1).step(closure).item() == 2
    with pytest.raises(ValueError, match=r"no negative numbers, got \{'lr': -1\}"):
        LARS([weight], lr=-1)


def test_it_trains_with_lars(build, minibatches):
    erm = build("ERMPlusPlus", lars=True, linear_steps=0, weight_decay=0.0, lr=0.5)
    assert isinstance(erm.optimizer, LARS)
    assert isinstance(erm.linear_optimizer, LARS)
    losses = [erm.update(minibatches)["loss"] for _ in range(60)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="lars and optimizer 'sgd': give one of them"):
        build("ERMPlusPlus", lars=True, optimizer="sgd")


def test_others_inherit_its_average():
    assert issubclass(algorithms.ERMPlusPlus, ErmPlusPlusMovingAvg)


def test_it_predicts_in_evaluation_mode(build, minibatches):
    erm = build("ERMPlusPlus", mlp_dropout=0.5)
    erm.update(minibatches)
    x = minibatches[0][0]
    assert torch.equal(erm.train().predict(x), erm.eval().predict(x))

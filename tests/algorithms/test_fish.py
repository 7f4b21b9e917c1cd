from types import SimpleNamespace

import pytest
import torch

from domainbed import algorithms


def parts(network):
    return SimpleNamespace(featurizer=network.net[0], classifier=network.net[1])


def trained(build, minibatches, **hparams):
    fish = build("Fish", **hparams)
    for _ in range(2):
        fish.update(minibatches)
    return fish


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    fish = build("Fish", meta_lr=0.3)
    slow, inner = slow_network(parts(fish.network)), slow_network(parts(fish.network))
    for _ in range(3):
        step = fish.update(minibatches)
        for own, weight in zip(slow.adam.weights, inner.adam.weights, strict=True):
            weight.data = own.data.clone()
        for x, y in minibatches:
            loss = inner.risk(x, y)
            inner.adam.descend(loss)  # its moments go on from update to update
        for own, weight in zip(slow.adam.weights, inner.adam.weights, strict=True):
            own.data = own.data + 0.3 * (weight.data - own.data)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()
    x = minibatches[0][0]
    torch.testing.assert_close(fish.predict(x), slow.logits(x))


def test_the_order_of_the_minibatches_matters_as_it_does_not_to_erm(build, minibatches):
    """What raises the gradients' inner product is that the steps follow one another."""
    results = {}
    for name in ("ERM", "Fish"):
        ours = [build(name, optimizer="sgd", momentum=0.0, lr=0.1) for _ in range(2)]
        for algorithm, order in zip(ours, (minibatches, minibatches[::-1]), strict=True):
            algorithm.update(order)
        results[name] = [torch.cat([w.flatten() for w in it.network.parameters()]) for it in ours]
    torch.testing.assert_close(*results["ERM"])
    assert not torch.allclose(*results["Fish"])


def test_meta_lr_is_the_share_of_the_way(build, minibatches):
    start = build("Fish").network.net[1].weight.detach()
    moves = [build("Fish", meta_lr=share) for share in (0.25, 1.0)]
    for fish in moves:
        fish.update(minibatches)
    quarter, whole = (fish.network.net[1].weight.detach() - start for fish in moves)
    torch.testing.assert_close(quarter, whole / 4)
    torch.testing.assert_close(moves[1].network.net[1].weight, moves[1].network_inner.net[1].weight)


def test_batch_statistics_move_like_the_weights(build, minibatches):
    fish = build("Fish", meta_lr=0.5)
    for network in (fish.network, fish.network_inner):
        network.net.insert(0, torch.nn.BatchNorm1d(5).double())
    fish.update(minibatches)
    inner = torch.zeros(5, dtype=torch.float64)
    for x, _ in minibatches:
        inner = 0.9 * inner + 0.1 * x.mean(0)
    torch.testing.assert_close(fish.network.net[0].running_mean, inner / 2)


def test_its_methods_serve_others(build, minibatches):
    """A subclass of DomainBed's Fish calls both by name."""
    fish = trained(build, minibatches)
    optimizer, moments = fish.optimizer_inner, len(fish.optimizer_inner.state)
    fish.create_clone(torch.device("cpu"))
    assert all(
        torch.equal(*pair) for pair in zip(fish.network.parameters(), fish.network_inner.parameters(), strict=True)
    )
    assert fish.optimizer_inner is optimizer
    assert len(optimizer.state) == moments > 0
    moved = fish.fish({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])}, lr_meta=0.1)
    assert moved["w"].tolist() == pytest.approx([1.1, 1.8])


@pytest.mark.parametrize("with_inner", [True, False])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_domainbeds_files_load(build, minibatches, with_inner, prefix):
    """DomainBed's have an inner network from the first update on."""
    fish, fresh = trained(build, minibatches), build("Fish")
    state = {prefix + k: v for k, v in fish.state_dict().items() if with_inner or "inner" not in k}
    names = list(state)
    (torch.nn.Sequential(fresh) if prefix else fresh).load_state_dict(state)
    assert list(state) == names  # the caller's dict stays as it was
    x = minibatches[0][0]
    assert torch.equal(fresh.predict(x), fish.predict(x))
    assert torch.equal(fresh.network_inner(x), (fish.network_inner if with_inner else fish.network)(x))


def test_a_missing_weight_is_still_an_error(build):
    fish = build("Fish")
    state = fish.state_dict()
    del state["network.net.1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.* \"network.net.1.bias\""):
        fish.load_state_dict(state)


def test_state_has_domainbeds_roots(build):
    names = {".".join(name.split(".")[:3]) for name in build("Fish").state_dict()}
    assert names == {f"{root}.net.{i}" for root in ("network", "network_inner") for i in (0, 1)}


def test_standing_still_is_refused(build):
    with pytest.raises(ValueError, match=r"hparam meta_lr is 0\.0; give a number above 0"):
        build("Fish", meta_lr=0.0)


def test_one_minibatch_is_refused():
    with pytest.raises(ValueError, match="Fish compares at least 2 minibatches, this partition has 1"):
        algorithms.Fish.from_task(algorithms.base.Task((5,), 3, 1), {})

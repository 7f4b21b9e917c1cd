import math

import pytest
import torch

from domainbed import algorithms

NAMES = ["CAD", "CondCAD"]


def slow_bottleneck(z, y, parts, temperature, flipped, conditional):
    """Image by image: how likely its neighbours are from the other (or its own) minibatch."""
    losses, n = [], len(z)
    for i in range(n):
        mates = [j for j in range(n) if j != i and y[j] == y[i]]
        pool = mates if conditional else [j for j in range(n) if j != i]
        targets = [j for j in pool if (parts[j] != parts[i]) == flipped]
        if not mates or not targets:
            continue
        similarity = {j: torch.exp((z[i] * z[j]).sum() / temperature) for j in pool}
        share = sum(similarity[j] for j in targets) / sum(similarity.values())
        losses.append((-1 if flipped else 1) * temperature / 0.07 * share.log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_updates_equal_written_out_training(build, minibatches, slow_network, name, flipped, normalized):
    cad = build(name, lmbda=2.0, temperature=0.5, is_flipped=flipped, is_normalized=normalized)
    slow, parts = slow_network(cad), [0] * 7 + [1] * 6 + [2] * 5
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(3):
        step = cad.update(minibatches)
        z = slow.featurizer(x)
        z = z / (z**2).sum(1, keepdim=True) ** 0.5 if normalized else z
        bottleneck = slow_bottleneck(z, y.tolist(), parts, 0.5, flipped, name == "CondCAD")
        risk = slow.risk(x, y)
        slow.adam.descend(risk + 2.0 * bottleneck)
        expected = {"clf_loss": risk, "bn_loss": bottleneck, "total_loss": risk + 2.0 * bottleneck}
        assert step == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-8)
        slow.assert_equal()


@pytest.mark.parametrize("name", NAMES)
def test_the_control_is_erm_and_the_bottleneck_changes_the_weights(build, minibatches, name):
    erm, control = build("ERM"), build(name, **algorithms.get_algorithm_class(name).CONTROL)
    method = build(name, lmbda=2.0)
    for _ in range(3):
        values = [algorithm.update(minibatches) for algorithm in (erm, control, method)]
    assert values[1]["clf_loss"] == values[1]["total_loss"] == values[0]["loss"]
    assert torch.equal(erm.classifier.weight, control.classifier.weight)
    assert not torch.allclose(erm.featurizer.input.weight, method.featurizer.input.weight)


@pytest.mark.parametrize("name", NAMES)
def test_projection_trains_and_is_what_the_bottleneck_sees(build, minibatches, slow_mlp, name):
    """DomainBed ends in a NameError here."""
    cad = build(name, is_project=True, is_normalized=True)
    assert [tuple(cad.state_dict()[f"project.{i}.weight"].shape) for i in (0, 2)] == [(4, 4), (128, 4)]
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    parts = [0] * 7 + [1] * 6 + [2] * 5
    z = slow_mlp(cad.project)(cad.featurizer(x).detach())
    z = z / (z**2).sum(1, keepdim=True) ** 0.5
    expected = slow_bottleneck(z, y.tolist(), parts, 0.1, True, name == "CondCAD").item()
    before = cad.project[2].weight.detach().clone()
    assert cad.update(minibatches)["bn_loss"] == pytest.approx(expected, rel=1e-8)
    assert not torch.equal(cad.project[2].weight, before)


def test_two_pairs_by_hand(build):
    """Equal features everywhere: of the 3 others, 2 are from the other part; of the class, 1 of 1 or 0 of 1."""
    z, parts = torch.zeros(4, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    factor = 0.1 / 0.07
    for labels, cad, cond in (([0, 1, 0, 1], -factor * math.log(2 / 3), 0.0), ([0, 1, 2, 3], 0.0, 0.0)):
        y = torch.tensor(labels)
        assert build("CAD").bn_loss(z, y, parts).item() == pytest.approx(cad)
        assert build("CondCAD").bn_loss(z, y, parts).item() == pytest.approx(cond)
    own = factor * math.log(1 / 3)  # itself is no neighbour
    y = torch.tensor([0, 1, 0, 1])
    assert build("CAD", is_flipped=False).bn_loss(z, y, parts).item() == pytest.approx(own)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("labels", ["one class", "a class per minibatch", "single rows"])
def test_degenerate_steps_stay_finite(build, minibatches, name, flipped, labels):
    cad = build(name, is_flipped=flipped)
    step = {
        "one class": [(x, torch.zeros_like(y)) for x, y in minibatches],
        "a class per minibatch": [(x, torch.full_like(y, e)) for e, (x, y) in enumerate(minibatches)],
        "single rows": [(x[:1], torch.tensor([e])) for e, (x, _) in enumerate(minibatches)],
    }[labels]
    for _ in range(3):
        assert all(math.isfinite(value) for value in cad.update(step).values())
    assert all(torch.isfinite(parameter).all() for parameter in cad.parameters())


def test_large_features_stay_finite(build, minibatches):
    cad = build("CAD").float()
    x, y = torch.cat([x for x, _ in minibatches]).float(), torch.cat([y for _, y in minibatches])
    z = (1e4 * x).requires_grad_()
    loss = cad.bn_loss(z, y, torch.tensor([0] * 7 + [1] * 6 + [2] * 5))
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_similarities_are_not_rounded_under_autocast(build):
    cad = build("CAD").float()
    z = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    y, parts = torch.zeros(12, dtype=torch.int64), torch.arange(12) % 3
    expected = cad.bn_loss(z, y, parts).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert cad.bn_loss(z, y, parts).item() == pytest.approx(expected, rel=1e-6)


def test_temperature_must_be_positive(build):
    with pytest.raises(ValueError, match="temperature is 0; take a number above 0"):
        build("CAD", temperature=0)

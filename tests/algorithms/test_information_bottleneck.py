import pytest
import torch
from torch import nn


def slow_variance(features):
    """Unbiased variance of each feature over the rows; their mean."""
    mean = sum(features) / len(features)
    return (sum((row - mean) ** 2 for row in features) / (len(features) - 1)).mean()


def slow_irm_penalty(cross_entropy, logits, y):
    """Product of d/ds risk(s * logits) at s = 1 over the even and over the odd rows."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(cross_entropy(logits[rows] * scale, y[rows]), scale, create_graph=True)[0]
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    return slopes[0] * slopes[1]


@pytest.mark.parametrize(
    ("name", "switches"), [("IB_ERM", {"ib": 2}), ("IB_IRM", {"ib": 1, "irm": 3}), ("IB_IRM", {"ib": 2, "irm": 2})]
)
def test_updates_anneal_and_restart_adam(build, minibatches, slow_network, cross_entropy, name, switches):
    hparams = {f"{prefix}_penalty_anneal_iters": switch for prefix, switch in switches.items()}
    hparams |= {f"{prefix}_lambda": 20.0 for prefix in switches}
    algorithm = build(name, **hparams)
    slow = slow_network(algorithm)
    for update in range(5):
        step = algorithm.update(minibatches)
        nll, ib, irm = 0.0, 0.0, 0.0
        for x, y in minibatches:
            features = slow.featurizer(x)
            nll = nll + cross_entropy(slow.classifier(features), y) / 3
            ib = ib + slow_variance(features) / 3
            irm = irm + slow_irm_penalty(cross_entropy, slow.classifier(features), y) / 3
        loss = nll + (20.0 if update >= switches["ib"] else 0.0) * ib
        expected = {"nll": nll.item(), "IB_penalty": ib.item()}
        if name == "IB_IRM":
            loss = loss + (20.0 if update >= switches["irm"] else 1.0) * irm
            expected["IRM_penalty"] = irm.item()
        if update in switches.values():
            slow.adam.reset()
        slow.adam.descend(loss)
        assert step == pytest.approx(expected | {"loss": loss.item()}, rel=1e-8)
        slow.assert_equal()
    assert algorithm.update_count.tolist() == [5]


@pytest.mark.parametrize(("name", "weight"), [("IB_ERM", "ib"), ("IB_IRM", "ib"), ("IB_IRM", "irm")])
def test_each_penalty_changes_the_weights_and_none_is_the_mean_risk(build, minibatches, name, weight):
    plain = build("GroupDRO", groupdro_eta=0.0)
    off = build(name, **type(build(name)).CONTROL)
    on = build(name, **type(build(name)).CONTROL | {f"{weight}_lambda": 50.0})
    for _ in range(3):
        assert off.update(minibatches)["loss"] == pytest.approx(plain.update(minibatches)["loss"])
        on.update(minibatches)
    torch.testing.assert_close(off.classifier.weight, plain.classifier.weight)
    assert not torch.allclose(on.classifier.weight, plain.classifier.weight)


def test_nll_is_the_risk_without_the_penalty(build, minibatches):
    step = build("IB_ERM", ib_penalty_anneal_iters=0, ib_lambda=7.0).update(minibatches)
    assert step["loss"] == pytest.approx(step["nll"] + 7 * step["IB_penalty"])
    assert step["IB_penalty"] > 0


def test_a_large_weight_flattens_the_features(build, minibatches):
    algorithm = build("IB_ERM", ib_penalty_anneal_iters=0, ib_lambda=100.0, weight_decay=0.0)
    penalties = [algorithm.update(minibatches)["IB_penalty"] for _ in range(60)]
    assert penalties[-1] < 0.1 * penalties[0]


def test_annealing_goes_on_after_loading(build, minibatches):
    hparams = {"ib_penalty_anneal_iters": 1, "irm_penalty_anneal_iters": 1}
    algorithm, fresh = build("IB_IRM", **hparams), build("IB_IRM", **hparams)
    algorithm.update(minibatches)
    fresh.load_state_dict(algorithm.state_dict())
    assert fresh.update(minibatches) == algorithm.update(minibatches)


@pytest.mark.parametrize("name", ["IB_ERM", "IB_IRM"])
def test_one_row_is_refused(build, minibatches, name):
    x, y = minibatches[0]
    with pytest.raises(ValueError, match=rf"{name} takes .* got the sizes \[1, 6, 5\]; raise batch_size"):
        build(name).update([(x[:1], y[:1]), *minibatches[1:]])


def test_the_variance_is_not_rounded_under_autocast(build, minibatches):
    algorithm = build("IB_ERM").float()
    torch.manual_seed(0)
    rounded = [torch.randn(n, 4).bfloat16() for n in (7, 6, 5)]
    algorithm.featurizer = nn.Identity()
    expected = sum(part.float().var(0).mean() for part in rounded).item() / 3
    with torch.autocast("cpu", torch.bfloat16):
        _, bottleneck, _ = algorithm._terms([(f, y) for f, (_, y) in zip(rounded, minibatches, strict=True)])
    assert bottleneck.item() == pytest.approx(expected, rel=1e-6)

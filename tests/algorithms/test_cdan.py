"""CDAN against a game that is written out row by row, and its discriminator's view."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from domainbed import algorithms, hparams_registry
from domainbed.algorithms.base import Task
from domainbed.algorithms.cdan import CDAN, Reversal

PLAIN = {"cdan_width": 16, "cdan_dropout": 0.0, "cdan_lr_factor": 3.0, "cdan_lambda": 0.8}


def slow_softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def slow_weight(p: Tensor) -> float:
    return 1 + math.exp(sum(q * math.log(q) for q in p.tolist()))


def slow_disc_loss(losses: list[list[Tensor]], weights: list[list[float]]) -> Tensor:
    """Mean over the minibatches of each one's weighted mean."""
    shares = [[w / sum(row) for w in row] for row in weights]
    parts = [sum(s * loss for s, loss in zip(*pair, strict=True)) for pair in zip(shares, losses, strict=True)]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("entropy", [False, True])
def test_updates_equal_a_written_out_game(
    build, minibatches, slow_network, slow_mlp, slow_adam, cross_entropy, entropy
):
    cdan = build("CDAN", **PLAIN, cdan_entropy=entropy)
    cdan.steps = 6
    slow, discriminator = slow_network(cdan), slow_mlp(cdan.discriminator)
    d_adam = slow_adam(discriminator.weights, 0.03, 0.1)
    for update in range(3):
        step = cdan.update(minibatches)
        losses, weights = [], []
        for e, (x, _) in enumerate(minibatches):
            features = slow.featurizer(x)
            p = [slow_softmax(slow.classifier(z[None])[0].detach()) for z in features]
            seen = [torch.cat([z[i] * q for i in range(len(z))]) for z, q in zip(features, p, strict=True)]
            losses.append([cross_entropy(discriminator(h[None]), torch.tensor([e])) for h in seen])
            weights.append([slow_weight(q) if entropy else 1.0 for q in p])
        disc_loss = slow_disc_loss(losses, weights)
        reversal = 2 / (1 + math.exp(-10 * update / 6)) - 1
        x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
        risk = slow.risk(x, y)
        assert step == pytest.approx(
            {"loss": risk.item(), "disc_loss": disc_loss.item(), "reversal": reversal}, rel=1e-8, abs=1e-12
        )
        upwards = risk - 0.8 * reversal * disc_loss  # what the classifier and the featurizer descend
        d_gradients = torch.autograd.grad(disc_loss, discriminator.weights, retain_graph=True)
        (reversed_gradient,) = torch.autograd.grad(disc_loss, slow.featurizer.weights[:1], retain_graph=True)
        assert reversed_gradient.any()  # or the game would be ERM
        slow.adam.descend(upwards)
        d_adam.descend(sum((w * g).sum() for w, g in zip(discriminator.weights, d_gradients, strict=True)))
        slow.assert_equal()
        discriminator.assert_equal()
    assert int(cdan.update_count) == 3


def test_sure_predictions_weigh_twice_as_much_as_boundless_doubt(build):
    cdan = build("CDAN", **PLAIN, cdan_entropy=True)
    assert slow_weight(torch.tensor([1 - 2e-12, 1e-12, 1e-12], dtype=torch.float64)) == pytest.approx(2)
    features = torch.randn(2, cdan.featurizer.n_outputs, dtype=torch.float64)
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    parts = torch.tensor([0, 0])
    seen = cdan.discriminator(cdan.product(features, logits.softmax(1)))
    losses = -seen.log_softmax(1)[:, 0]
    expected = (2 * losses[0] + (1 + 1 / 3) * losses[1]) / (2 + 1 + 1 / 3)
    assert cdan.disc_loss(features, logits, parts).item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_reversal_is_exact_and_turns_gradients():
    x = torch.tensor([0.1, 1e9], requires_grad=True)
    seen = Reversal.apply(x, 0.25)
    assert torch.equal(seen, x)
    (gradient,) = torch.autograd.grad((seen * torch.tensor([2.0, -4.0])).sum(), x)
    assert gradient.tolist() == [-0.5, 1.0]


def test_the_warm_up_goes_from_0_to_1_and_is_left_out_where_the_runs_length_is_not_known(build):
    cdan = build("CDAN", **PLAIN)
    assert cdan.reversal() == 1
    cdan.steps, found = 10, []
    for update in range(11):
        cdan.update_count.fill_(update)
        found.append(cdan.reversal())
    assert found[0] == 0
    assert found == sorted(found)
    assert found[5] == pytest.approx(math.tanh(2.5))
    assert found[10] > 0.999


def of_task(steps: int, K: int = 3, **hparams: Any) -> CDAN:
    settings = hparams_registry.default_hparams("CDAN", "Debug28") | hparams
    torch.manual_seed(0)
    found: Any = CDAN.from_task(Task((3, 28, 28), K, num_domains=2, steps=steps), settings)
    return found


def test_the_task_says_how_long_the_warm_up_is():
    assert of_task(700).steps == 700
    assert of_task(0).reversal() == 1
    with pytest.raises(ValueError, match="CDAN compares at least 2 minibatches, this partition has 1"):
        CDAN.from_task(Task((3, 28, 28), 3, num_domains=1), {})


def test_large_products_are_projected_and_keep_their_inner_products():
    """The mean of many random products of two pairs is the product of their inner products."""
    generator = torch.Generator().manual_seed(0)
    cdan = of_task(0, K=40)  # 128 features
    assert cdan.discriminator.input.in_features == 1024
    assert of_task(0, K=32).discriminator.input.in_features == 128 * 32
    z = torch.randn(2, 128, generator=generator)
    p = torch.randn(2, 40, generator=generator).softmax(1)
    z[1] += 2 * z[0]  # not orthogonal
    seen = cdan.product(z, p)
    expected = [
        sum(float(r @ z[i]) * float(q @ p[i]) for r, q in [(cdan.feature_projection[j], cdan.prediction_projection[j])])
        / 32
        for i, j in ((0, 0), (1, 0), (1, 1023))
    ]
    assert [seen[0, 0].item(), seen[1, 0].item(), seen[1, 1023].item()] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (seen[0] @ seen[1]).item() == pytest.approx(float(z[0] @ z[1]) * float(p[0] @ p[1]), rel=0.3)


def test_projections_are_saved_and_never_trained():
    cdan, fresh = of_task(0, K=40), of_task(0, K=40)
    before = cdan.feature_projection.clone()
    x = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    cdan.update([(x[:4], torch.arange(4)), (x[4:], torch.arange(4))])
    assert torch.equal(cdan.feature_projection, before)
    fresh.feature_projection.zero_()
    fresh.load_state_dict(cdan.state_dict())
    assert torch.equal(fresh.feature_projection, before)
    assert {"feature_projection", "prediction_projection"} <= cdan.state_dict().keys()
    assert not any("projection" in name for name in of_task(0).state_dict())


def test_the_control_is_erm_to_the_bit_and_the_method_is_not(build, minibatches):
    models = [build("ERM"), build("CDAN", **CDAN.CONTROL), build("CDAN")]
    for _ in range(3):
        for model in models:
            model.update(minibatches)
    erm, control, method = (torch.cat([p.flatten() for p in model.network.parameters()]) for model in models)
    assert torch.equal(erm, control)
    assert not torch.allclose(erm, method)


def test_features_are_trained_against_the_discriminator_and_it_against_them(build):
    """Two minibatches that differ in one input: without reversal told apart, then lost on the discriminator."""
    cdan = build("CDAN", **PLAIN | {"cdan_lambda": 0.0, "cdan_width": 16}, weight_decay=0.0)
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    x[:, 1] = torch.arange(60) // 30 * 16.0 - 8
    halves = [(x[:30], y[:30]), (x[30:], y[30:])]
    for _ in range(50):
        apart = cdan.update(halves)["disc_loss"]
    cdan.hparams["cdan_lambda"] = 10.0
    cdan.disc_opt.param_groups[0]["lr"] = 0.0
    for _ in range(50):
        lost = cdan.update(halves)["disc_loss"]
    assert apart < 0.1
    assert lost > 1


def test_cdan_and_cdann_name_each_other():
    assert "CDANN" in CDAN.__doc__
    assert "CDAN " in algorithms.CDANN.__doc__


@pytest.mark.parametrize("name", ["cdan_lambda", "cdan_lr_factor"])
def test_hparams_that_mean_nothing_are_refused(build, name):
    with pytest.raises(ValueError, match=f"{name} -1.0: must not be negative"):
        build("CDAN", **{name: -1.0})


def test_an_empty_minibatch_changes_nothing_but_its_absence(build, minibatches):
    cdan = build("CDAN", **PLAIN)
    empty = minibatches[1][0][:0], minibatches[1][1][:0]
    values = cdan.update([minibatches[0], empty, minibatches[2]])
    assert all(map(math.isfinite, values.values()))
    assert all(torch.isfinite(parameter).all() for parameter in cdan.parameters())

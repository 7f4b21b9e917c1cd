"""Saliency guided training against a version that is written out image by image, and against closed forms."""

import math

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from domainbed.algorithms.sgt import SGT, divergence


def slow_masked(network, x, y, k, fill, signed, draws):
    """x~ of images or vectors, one after the other."""
    masked = x.clone()
    for i, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(leaf[None])[0, label], leaf)
        channels = image.shape[0] if image.ndim > 1 else 1
        scores = [g if signed else abs(g) for g in (gradient.reshape(channels, -1).sum(0) / channels).tolist()]
        values = image.flatten().tolist()
        least = sorted(range(len(scores)), key=lambda p, scores=scores: scores[p])[: math.floor(k * len(scores))]
        for channel in range(channels):
            for p in least:
                at = channel * len(scores) + p
                uniform = min(values) + (max(values) - min(values)) * draws[i].flatten()[at]
                masked[i].view(-1)[at] = sum(values) / len(values) if fill == "mean" else uniform
    return masked


def slow_divergence(logits, other):
    total = 0
    for z, w in zip(logits, other, strict=True):
        p, q = z.exp() / z.exp().sum(), w.exp() / w.exp().sum()
        total = total + sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))
    return total / len(logits)


def joined(minibatches):
    return tuple(torch.cat(column) for column in zip(*minibatches, strict=True))


def on(sgt: SGT, network: nn.Module) -> SGT:
    """The algorithm with another network."""
    sgt.network = network.double()
    sgt.optimizer = sgt.new_optimizer()
    return sgt


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("fill", ["uniform", "mean"])
@pytest.mark.parametrize("signed", [False, True])
def test_updates_equal_written_out_ones(build, minibatches, slow_mlp, slow_adam, cross_entropy, images, fill, signed):
    sgt = build("SGT", sgt_lambda=0.7, sgt_k=0.45, sgt_fill=fill, sgt_signed=signed)
    if images:
        torch.manual_seed(3)
        on(sgt, nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.ReLU(), nn.Linear(6, 3)))
        minibatches = [(torch.randn(len(y), 2, 3, 3, dtype=torch.float64), y) for _, y in minibatches]
    copies = [slow_mlp(sgt.network)] if images else [slow_mlp(sgt.featurizer), slow_mlp(sgt.classifier)]
    adam = slow_adam([weight for copy in copies for weight in copy.weights], 0.01, 0.1)

    def network(x):
        x = x.flatten(1)
        for copy in copies:
            x = copy(x)
        return x

    x, y = joined(minibatches)
    for update in range(3):
        torch.manual_seed(update)
        draws = torch.rand(x.shape, dtype=torch.float64)
        masked = slow_masked(network, x, y, 0.45, fill, signed, draws)
        risk, kl = cross_entropy(network(x), y), slow_divergence(network(x), network(masked))
        adam.descend(risk + 0.7 * kl)
        torch.manual_seed(update)
        step = sgt.update(minibatches)
        expected = {"loss": (risk + 0.7 * kl).item(), "risk": risk.item(), "kl": kl.item()}
        assert step == pytest.approx(expected, rel=1e-8)
        for copy in copies:
            copy.assert_equal()


@pytest.mark.parametrize(
    ("signed", "replaced"),
    [(False, [[0, 1], [1, 1]]), (True, [[1, 0], [1, 1]])],
)
def test_a_linear_model_keeps_the_pixels_with_the_largest_weight(build, signed, replaced):
    """Means over the channels: -3, .5, -1 and 0 (of 4 and -4); their sign counts only if asked for."""
    linear = nn.Linear(8, 3).double()
    linear.weight.data[1] = torch.tensor([-3.0, 1.0, -2.0, 4.0, -3.0, 0.0, 0.0, -4.0])
    sgt = on(build("SGT", sgt_k=0.75, sgt_fill="mean", sgt_signed=signed), nn.Sequential(nn.Flatten(), linear))
    x = torch.arange(8, dtype=torch.float64).view(1, 2, 2, 2)
    masked = sgt.masked(x, torch.tensor([1]))
    kept = torch.tensor(replaced) == 0
    assert torch.equal(masked == x, kept.expand(1, 2, 2, 2))
    assert (masked[masked != x] == 3.5).all()


def test_draws_are_between_an_images_own_extremes_and_the_global_generators(build):
    sgt = on(build("SGT", sgt_k=0.5), nn.Sequential(nn.Flatten(), nn.Linear(75, 3)))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * torch.tensor([0.1, 1, 10, 100]).view(-1, 1, 1, 1)
    y = torch.tensor([0, 1, 2, 0])
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(sgt.masked(x, y))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    changed = results[0] != x
    assert (changed.sum((1, 2, 3)) == 3 * 12).all()  # floor(25 / 2) pixels, all channels
    assert (changed.all(1) == changed.any(1)).all()
    assert (results[0].amin((1, 2, 3)) >= x.amin((1, 2, 3))).all()
    assert (results[0].amax((1, 2, 3)) <= x.amax((1, 2, 3))).all()
    assert results[0][changed].unique().numel() == 4 * 36


def test_the_gradient_pass_leaves_modes_statistics_and_gradients_alone(build):
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.9), nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3))
    sgt = on(build("SGT", sgt_fill="mean"), network)
    network[3].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, y = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.arange(6) % 3
    first, second = sgt.masked(x, y), sgt.masked(x, y)
    assert torch.equal(first, second)  # no dropout in it
    assert not first.requires_grad
    assert [module.training for module in network] == [True, True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    sgt.update([(x, y)])
    assert network[0].num_batches_tracked == 2  # of x and of x~
    assert network[3].num_batches_tracked == 0
    assert [module.training for module in network] == [True, True, True, False, True]


def test_the_control_is_erm_to_the_bit(build, minibatches):
    """With its random draws: half of the hidden units drop out."""
    results = {}
    for name, hparams in (("ERM", {}), ("SGT", SGT.CONTROL), ("method", {})):
        algorithm = build("ERM" if name == "ERM" else "SGT", mlp_dropout=0.5, **hparams)
        torch.manual_seed(5)
        for _ in range(3):
            algorithm.update(minibatches)
        results[name] = torch.cat([parameter.detach().flatten() for parameter in algorithm.parameters()])
    assert torch.equal(results["ERM"], results["SGT"])
    assert not torch.allclose(results["ERM"], results["method"])


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"sgt_k": 0.0}, r"sgt_k 0.0: the fraction of pixels to replace must be above 0 and below 1"),
        ({"sgt_k": 1.0}, r"sgt_k 1.0: .* below 1"),
        ({"sgt_k": math.nan}, r"sgt_k nan"),
        ({"sgt_lambda": -0.1}, r"sgt_lambda -0.1: must not be negative"),
        ({"sgt_fill": "blur"}, r"sgt_fill 'blur' is unknown; take one of uniform, mean"),
    ],
)
def test_hparams_that_mean_nothing_are_refused(build, hparams, message):
    with pytest.raises(ValueError, match=message):
        build("SGT", **hparams)


@pytest.mark.parametrize("fill", ["uniform", "mean"])
def test_constant_images_change_nothing_and_stay_finite(build, fill):
    sgt = on(build("SGT", sgt_fill=fill), nn.Sequential(nn.Flatten(), nn.Linear(18, 3)))
    x, y = torch.full((4, 2, 3, 3), 0.25, dtype=torch.float64), torch.arange(4) % 3
    assert torch.equal(sgt.masked(x, y), x)
    step = sgt.update([(x, y)])
    assert step["kl"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in sgt.network.parameters())


def test_bfloat16_comes_near_float32(build, minibatches):
    values = []
    for enabled in (False, True):
        sgt = build("SGT", sgt_fill="mean").float()
        batch = [(x.float(), y) for x, y in minibatches]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(sgt.update(batch))
        assert all(torch.isfinite(parameter).all() for parameter in sgt.parameters())
    assert values[1] == pytest.approx(values[0], rel=0.05, abs=0.01)


def test_the_divergence_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    expected = entropy(logits.softmax(1).numpy(), other.softmax(1).numpy(), axis=1).mean()
    assert divergence(logits, other).item() == pytest.approx(expected, rel=1e-12)
    assert divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-15)
    assert divergence(logits.bfloat16(), other.bfloat16()).dtype == torch.float32

"""Right for the right reasons, with masks and without, against versions that are written out image by image."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.algorithms.rrr import RRR, RRR_Confounder, input_gradient_penalty
from domainbed.loaders import Minibatch

K, V, SHAPE = 3, 2, (3, 28, 28)


def built(name: str, **hparams: Any) -> Any:
    """The algorithm with the small CNN, for images of 28 pixels."""
    settings = hparams_registry.default_hparams(name, "Debug28") | {"backbone": "small_cnn", "lr": 1e-3} | hparams
    torch.manual_seed(0)
    return REGISTRY[name].from_task(Task(SHAPE, K, num_domains=2, num_confounders=V), settings)


def step_data(seed: int = 0, n: int = 12, dtype: torch.dtype = torch.float32) -> list[Minibatch]:
    """Two minibatches; label and confounder each have a half of the image, the mask is the label's."""
    generator = torch.Generator().manual_seed(seed)
    y, c = torch.arange(n) % K, torch.arange(n) % V
    x = torch.randn(n, *SHAPE, generator=generator, dtype=dtype) / 2
    x[:, :, :14] += (y - 1).view(-1, 1, 1, 1)
    x[:, :, 14:] += (c - 0.5).view(-1, 1, 1, 1)
    m = torch.zeros(n, *SHAPE[1:])
    m[:, :14] = torch.rand(n, 14, 28, generator=generator)
    return [Minibatch(x[half], y[half], c=c[half], m=m[half]) for half in (slice(0, 5), slice(5, n))]


def joined(minibatches: list[Minibatch]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = zip(*((x, y, minibatch.c, minibatch.m) for minibatch in minibatches for x, y in [minibatch]), strict=True)
    return tuple(map(torch.cat, columns))


def weights(*modules: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


class SlowConvNet:
    """A copy of ``Conv2d(2, 3, 2), ReLU, Flatten, Linear``, for images (2, 3, 3), one value after the other."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.weights = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]

    def __call__(self, image: Tensor) -> Tensor:
        kernel, bias, w, b = self.weights
        places = list(itertools.product(range(2), range(2)))
        units = [
            torch.clamp(
                sum(kernel[o, i, r, s] * image[i, t + r, u + s] for i in range(2) for r, s in places) + bias[o], 0
            )
            for o in range(3)
            for t, u in places
        ]
        return torch.stack([sum(w[k, j] * unit for j, unit in enumerate(units)) + b[k] for k in range(K)])

    def loss(self, x: Tensor, y: Tensor, forbidden: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Risk plus weighted penalty, and the penalty."""
        risk, squares = 0, []
        for image, label, wrong in zip(x, y.tolist(), forbidden, strict=True):
            leaf = image.clone().requires_grad_()
            z = self(leaf)
            log_p = [(z[k].exp() / z.exp().sum()).log() for k in range(K)]
            (gradient,) = torch.autograd.grad(sum(log_p), leaf, create_graph=True)
            for channel, row, column in np.ndindex(*image.shape):
                squares.append((wrong[row, column] * gradient[channel, row, column]) ** 2)
            risk = risk - log_p[label]
        penalty = sum(squares) / len(squares)
        return risk / len(x) + weight * penalty, penalty


def test_updates_equal_written_out_ones(slow_adam):
    rrr = built("RRR", rrr_lambda=2.5, lr=0.01, weight_decay=0.1)
    rrr.network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, K)).double()
    rrr.optimizer = rrr.new_optimizer()
    slow = SlowConvNet(rrr.network)
    adam = slow_adam(slow.weights, 0.01, 0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(7, 2, 3, 3, generator=generator, dtype=torch.float64)
        m, y = torch.rand(7, 3, 3, generator=generator), torch.arange(7) % K
        loss, penalty = slow.loss(x, y, 1 - m.double(), 2.5)
        adam.descend(loss)
        step = rrr.update([Minibatch(x[:3], y[:3], m=m[:3]), Minibatch(x[3:], y[3:], m=m[3:])])
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-7)
        assert step["penalty"] == pytest.approx(penalty.item(), rel=1e-7)
        assert step["risk"] == pytest.approx((loss - 2.5 * penalty).item(), rel=1e-6)
        for weight, parameter in zip(slow.weights, rrr.network.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-6, atol=1e-8)


def linear_case() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K, 8), images (5, 2, 2, 2) and A (5, 2, 2)."""
    generator = torch.Generator().manual_seed(4)
    w, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((K, 8), (5, 2, 2, 2)))
    return w, x, torch.rand(5, 2, 2, generator=generator, dtype=torch.float64)


def test_the_penalty_of_a_linear_model_has_a_closed_form():
    """The slope of sum_k log p_k is sum_k w_k - K sum_k p_k w_k."""
    w, x, forbidden = linear_case()
    x.requires_grad_()
    logits = x.flatten(1) @ w.T
    slopes = (w.sum(0) - K * logits.softmax(1) @ w).view_as(x).detach().numpy()
    expected = np.mean((forbidden.numpy()[:, None] * slopes) ** 2)
    for trained in (False, True):
        penalty = input_gradient_penalty(logits, x, forbidden, trained)
        assert penalty.item() == pytest.approx(expected, rel=1e-12)
        assert penalty.requires_grad == trained


def test_the_penaltys_own_gradient_equals_finite_differences():
    w, x, forbidden = linear_case()
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: input_gradient_penalty((x.flatten(1) @ w.T).tanh(), x, forbidden, True), w.requires_grad_()
    )


def test_a_uniform_prediction_costs_nothing_and_neither_does_a_look_at_the_object():
    w, x, forbidden = linear_case()
    x.requires_grad_()
    same = w[:1].expand(K, -1)
    assert input_gradient_penalty(x.flatten(1) @ same.T, x, forbidden, False).item() == pytest.approx(0, abs=1e-20)
    w[:, [0, 1, 4, 5]] = 0  # the upper row of both channels
    forbidden[:, 1] = 0
    assert input_gradient_penalty(x.flatten(1) @ w.T, x, forbidden, False) == 0
    assert input_gradient_penalty(x.flatten(1) @ w.T, x, 1 - forbidden, False) > 0


def test_one_logit_is_two_classes():
    w, x, forbidden = linear_case()
    x.requires_grad_()
    z = x.flatten(1) @ w[:1].T
    one, two = (input_gradient_penalty(logits, x, forbidden, False) for logits in (z, torch.cat([z * 0, z], 1)))
    assert one.item() == pytest.approx(two.item(), rel=1e-12)
    assert one > 0


@pytest.mark.parametrize("name", ["RRR", "RRR_Confounder"])
def test_modes_stay_and_statistics_see_each_image_once(name):
    model = built(name)
    norm = nn.BatchNorm2d(3)
    model.featurizer.features.insert(0, norm)
    frozen = nn.BatchNorm2d(3).eval()
    model.featurizer.features.insert(0, frozen)
    model.update(step_data())
    assert norm.num_batches_tracked == 1
    assert frozen.num_batches_tracked == 0
    assert [norm.training, frozen.training] == [True, False]
    torch.testing.assert_close(norm.running_mean, 0.1 * joined(step_data())[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cls", [RRR, RRR_Confounder])
def test_the_controls_label_network_is_erms_to_the_bit(cls):
    name = cls.__name__
    models = [built("ERM"), built(name, **cls.CONTROL), built(name)]
    for seed in range(3):
        steps = [model.update(step_data(seed)) for model in models]
        assert steps[1].keys() == steps[2].keys()
        assert steps[1]["penalty"] > 0  # what it would pay
    erm, control, method = (weights(model.network) for model in models)
    assert torch.equal(erm, control)
    assert not torch.allclose(erm, method)


@pytest.mark.parametrize("name", ["RRR", "RRR_Confounder"])
def test_constant_images_stay_finite(name):
    model = built(name)
    batch = [Minibatch(torch.full_like(x, 0.5), y, c=b.c, m=b.m) for b in step_data() for x, y in [b]]
    for _ in range(2):
        assert all(math.isfinite(value) for value in model.update(batch).values())
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("name", ["RRR", "RRR_Confounder"])
def test_bfloat16_comes_near_float32(name):
    values = []
    for enabled in (False, True):
        model = built(name)
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                step = model.update(step_data(seed))
        values.append({key: step[key] for key in ("loss", "penalty")})
        assert torch.isfinite(weights(model)).all()
    assert values[1] == pytest.approx(values[0], rel=0.2)


def test_masks_are_asked_for():
    with pytest.raises(ValueError, match="came without masks"):
        built("RRR").update([Minibatch(x, y, c=b.c) for b in step_data() for x, y in [b]])


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("RRR", {"rrr_lambda": -1.0}, "rrr_lambda -1.0: must not be negative"),
        ("RRR", {"rrr_lambda": math.nan}, "rrr_lambda nan: must not be negative"),
        ("RRR_Confounder", {"rrr_lambda": -1.0}, "rrr_lambda -1.0: must not be negative"),
        ("RRR_Confounder", {"lambda_1": -1.0}, "lambda_1 -1.0: must not be negative"),
        ("RRR_Confounder", {"rrr_threshold": 1.0}, r"rrr_threshold 1.0: .* in \[0, 1\)"),
        ("RRR_Confounder", {"rrr_threshold": -0.1}, r"rrr_threshold -0.1: .* in \[0, 1\)"),
        ("RRR_Confounder", {"map_gradient": "full"}, "map_gradient 'full' is unknown; take one of none"),
    ],
)
def test_hparams_that_mean_nothing_are_refused(name, hparams, message):
    with pytest.raises(ValueError, match=message):
        built(name, **hparams)


def slow_enlarged(heatmap: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, pixel centres on pixel centres, the border's values beyond them."""
    n, result = len(heatmap), np.zeros((size, size))
    ends = [np.clip((place + 0.5) * n / size - 0.5, 0, n - 1) for place in range(size)]
    for row, column in np.ndindex(size, size):
        t, u = ends[row], ends[column]
        for i, j in itertools.product({math.floor(t), math.ceil(t)}, {math.floor(u), math.ceil(u)}):
            result[row, column] += heatmap[i, j] * (1 - abs(t - i)) * (1 - abs(u - j))
    return result


def slow_forbidden(network: Any, image: Tensor, c: int, threshold: float) -> np.ndarray:
    """Where Grad-CAM of confounder c is above a fraction of its maximum; (H, W) of 0 and 1."""
    maps = network[0].features(image[None]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network[1](maps.mean((2, 3)))[0, c], maps)
    heatmap = sum(g.mean() * channel for g, channel in zip(gradient[0], maps[0].detach(), strict=True))
    enlarged = slow_enlarged(np.maximum(heatmap.numpy(), 0), image.shape[1])
    return (enlarged > threshold * enlarged.max()).astype(float)


def test_confounder_updates_follow_the_gradient_of_the_written_out_loss():
    """One step of plain SGD; no gradient of the penalty reaches the confounder network."""
    sgd = {"optimizer": "sgd", "momentum": 0.0, "lr_l": 1.0, "lr_c": 1.0}
    model = built("RRR_Confounder", lambda_1=0.7, rrr_lambda=20.0, rrr_threshold=0.4, **sgd).double()
    data = step_data(dtype=torch.float64)
    x, y, c, _ = joined(data)
    areas, squares = [], []
    for image, value in zip(x, c.tolist(), strict=True):
        areas.append(slow_forbidden(model.confounder_network, image, value, 0.4))
        leaf = image.clone().requires_grad_()
        log_p = F.log_softmax(model.predict(leaf[None])[0], dim=0)
        (gradient,) = torch.autograd.grad(log_p.sum(), leaf, create_graph=True)
        squares.append((torch.from_numpy(areas[-1]) * gradient) ** 2)
    penalty = torch.stack(squares).mean()
    label_loss = F.cross_entropy(model.predict(x), y) + 20 * penalty
    confounder_loss = F.cross_entropy(model.predict_confounder(x), c)
    parts = [(model.network, label_loss), (model.confounder_network, 0.7 * confounder_loss)]
    before = [weights(network) for network, _ in parts]
    slopes = [torch.autograd.grad(loss, list(network.parameters())) for network, loss in parts]
    guesses = model.predict_confounder(x).argmax(1)

    step = model.update(data)
    for (network, _), old, slope in zip(parts, before, slopes, strict=True):
        moved = old - weights(network)
        torch.testing.assert_close(moved, torch.cat([part.flatten() for part in slope]), rtol=1e-5, atol=1e-8)
    assert 0 < step["forbidden_share"] < 1
    expected = {
        "penalty": penalty.item(),
        "label_loss": (label_loss - 20 * penalty).item(),
        "confounder_loss": confounder_loss.item(),
        "loss": (label_loss + 0.7 * confounder_loss).item(),
        "forbidden_share": np.mean(areas),
        "confounder_acc": (guesses == c).double().mean().item(),
    }
    assert {key: step[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_what_is_forbidden_is_a_share_of_the_maximum_and_nothing_where_the_map_is_dead():
    model = built("RRR_Confounder", rrr_threshold=0.5)
    maps = torch.zeros(3, 2, 2)
    maps[0, 0, 0], maps[1, 0, 0] = 8.0, 1e-3  # the same at any scale; the third is dead
    forbidden = model.forbidden(maps.requires_grad_(), (4, 4))
    # Bilinear: 1, .75, .25, 0 of the maximum along each side.
    side = torch.tensor([1, 0.75, 0.25, 0])
    expected = (side[:, None] * side > 0.5).float()
    torch.testing.assert_close(forbidden, torch.stack([expected, expected, torch.zeros(4, 4)]))
    assert not forbidden.requires_grad


@pytest.mark.parametrize("shared", ["", "classifier", "features.9"])
@pytest.mark.parametrize("one_logit", [False, True])
def test_the_penalty_falls_when_it_is_weighed_whatever_the_networks_share(shared, one_logit):
    results = []
    for weight in (0.0, 1e6):
        model = built("RRR_Confounder", rrr_lambda=weight, shared_from=shared, one_logit=one_logit, lr_l=3e-3)
        steps = [model.update(step_data(seed)) for seed in range(15)]
        assert all(math.isfinite(value) for step in steps for value in step.values())
        results.append(sum(step["penalty"] for step in steps[-5:]))
    assert results[1] < 0.5 * results[0]


def hidden_in(minibatches: list[Minibatch], hidden: Tensor) -> list[Minibatch]:
    """The same, but the confounder of the images at these positions of the step (N,) is not annotated."""
    parts = hidden.split([len(minibatch.c) for minibatch in minibatches])
    return [Minibatch(*b, c=b.c.masked_fill(part, -1)) for b, part in zip(minibatches, parts, strict=True)]


@pytest.mark.parametrize("one_logit", [False, True])
def test_hidden_confounders_count_for_the_label_networks_risk_alone(one_logit):
    """One step of plain SGD against a loss of two batches: all images for the label, the annotated for the rest."""
    sgd = {"optimizer": "sgd", "momentum": 0.0, "lr_l": 1.0, "lr_c": 1.0}
    model = built("RRR_Confounder", lambda_1=0.7, rrr_lambda=20.0, one_logit=one_logit, **sgd).double()
    data = step_data(dtype=torch.float64)
    x, y, c, _ = joined(data)
    seen = torch.arange(12) % 3 > 0
    _, (logits, maps) = model.explain(x[seen], y[seen], c[seen])
    forbidden = model.forbidden(maps, x.shape[2:])
    leaf = x[seen].clone().requires_grad_()
    penalty = input_gradient_penalty(model.predict(leaf), leaf, forbidden, True)
    label_loss = F.cross_entropy(model.predict(x), y)
    two = F.pad(logits, (1, 0)) if one_logit else logits
    confounder_loss = F.cross_entropy(two, c[seen])
    parts = [(model.network, label_loss + 20 * penalty), (model.confounder_network, 0.7 * confounder_loss)]
    before = [weights(network) for network, _ in parts]
    slopes = [torch.autograd.grad(loss, list(network.parameters())) for network, loss in parts]

    step = model.update(hidden_in(data, ~seen))
    expected = {
        "loss": (label_loss + 20 * penalty + 0.7 * confounder_loss).item(),
        "label_loss": label_loss.item(),
        "confounder_loss": confounder_loss.item(),
        "confounder_acc": (two.argmax(1) == c[seen]).double().mean().item(),
        "penalty": penalty.item(),
        "forbidden_share": forbidden.mean().item(),
    }
    assert {key: step[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    for (network, _), old, slope in zip(parts, before, slopes, strict=True):
        moved = old - weights(network)
        torch.testing.assert_close(moved, torch.cat([part.flatten() for part in slope]), rtol=1e-5, atol=1e-8)


def test_without_an_annotation_the_label_network_is_erms_to_the_bit():
    models = [built("ERM"), built("RRR_Confounder")]
    untouched = weights(models[1].confounder_network)
    for seed in range(3):
        data = hidden_in(step_data(seed), torch.ones(12, dtype=torch.bool))
        loss, step = (model.update(data) for model in models)
        assert step == dict.fromkeys(step, 0) | {"loss": loss["loss"], "label_loss": loss["loss"]}
    erm, method = (weights(model.network) for model in models)
    assert torch.equal(erm, method)
    assert torch.equal(weights(models[1].confounder_network), untouched)

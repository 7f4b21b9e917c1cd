"""Every method against formulas written out image by image, closed forms, theorems and second derivatives."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from domainbed import networks
from domainbed.attribution import METHODS, POLICIES, grad_cam, grad_cam_plus_plus, hires_cam, layer_cam
from domainbed.feature_maps import capture, target_logit


class Net(nn.Module):
    """A small network in two parts: batch norm before the maps, an arbitrary head after them."""

    def __init__(self, head: str = "linear", num_classes: int = 3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.Tanh())
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, num_classes))
        flat = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, num_classes))
        mixed = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 6), nn.Tanh(), nn.Linear(6, num_classes))
        self.head = {"linear": pooled, "flat": flat, "nonlinear": mixed}[head]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([0, 2, 1, 2])


def make_net(head: str = "linear", **kwargs: int) -> Net:
    torch.manual_seed(0)
    return Net(head, **kwargs)


def forward(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with capture(net.body) as seen:
        logits = net(x)
    return seen.maps, target_logit(logits, TARGET)


# The papers' formulas for one channel: maps a and gradient g, both (h, w), float64 -> the channel's part of the heatmap


def grad_cam_formula(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    return g.sum() / g.size * a


def grad_cam_plus_plus_formula(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    weight = 0.0
    for i, j in np.ndindex(g.shape):
        if g[i, j] > 0:
            # as in the paper, where a sum of negative activations does not make it smaller than g^2
            denominator = max(2 * g[i, j] ** 2 + a.sum() * g[i, j] ** 3, g[i, j] ** 2)
            weight += g[i, j] ** 2 / denominator * g[i, j]
    return weight * a


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "grad_cam": grad_cam_formula,
    "grad_cam_plus_plus": grad_cam_plus_plus_formula,
    "hires_cam": lambda a, g: g * a,
    "layer_cam": lambda a, g: np.where(g > 0, g, 0) * a,
}


def slowly(name: str, maps: torch.Tensor, score: torch.Tensor, relu: bool) -> torch.Tensor:
    """Image by image and channel by channel, each image with a backward pass of its own."""
    heatmaps = []
    for i in range(len(maps)):
        gradient = torch.autograd.grad(score[i], maps, retain_graph=True)[0][i].double().numpy()
        channels = zip(maps[i].detach().double().numpy(), gradient, strict=True)
        heatmap = sum(FORMULAS[name](a, g) for a, g in channels)
        heatmaps.append(np.maximum(heatmap, 0) if relu else heatmap)
    return torch.tensor(np.array(heatmaps)).float()


def test_every_method_has_a_formula() -> None:
    assert set(FORMULAS) == set(METHODS)


@pytest.mark.parametrize("head", ["linear", "nonlinear"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", METHODS.names)
def test_equals_a_loop_over_images_and_channels(
    x: torch.Tensor, name: str, head: str, training: bool, relu: bool, policy: str
) -> None:
    maps, score = forward(make_net(head).train(training), x)
    heatmaps = METHODS[name](maps, score, policy=policy, relu=relu)
    torch.testing.assert_close(heatmaps.detach(), slowly(name, maps, score, relu))


ARCHITECTURES = {
    "torchvision:alexnet": (3, 96, 96),
    "torchvision:convnext_tiny": (3, 64, 64),
    "torchvision:efficientnet_b0": (3, 64, 64),
    "torchvision:resnet18": (3, 96, 64),
    "timm:vit_tiny_patch16_224": (3, 48, 32),
    "timm:swin_tiny_patch4_window7_224": (3, 64, 64),
}


@pytest.mark.parametrize(("backbone", "shape"), ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_architectures(backbone: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    featurizer = networks.Featurizer(shape, {"backbone": backbone, "pretrained": False})
    network = nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, 3))
    with capture(featurizer.map_layer) as seen:
        score = target_logit(network(torch.randn(2, *shape)), torch.tensor([2, 0]))
    for name, method in METHODS.items():
        heatmaps = method(seen.maps, score, relu=False)
        assert heatmaps.shape == (2, *seen.maps.shape[2:])
        assert heatmaps.abs().amax(dim=(1, 2)).min() > 0
        expected = slowly(name, seen.maps, score, relu=False)
        torch.testing.assert_close(
            heatmaps, expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_case_by_hand() -> None:
    """Two channels of 1 x 2 pixels, score = 4 a1 - 2 a2 + 1 b1 + 3 b2."""
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.5]]]], requires_grad=True)
    score = (maps * torch.tensor([[[4.0, -2.0]], [[1.0, 3.0]]])).sum(dim=(1, 2, 3))
    # Grad-CAM++: the maps' sums are 3 and 3.5.
    first, second = 4 / (2 + 3 * 4), 1 / (2 + 3.5 * 1) + 3 / (2 + 3.5 * 3)
    expected = {
        grad_cam: [[1 * 1 + 2 * 3, 1 * 2 + 2 * 0.5]],
        grad_cam_plus_plus: [[first * 1 + second * 3, first * 2 + second * 0.5]],
        hires_cam: [[4 * 1 + 1 * 3, -2 * 2 + 3 * 0.5]],
        layer_cam: [[4 * 1 + 1 * 3, 3 * 0.5]],
    }
    for method, heatmap in expected.items():
        torch.testing.assert_close(method(maps, score, policy="none", relu=False), torch.tensor([heatmap]))
        torch.testing.assert_close(method(maps, score, policy="none"), torch.tensor([heatmap]).clamp(min=0))


def test_grad_cam_plus_plus_is_the_exponentials_second_and_third_derivative() -> None:
    """For Y = exp(S): a = Y'' / (2 Y'' + sum(maps) Y'''), weight = sum a ReLU(Y'), all from autograd, over exp(S)."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(1, 2, 2, 3, generator=generator, dtype=torch.float64)

    def derivative(i: tuple[int, ...], value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, maps, create_graph=True)[0][i]

    y = (maps * slope).sum().exp()
    weights = torch.zeros(2, dtype=torch.float64)
    for i in np.ndindex(*maps.shape):
        first = derivative(i, y)
        second = derivative(i, first)
        third = derivative(i, second)
        weights[i[1]] += (second / (2 * second + maps[0, i[1]].sum() * third) * first.relu() / y).item()
    expected = (weights[:, None, None] * maps[0]).sum(0).detach().float()
    score = (maps * slope).sum(dim=(1, 2, 3))
    torch.testing.assert_close(grad_cam_plus_plus(maps, score, policy="none", relu=False)[0], expected)


@pytest.mark.parametrize("head", ["linear", "flat"])
def test_hires_cam_adds_up_to_the_logit_less_its_bias(x: torch.Tensor, head: str) -> None:
    net = make_net(head)
    maps, score = forward(net, x)
    total = hires_cam(maps, score, relu=False).sum(dim=(1, 2))
    torch.testing.assert_close(total, score - net.head[-1].bias[TARGET])


def test_behind_pooling_and_one_linear_layer_hires_cam_is_grad_cam(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    expected = torch.einsum("bc,bchw->bhw", net.head[2].weight[TARGET], maps).clamp(min=0) / 16
    torch.testing.assert_close(grad_cam(maps, score), expected)
    torch.testing.assert_close(hires_cam(maps, score), expected)


CLOSED_FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {  # weight of a pixel, g: (B, C, 1, 1)
    "grad_cam": lambda maps, g: g,
    "grad_cam_plus_plus": lambda maps, g: 16 * g.clamp(min=0) / (2 + g * maps.sum(dim=(2, 3), keepdim=True)),
    "hires_cam": lambda maps, g: g,
    "layer_cam": lambda maps, g: g.clamp(min=0),
}


@pytest.mark.parametrize("name", METHODS.names)
def test_gradient_of_each_policy(x: torch.Tensor, name: str) -> None:
    """The closed form of a pooled linear head, with its weights held fixed or not, says what each policy gives."""
    net = make_net()
    weight, kernel = net.head[2].weight, net.body[0].weight

    def gradients(policy: str) -> tuple[torch.Tensor | None, ...]:
        heatmaps = METHODS[name](*forward(net, x), policy=policy)
        return torch.autograd.grad(heatmaps.square().sum(), (weight, kernel), allow_unused=True)

    def closed_form(fixed: bool) -> tuple[torch.Tensor | None, ...]:
        maps, g = net.body(x), weight[TARGET][:, :, None, None] / 16
        factors = CLOSED_FORMS[name](maps, g)
        heatmaps = ((factors.detach() if fixed else factors) * maps).sum(dim=1).clamp(min=0)
        return torch.autograd.grad(heatmaps.square().sum(), (weight, kernel), allow_unused=True)

    assert not METHODS[name](*forward(net, x), policy="none").requires_grad
    of_weight, of_kernel = gradients("constant")
    assert of_weight is None
    torch.testing.assert_close(of_kernel, closed_form(fixed=True)[1])
    for got, expected in zip(gradients("full"), closed_form(fixed=False), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", METHODS.names)
def test_full_policy_differs_from_constant_through_a_nonlinear_head(x: torch.Tensor, name: str) -> None:
    net = make_net("nonlinear").double().eval()
    kernel = net.body[0].weight
    direction = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def overlap(policy: str = "full") -> torch.Tensor:
        return METHODS[name](*forward(net, x.double()), policy=policy, relu=False).double().square().sum()

    (full,) = torch.autograd.grad(overlap(), kernel)
    (constant,) = torch.autograd.grad(overlap("constant"), kernel)
    step = 1e-3
    with torch.no_grad():
        kernel += step * direction
    above = overlap().item()
    with torch.no_grad():
        kernel -= 2 * step * direction
    below = overlap().item()
    slope = (above - below) / (2 * step)
    assert (full * direction).sum().item() == pytest.approx(slope, rel=1e-2)
    assert (constant - full).abs().max() > 0.02 * full.abs().max()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15])
@pytest.mark.parametrize("slope", [0.0, 1e-30, 1e15, -1e15])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", METHODS.names)
def test_finite_for_maps_and_gradients_of_any_size(name: str, policy: str, slope: float, size: float) -> None:
    """Maps and gradients that are zero, tiny, huge or opposed; the score is linear or, for the full policy, curved."""
    signs = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None].expand(2, 3, 2, 2)
    maps, factor = (size * signs).clone().requires_grad_(), torch.full((), slope, requires_grad=True)
    score = factor * maps.sum(dim=(1, 2, 3)) + maps.clamp(-1, 1).square().sum(dim=(1, 2, 3))
    heatmaps = METHODS[name](maps, score, policy=policy, relu=False)
    assert heatmaps.isfinite().all()
    if policy != "none":
        for gradient in torch.autograd.grad(heatmaps.sum(), (maps, factor), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def test_negative_maps_leave_weights_of_grad_cam_plus_plus_positive_and_bounded() -> None:
    """Where the paper's denominator 2 + S g is 0, -2, ...: a gradient counts at most in full."""
    maps = -torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 1, 1, 2).contiguous().requires_grad_()
    heatmaps = grad_cam_plus_plus(maps, maps.sum(dim=(1, 2, 3)), policy="none", relu=False)
    torch.testing.assert_close(heatmaps / maps[:, 0].detach(), torch.full((4, 1, 2), 2.0))


def test_graph_is_kept_for_the_callers_loss(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    (score.sum() + sum(method(maps, score).sum() for _, method in METHODS.items())).backward()
    assert net.head[2].weight.grad is not None
    assert net.body[0].weight.grad is not None


@pytest.mark.parametrize("name", METHODS.names)
def test_float32_under_autocast(x: torch.Tensor, name: str) -> None:
    net = make_net("nonlinear")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, score = forward(net, x)
        assert maps.dtype == torch.bfloat16
        inside = METHODS[name](maps, score, relu=False)
    assert inside.dtype == torch.float32
    # Nothing is rounded after the maps and their gradient are known.
    torch.testing.assert_close(inside.detach(), slowly(name, maps, score, relu=False), rtol=1e-5, atol=1e-6)


def test_given_gradient_takes_the_place_of_the_backward_pass(x: torch.Tensor) -> None:
    maps, score = forward(make_net("nonlinear"), x)
    (gradient,) = torch.autograd.grad(score.sum(), maps, retain_graph=True)
    for _, method in METHODS.items():
        torch.testing.assert_close(
            method(maps.detach(), score.detach(), gradient=gradient), method(maps, score), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match=r"gradient \(4, 5\) does not fit maps \(4, 5, 4, 4\)"):
        grad_cam(maps, score, gradient=gradient.mean(dim=(2, 3)))


def test_errors(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    for _, method in METHODS.items():
        with pytest.raises(ValueError, match=r"'partial'.*constant, full, none"):
            method(maps, score, policy="partial")
        with pytest.raises(ValueError, match=r"\(4, 5, 4, 4\) and score \(4, 3\)"):
            method(maps, net(x))
        with pytest.raises(ValueError, match="gradients enabled"):
            method(maps.detach(), score)
        with pytest.raises(ValueError, match="does not depend on maps"):
            method(net.body(x), score)


def test_methods_tell_their_own_name_and_source() -> None:
    for name, method in METHODS.items():
        assert method.__name__ == name
        assert "Source: " in (method.__doc__ or "")

"""Layers seen in passing; and weights read off the classifier, which must equal what autograd finds."""

from typing import Any

import pytest
import torch
from torch import nn

from domainbed import networks
from domainbed.attribution import METHODS, POLICIES, explain
from domainbed.feature_maps import (
    averages_maps,
    capture,
    has_active_dropout,
    has_linear_head,
    read_off_gradient,
    target_logit,
)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), pool, nn.Flatten(), nn.Linear(5, 3))


def test_target_logit_of_several_classes() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert target_logit(logits, torch.tensor([2, 0])).tolist() == [2.0, 3.0]


def test_target_logit_of_one_logit() -> None:
    assert target_logit(torch.tensor([[0.5], [0.5]]), torch.tensor([1, 0])).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("target", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])])
def test_target_logit_errors(target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and target"):
        target_logit(torch.zeros(2, 3), target)


def test_capture_holds_the_last_output_and_removes_its_hook() -> None:
    net, x = make_net(), torch.randn(4, 2, 8, 8)
    with capture(net[0]) as seen:
        net(x)
        net(2 * x)
    torch.testing.assert_close(seen.maps, net[0](2 * x))
    net(3 * x)
    torch.testing.assert_close(seen.maps, net[0](2 * x))
    assert not net[0]._forward_hooks


def test_capture_removes_its_hook_after_an_error() -> None:
    net = make_net()
    with pytest.raises(RuntimeError), capture(net[0]):
        net(torch.randn(4, 1, 8, 8))  # one channel too few
    assert not net[0]._forward_hooks


def test_capture_errors() -> None:
    net, x = make_net(), torch.randn(4, 2, 8, 8)
    with capture(net) as seen:
        pass
    with pytest.raises(RuntimeError, match="Sequential did not run"):
        _ = seen.maps
    with capture(net) as seen:
        net(x)
    with pytest.raises(ValueError, match=r"Sequential gave \(4, 3\).*\(B, C, h, w\)"):
        _ = seen.maps
    with capture(net[1]) as seen:
        net(x)
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d gave \(4, 5, 1, 1\).*one pixel.*larger images"):
        _ = seen.maps


# Weights read off the classifier


class Pooled(nn.Module):
    """A featurizer by hand: maps, their average, and before and after it whatever is to be tried."""

    def __init__(self, after: nn.Module, between: nn.Module | None = None):
        super().__init__()
        self.between = between or nn.Identity()
        self.map_layer = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.before, self.after = nn.Dropout(0.0), after
        self.n_outputs = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.between(self.map_layer(self.before(x))).mean(dim=(2, 3)))


def build(backbone: str, shape: tuple[int, int, int]) -> Any:
    torch.manual_seed(0)
    return networks.Featurizer(shape, {"backbone": backbone, "pretrained": False})


AVERAGING = {
    "small_cnn": (3, 28, 28),
    "mnist_cnn": (2, 12, 12),
    "wide_resnet": (3, 32, 32),
    "resnet18": (3, 64, 64),
    "efficientnet_lite0": (3, 64, 64),
    "torchvision:efficientnet_b0": (3, 64, 64),
    "timm:swin_tiny_patch4_window7_224": (3, 64, 64),
}
OTHERS = {
    "torchvision:alexnet": (3, 96, 96),
    "torchvision:convnext_tiny": (3, 64, 64),
    "timm:vit_tiny_patch16_224": (3, 32, 32),
}


@pytest.mark.parametrize(("backbone", "shape"), AVERAGING.items(), ids=AVERAGING)
def test_featurizers_that_average_their_maps(backbone: str, shape: tuple[int, int, int]) -> None:
    featurizer = build(backbone, shape)
    assert averages_maps(featurizer, shape)
    assert has_linear_head(featurizer, networks.Classifier(featurizer.n_outputs, 3), shape)
    assert not has_linear_head(featurizer, networks.Classifier(featurizer.n_outputs, 3, is_nonlinear=True), shape)


@pytest.mark.parametrize(("backbone", "shape"), OTHERS.items(), ids=OTHERS)
def test_featurizers_that_do_not(backbone: str, shape: tuple[int, int, int]) -> None:
    assert not averages_maps(build(backbone, shape), shape)


@pytest.mark.parametrize(
    "after", [nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))]
)
def test_whatever_follows_the_average_is_noticed(after: nn.Module) -> None:
    """Batch norm too, although in evaluation mode it is the identity but for 5e-6 of it before training."""
    assert averages_maps(Pooled(nn.Identity()), (3, 8, 8))
    assert not averages_maps(Pooled(after), (3, 8, 8))


def test_a_second_relu_changes_the_gradient_alone() -> None:
    """Where the maps are 0 nothing comes back, so that Grad-CAM's mean is not the classifier's weight."""
    assert not averages_maps(Pooled(nn.Identity(), nn.ReLU()), (3, 8, 8))
    assert averages_maps(Pooled(nn.Identity(), nn.ReLU(inplace=True)), (3, 8, 8))  # the maps are what it leaves


def test_a_featurizer_without_maps_averages_none() -> None:
    assert not averages_maps(nn.Linear(3, 2), (3,))
    with pytest.raises(ValueError, match="one pixel"):
        averages_maps(build("resnet18", (3, 28, 28)), (3, 28, 28))


def test_trying_leaves_no_trace() -> None:
    featurizer = build("resnet18", (3, 64, 64))
    featurizer.network.bn1.eval()
    before = {name: value.clone() for name, value in featurizer.state_dict().items()}
    modes = [module.training for module in featurizer.modules()]
    random_numbers = torch.get_rng_state()
    assert averages_maps(featurizer, (3, 64, 64))
    assert [module.training for module in featurizer.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(torch.equal(value, before[name]) for name, value in featurizer.state_dict().items())
    assert all(parameter.grad is None for parameter in featurizer.parameters())
    assert torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in featurizer.modules())


def test_active_dropout() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    assert not has_active_dropout(network)
    network[1].p = 0.1
    assert has_active_dropout(network)
    assert not has_active_dropout(network.eval())
    timms = build("efficientnet_lite0", (3, 32, 32))
    assert not has_active_dropout(timms)
    timms.network.drop_rate = 0.2
    assert has_active_dropout(timms)
    assert not has_active_dropout(timms.eval())
    assert has_active_dropout(build("torchvision:efficientnet_b0", (3, 32, 32)))


def explained_gradients(
    network: nn.Sequential, x: torch.Tensor, target: torch.Tensor, linear: nn.Linear | None, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Heatmaps, and the gradient of a loss on them with respect to every parameter."""
    _, heatmaps = explain(network, network[0].map_layer, x, target, linear=linear, **options)
    parameters = list(network.parameters())
    if options["policy"] == "none":
        assert not heatmaps.requires_grad
        return heatmaps, [torch.zeros_like(parameter) for parameter in parameters]
    price = torch.linspace(-1, 2, heatmaps.numel()).view_as(heatmaps)
    gradients = torch.autograd.grad((heatmaps * price).sum(), parameters, allow_unused=True, materialize_grads=True)
    return heatmaps.detach(), list(gradients)


def assert_close_in_scale(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-12)


@pytest.mark.parametrize(
    ("backbone", "num_logits"),
    [("small_cnn", 3), ("small_cnn", 1), ("mnist_cnn", 3), ("resnet18", 3), ("efficientnet_lite0", 3)],
)
def test_equal_to_autograd(backbone: str, num_logits: int) -> None:
    shape = AVERAGING[backbone]
    featurizer = build(backbone, shape)
    network = nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, num_logits))
    assert has_linear_head(featurizer, network[1], shape)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 1, 0]) if num_logits == 1 else torch.tensor([0, 2, 1, 2])
    for method in METHODS:
        for policy in POLICIES:
            options = {"method": method, "policy": policy, "relu": False}
            heatmaps, gradients = explained_gradients(network, x, target, network[1], **options)
            expected_maps, expected = explained_gradients(network, x, target, None, **options)
            assert_close_in_scale(heatmaps, expected_maps)
            assert policy == "none" or any(gradient.abs().max() > 0 for gradient in expected)
            assert (policy == "full") == bool(expected[-2].abs().max() > 0)  # the classifier's weights
            largest = max(gradient.abs().max().item() for gradient in expected)
            for got, wanted in zip(gradients, expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * largest)


def test_no_backward_pass_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    featurizer = build("small_cnn", (3, 28, 28))
    network = nn.Sequential(featurizer, nn.Linear(48, 3))
    x, target = torch.randn(2, 3, 28, 28), torch.tensor([0, 2])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    for method in METHODS:
        explain(network, featurizer.map_layer, x, target, method, linear=network[1])
        with pytest.raises(AssertionError, match="a backward pass"):
            explain(network, featurizer.map_layer, x, target, method)
    with torch.no_grad():
        explain(network, featurizer.map_layer, x, target, policy="constant", linear=network[1])


def test_active_dropout_takes_autograd_all_the_same() -> None:
    """The gradient is that of the units that were kept, which the weights alone don't tell."""
    featurizer = build("torchvision:efficientnet_b0", (3, 64, 64))
    network = nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, 3))
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    heatmaps = []
    for linear in (network[1], None):
        torch.manual_seed(1)
        heatmaps.append(explain(network, featurizer.map_layer, x, target, relu=False, linear=linear)[1].detach())
    torch.testing.assert_close(*heatmaps, rtol=0, atol=0)
    torch.manual_seed(1)
    with capture(featurizer.map_layer) as seen:
        network(x)
    read_off = METHODS["grad_cam"](
        seen.maps, torch.zeros(2), relu=False, gradient=read_off_gradient(network[1], target, seen.maps)
    )
    assert (read_off - heatmaps[0]).abs().max() > 0.05 * heatmaps[0].abs().max()
    network.eval()
    first, second = (
        explain(network, featurizer.map_layer, x, target, relu=False, linear=linear)[1].detach()
        for linear in (network[1], None)
    )
    assert_close_in_scale(first, second)


def test_read_off_errors() -> None:
    target = torch.tensor([0])
    with pytest.raises(ValueError, match=r"maps \(1, 4, 2, 2\) can't be read off Linear\(in_features=5"):
        read_off_gradient(nn.Linear(5, 2), target, torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"read off Sequential"):
        read_off_gradient(nn.Sequential(nn.Linear(4, 2)), target, torch.zeros(1, 4, 2, 2))  # type: ignore[arg-type]


def test_maps_are_as_later_modules_leave_them_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    with capture(network[0]) as seen:
        output = network(torch.randn(1, 1, 5, 5))
    torch.testing.assert_close(seen.maps, output)

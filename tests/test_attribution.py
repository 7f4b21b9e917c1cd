"""Grad-CAM against loops over images and channels, closed forms and second derivatives written out."""

import pytest
import torch
from torch import nn

from domainbed.attribution import capture, grad_cam, target_logit


class Net(nn.Module):
    """A small network in two parts: batch norm before the maps, an arbitrary head after them."""

    def __init__(self, head: str = "linear", num_classes: int = 3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.Tanh())
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, num_classes))
        mixed = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 6), nn.Tanh(), nn.Linear(6, num_classes))
        self.head = {"linear": pooled, "nonlinear": mixed}[head]

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


@pytest.mark.parametrize("head", ["linear", "nonlinear"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("policy", ["constant", "full", "none"])
def test_equals_a_loop_over_images_and_channels(
    x: torch.Tensor, head: str, training: bool, relu: bool, policy: str
) -> None:
    net = make_net(head).train(training)
    heatmaps = grad_cam(*forward(net, x), policy=policy, relu=relu)

    maps = net.body(x).detach().requires_grad_()  # batch statistics of the whole batch, if training
    for i in range(len(x)):
        maps.grad = None
        net.head(maps)[i, TARGET[i]].backward()
        expected = torch.zeros(4, 4)
        for k in range(5):
            expected += maps.grad[i, k].sum() / 16 * maps[i, k].detach()
        if relu:
            expected = expected.clamp(min=0)
        torch.testing.assert_close(heatmaps[i].detach(), expected)


def test_weights_of_a_pooled_linear_head_are_its_own(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    w = net.head[2].weight[TARGET]  # (B, C)
    expected = torch.einsum("bc,bchw->bhw", w, maps).clamp(min=0) / 16
    torch.testing.assert_close(grad_cam(maps, score), expected)


def test_gradient_of_each_policy(x: torch.Tensor) -> None:
    net = make_net()
    weight, kernel = net.head[2].weight, net.body[0].weight

    def gradients(policy: str) -> tuple[torch.Tensor | None, ...]:
        heatmaps = grad_cam(*forward(net, x), policy=policy)
        return torch.autograd.grad(heatmaps.square().sum(), (weight, kernel), allow_unused=True)

    heatmaps = grad_cam(*forward(net, x), policy="none")
    assert not heatmaps.requires_grad

    # The closed form of this head, with the weight held fixed or not, says what each policy must give.
    def closed_form(head_weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        maps = torch.einsum("bc,bchw->bhw", head_weight[TARGET], net.body(x)).clamp(min=0) / 16
        return torch.autograd.grad(maps.square().sum(), (weight, kernel), allow_unused=True)

    of_weight, of_kernel = gradients("constant")
    assert of_weight is None
    torch.testing.assert_close(of_kernel, closed_form(weight.detach())[1])
    for got, expected in zip(gradients("full"), closed_form(weight), strict=True):
        torch.testing.assert_close(got, expected)


def test_full_policy_differs_from_constant_through_a_nonlinear_head(x: torch.Tensor) -> None:
    net = make_net("nonlinear").double().eval()
    kernel, direction = net.body[0].weight, torch.randn(5, 2, 3, 3, dtype=torch.float64)

    def overlap() -> torch.Tensor:
        return grad_cam(*forward(net, x.double()), policy="full", relu=False).double().square().sum()

    (full,) = torch.autograd.grad(overlap(), kernel)
    (constant,) = torch.autograd.grad(grad_cam(*forward(net, x.double()), relu=False).double().square().sum(), kernel)
    step = 1e-2
    with torch.no_grad():
        kernel += step * direction
    above = overlap().item()
    with torch.no_grad():
        kernel -= 2 * step * direction
    below = overlap().item()
    slope = (above - below) / (2 * step)
    assert (full * direction).sum().item() == pytest.approx(slope, rel=1e-2)
    assert (constant * direction).sum().item() != pytest.approx(slope, rel=1e-2)


def test_graph_is_kept_for_the_callers_loss(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    (score.sum() + grad_cam(maps, score).sum()).backward()
    assert net.head[2].weight.grad is not None
    assert net.body[0].weight.grad is not None


def test_float32_under_autocast(x: torch.Tensor) -> None:
    net = make_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, score = forward(net, x)
        heatmaps = grad_cam(maps, score)
    assert heatmaps.dtype == torch.float32
    torch.testing.assert_close(heatmaps, grad_cam(*forward(net, x)), rtol=0.1, atol=2e-3)


def test_grad_cam_errors(x: torch.Tensor) -> None:
    net = make_net()
    maps, score = forward(net, x)
    with pytest.raises(ValueError, match=r"'partial'.*constant, full, none"):
        grad_cam(maps, score, policy="partial")
    with pytest.raises(ValueError, match=r"\(4, 5, 4, 4\) and score \(4, 3\)"):
        grad_cam(maps, net(x))
    with pytest.raises(ValueError, match="gradients enabled"):
        grad_cam(maps.detach(), score)
    with pytest.raises(ValueError, match="does not depend on maps"):
        grad_cam(net.body(x), score)


def test_target_logit_of_several_classes() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert target_logit(logits, torch.tensor([2, 0])).tolist() == [2.0, 3.0]


def test_target_logit_of_one_logit() -> None:
    assert target_logit(torch.tensor([[0.5], [0.5]]), torch.tensor([1, 0])).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("target", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])])
def test_target_logit_errors(target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and target"):
        target_logit(torch.zeros(2, 3), target)


def test_capture_holds_the_last_output_and_removes_its_hook(x: torch.Tensor) -> None:
    net = make_net().eval()
    with capture(net.body) as seen:
        net(x)
        net(2 * x)
    torch.testing.assert_close(seen.maps, net.body(2 * x))
    net(3 * x)
    torch.testing.assert_close(seen.maps, net.body(2 * x))
    assert not net.body._forward_hooks


def test_capture_removes_its_hook_after_an_error(x: torch.Tensor) -> None:
    net = make_net()
    with pytest.raises(RuntimeError), capture(net.body):
        net(x[:, :1])  # one channel too few
    assert not net.body._forward_hooks


def test_capture_errors(x: torch.Tensor) -> None:
    net = make_net()
    with capture(net.body) as seen:
        pass
    with pytest.raises(RuntimeError, match="Sequential did not run"):
        _ = seen.maps
    with capture(net.head) as seen:
        net(x)
    with pytest.raises(ValueError, match=r"Sequential gave \(4, 3\).*\(B, C, h, w\)"):
        _ = seen.maps
    with capture(net.head[0]) as seen:
        net(x)
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d gave \(4, 5, 1, 1\).*one pixel.*larger images"):
        _ = seen.maps

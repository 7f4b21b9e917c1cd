"""One call for every method; Score-CAM against a loop over images and channels that masks them one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed import networks
from domainbed.attribution import EVALUATION_METHODS, METHODS, explain, score_cam
from domainbed.feature_maps import capture, target_logit

ALL = [*METHODS, *EVALUATION_METHODS]
SHAPE = (3, 28, 28)
TARGET = torch.tensor([0, 2, 1])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


def build(backbone: str = "small_cnn", num_logits: int = 3, shape: tuple[int, int, int] = SHAPE) -> nn.Sequential:
    torch.manual_seed(0)
    featurizer = networks.Featurizer(shape, {"backbone": backbone, "pretrained": False})
    return nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, num_logits)).eval()


def one_by_one(
    network: nn.Module, x: torch.Tensor, maps: torch.Tensor, target: torch.Tensor, relu: bool
) -> torch.Tensor:
    """Score-CAM as its algorithm is written, with the baseline image: (B, h, w)."""
    heatmaps = []
    for image, channels, t in zip(x, maps, target, strict=True):
        increase = []
        baseline = target_logit(network(torch.zeros_like(image)[None]), t[None]).item()
        for channel in channels:
            large = F.interpolate(channel[None, None], size=image.shape[1:], mode="bilinear")[0, 0]
            spread = channel.max() - channel.min()
            mask = (large - large.min()) / (large.max() - large.min()) if spread > 0 else torch.zeros_like(large)
            increase.append(target_logit(network((image * mask)[None]), t[None]).item() - baseline)
        weights = torch.tensor(increase, dtype=torch.float64).exp()
        weights = (weights / weights.sum()).float()
        heatmap = sum(weight * channel for weight, channel in zip(weights, channels, strict=True))
        heatmaps.append(heatmap.clamp(min=0) if relu else heatmap)
    return torch.stack(heatmaps)


@pytest.mark.parametrize(
    ("backbone", "shape", "num_logits", "relu"),
    [
        ("small_cnn", SHAPE, 3, True),
        ("small_cnn", SHAPE, 1, False),
        ("mnist_cnn", (3, 12, 10), 3, False),
    ],
)
@torch.no_grad()
def test_score_cam_equals_a_loop(backbone: str, shape: tuple[int, int, int], num_logits: int, relu: bool) -> None:
    network = build(backbone, num_logits, shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([1, 0])
    network[1].weight *= 20  # or the softmax would be nearly uniform
    with capture(network[0].map_layer) as seen:
        network(x)
    maps = seen.maps.clone()
    maps[0, 3] = 0.1  # has no pattern, but would get one from rounding when enlarged
    heatmaps = score_cam(network, x, maps, target, relu=relu)
    assert heatmaps.shape == (2, *maps.shape[2:])
    torch.testing.assert_close(heatmaps, one_by_one(network, x, maps, target, relu), rtol=1e-4, atol=1e-5)
    uniform = maps.mean(dim=1)
    assert (heatmaps - uniform).abs().max() > 0.01 * uniform.abs().max()


@torch.no_grad()
def test_score_cam_in_batches_of_any_size(x: torch.Tensor) -> None:
    network, sizes = build(), []

    def predict(masked: torch.Tensor) -> torch.Tensor:
        sizes.append(len(masked))
        return network(masked)

    maps = torch.rand(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = score_cam(predict, x, maps, TARGET)
    torch.testing.assert_close(score_cam(predict, x, maps, TARGET, batch_size=4), whole)
    assert sizes == [15, 4, 4, 4, 3]


@torch.no_grad()
def test_score_cam_finds_the_channel_that_shows_the_evidence() -> None:
    """The score is the sum of the left half; of two channels, one is the left half, one the right."""
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, :, 0] = maps[0, 1, :, 1] = 1

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images[:, 0, :, :2].sum(dim=(1, 2)), -images[:, 0, :, :2].sum(dim=(1, 2))], dim=1)

    x = torch.full((1, 1, 4, 4), 2.0)
    left, right = score_cam(predict, x, maps, torch.tensor([0]))[0, 0]
    assert left > 0.999
    assert right < 0.001
    assert left + right == pytest.approx(1)
    left, right = score_cam(predict, x, maps, torch.tensor([1]))[0, 0]
    assert left < 0.001


def test_score_cam_carries_no_gradient_and_says_so(x: torch.Tensor) -> None:
    network = build()
    maps = torch.rand(3, 5, 4, 4)
    assert not score_cam(network, x, maps, TARGET).requires_grad
    with pytest.raises(ValueError, match=r"no gradient.*detach"):
        score_cam(network, x, maps.requires_grad_(), TARGET)
    with pytest.raises(ValueError, match=r"maps \(3, 5\) do not fit 3 images"):
        score_cam(network, x, maps.detach()[:, :, 0, 0], TARGET)
    with pytest.raises(ValueError, match=r"'constant'.*'none', or take one of grad_cam, "):
        explain(network, network[0].map_layer, x, TARGET, "score_cam")
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        explain(network.train(), network[0].map_layer, x, TARGET, "score_cam", "none")


def test_score_cam_is_float32_under_autocast(x: torch.Tensor) -> None:
    network = build()
    maps = torch.rand(3, 5, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heatmaps = score_cam(network, x, maps, TARGET)
    assert heatmaps.dtype == torch.float32
    torch.testing.assert_close(heatmaps, score_cam(network, x, maps, TARGET), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backbone", ["small_cnn", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ALL)
def test_one_call_for_every_method(x: torch.Tensor, method: str, backbone: str) -> None:
    network = build(backbone)
    if backbone != "small_cnn":
        network, x = build(backbone, shape=(3, 32, 32)), F.interpolate(x, (32, 32))
    for relu in (True, False):
        with torch.no_grad():  # nothing is to be trained, so that this is no hindrance
            logits, heatmaps = explain(network, network[0].map_layer, x, TARGET, method, "none", relu)
        torch.testing.assert_close(logits, network(x).detach())
        assert not logits.requires_grad
        assert not heatmaps.requires_grad
        assert heatmaps.isfinite().all()
        assert heatmaps.ndim == 3
        assert heatmaps.abs().max() > 0
        assert not relu or heatmaps.min() >= 0


@pytest.mark.parametrize("method", METHODS.names)
def test_one_forward_pass_that_trains_both(x: torch.Tensor, method: str) -> None:
    network = build().train()
    runs = []
    network.register_forward_hook(lambda *_: runs.append(1))
    logits, heatmaps = explain(network, network[0].map_layer, x, TARGET, method)
    assert runs == [1]
    with capture(network[0].map_layer) as seen:
        again = network(x)
    torch.testing.assert_close(heatmaps, METHODS[method](seen.maps, target_logit(again, TARGET)))
    (F.cross_entropy(logits, TARGET) + heatmaps.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_full_policy_goes_through_attention() -> None:
    """torch's fused attention has no second derivatives. Heatmaps are linear in the classifier's weights (Euler)."""
    network = build("timm:vit_tiny_patch16_224", shape=(3, 32, 32))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    _, heatmaps = explain(network, network[0].map_layer, x, TARGET, policy="full", relu=False)
    loss = heatmaps[:, 0].sum() - heatmaps[:, 1].sum()
    of_classifier, of_attention = torch.autograd.grad(
        loss, [network[1].weight, network[0].network.blocks[-1].attn.proj.weight]
    )
    torch.testing.assert_close((of_classifier * network[1].weight).sum(), loss, rtol=1e-3, atol=1e-6)
    assert of_attention.abs().max() > 0  # behind the maps: only their weights depend on it


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("method", ALL)
def test_without_a_target_the_predicted_class_is_explained(x: torch.Tensor, method: str, num_logits: int) -> None:
    network = build(num_logits=num_logits)
    layer = network[0].map_layer
    logits, heatmaps = explain(network, layer, x, None, method, "none", relu=False)
    predicted = (logits[:, 0] > 0).long() if num_logits == 1 else logits.argmax(1)
    torch.testing.assert_close(heatmaps, explain(network, layer, x, predicted, method, "none", relu=False)[1])


def test_explain_errors(x: torch.Tensor) -> None:
    network = build()
    layer: Any = network[0].map_layer
    with pytest.raises(NotImplementedError, match=r"not found: gradcam; did you mean grad_cam\?.*layer_cam, score_cam"):
        explain(network, layer, x, TARGET, "gradcam")
    with torch.no_grad(), pytest.raises(ValueError, match="gradients enabled"):
        explain(network, layer, x, TARGET)
    with pytest.raises(ValueError, match="can't be read off"):
        explain(network, layer, x, TARGET, linear=nn.Linear(5, 3))

"""Taps on the way to the features, the wrapper, and which backbone a name means."""

import copy

import pytest
import torch
from torch import nn

from domainbed import backbones, networks
from domainbed.backbones.base import Backbone, MapTap, cut_last_layer, take_channels


class Tokens(nn.Module):
    """A layer's output of some form, doubled after it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return 2 * self.layer(x)


LAYOUTS = {
    "maps": (MapTap(), torch.randn(2, 5, 3, 4), lambda x: x),
    "channels last": (MapTap(channels_last=True), torch.randn(2, 3, 4, 5), lambda x: x.permute(0, 3, 1, 2)),
    "tokens": (MapTap((3, 4)), torch.randn(2, 12, 5), lambda x: x.mT.reshape(2, 5, 3, 4)),
    "class token": (MapTap((3, 4), prefix=2), torch.randn(2, 14, 5), lambda x: x[:, 2:].mT.reshape(2, 5, 3, 4)),
}


@pytest.mark.parametrize(("tap", "x", "as_maps"), LAYOUTS.values(), ids=LAYOUTS)
def test_tap_shows_maps_and_changes_nothing(tap, x, as_maps):
    network = Tokens()
    tap.put_behind(network.layer)
    maps = []
    handle = tap.register_forward_hook(lambda module, inputs, output: maps.append(output))
    x.requires_grad_()
    output = network(x)
    handle.remove()
    torch.testing.assert_close(output, 2 * x, rtol=0, atol=0)
    torch.testing.assert_close(maps[0], as_maps(x), rtol=0, atol=0)
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, maps[0], cotangent)  # the maps lie on the way
    torch.testing.assert_close(gradient, as_maps(2 * cotangent), rtol=0, atol=0)


def test_copies_of_a_network_use_their_own_tap():
    class Tapped(Tokens):
        def __init__(self):
            super().__init__()
            self.map_layer = MapTap((2, 2)).put_behind(self.layer)

    original = Tapped()
    copied = copy.deepcopy(original)
    seen = []
    original.map_layer.register_forward_hook(lambda *args: seen.append("original"))
    copied.map_layer.register_forward_hook(lambda *args: seen.append("copy"))
    copied(torch.randn(1, 4, 3))
    assert seen == ["copy"]
    assert not original.state_dict()


@pytest.mark.parametrize("batch_norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_backbone_freezes_statistics_and_drops_features(batch_norm):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2 if batch_norm is nn.BatchNorm1d else 3), batch_norm(4))
    frozen = Backbone(network, 4, {"freeze_bn": True}, dropout=1.0)
    assert frozen.train() is frozen
    assert (frozen.training, network[-1].training) == (True, False)
    assert frozen(torch.randn(2, 3, 2, 2)).eq(0).all()
    assert frozen.eval()(torch.randn(2, 3, 2, 2)).ne(0).any()
    assert Backbone(network, 4, {}, dropout=0.0).network[-1].training


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_planes_are_taken_in_turn(channels):
    network = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1))
    old = network[1].weight.detach().clone()
    take_channels(network, channels)
    for plane in range(channels):
        torch.testing.assert_close(network[1].weight[:, plane], old[:, plane % 3])
    assert network[1].weight.requires_grad
    assert network(torch.randn(2, channels, 8, 8)).shape == (2, 4, 3, 3)


def test_channels_need_a_first_convolution():
    with pytest.raises(ValueError, match="Linear takes 3 channels, not 2; repeat"):
        take_channels(nn.Linear(3, 3), 2)


def test_the_last_layer_with_weights_is_cut():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Dropout(), nn.Conv2d(4, 9, 1), nn.ReLU()), nn.ReLU())
    assert cut_last_layer(network) == ("1.1", 4)
    assert network(torch.randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)


# Names

RANDOM = {"pretrained": False}


def test_registered_names():
    assert list(networks.BACKBONES) == [
        "dinov2", "identity", "efficientnet_lite0", "resnet18", "resnet50", "small_cnn", "mnist_cnn", "wide_resnet"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["small_cnn", "mnist_cnn", "wide_resnet", "resnet18"])
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 64, 48)])
def test_registered_networks_take_other_sizes(name, shape):
    featurizer = networks.Featurizer(shape, {"backbone": name} | RANDOM)
    seen = []
    featurizer.map_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert featurizer(torch.randn(2, *shape)).shape == (2, featurizer.n_outputs)
    assert seen[0].shape[:2] == (2, featurizer.n_outputs)


def test_resnet50_by_name():
    with torch.device("meta"):
        featurizer = networks.Featurizer((3, 160, 160), {"backbone": "resnet50", "resnet18": False} | RANDOM)
    assert isinstance(featurizer, networks.ResNet)
    assert featurizer.n_outputs == 2048


@pytest.mark.parametrize(
    ("hparams", "told"),
    [
        ({"backbone": "small_cnn", "resnet18": True}, "resnet18 is true, but backbone is 'small_cnn'"),
        ({"backbone": "resnet50", "resnet18": True}, "resnet18 is true, but backbone is 'resnet50'"),
        ({"backbone": "timm:resnet18", "resnet18": True}, "resnet18 is true, but backbone is 'timm:resnet18'"),
        ({"backbone": "resnet18", "dinov2": True}, "dinov2 is true, but backbone is 'resnet18'"),
    ],
)
def test_flags_that_contradict_the_backbone(hparams, told):
    with pytest.raises(ValueError, match=told):
        networks.Featurizer((3, 224, 224), hparams | RANDOM)


def test_a_flag_may_agree_with_the_backbone():
    with torch.device("meta"):
        featurizer = networks.Featurizer((3, 64, 64), {"backbone": "resnet18", "resnet18": True} | RANDOM)
    assert featurizer.n_outputs == 512


@pytest.mark.parametrize("name", ["resnet81", "hub:resnet18", "timm:", ":", "timm"])
def test_unknown_names_list_what_is_allowed(name):
    with pytest.raises(
        NotImplementedError, match=rf"backbone not found: {name};.*resnet18.*timm:NAME, torchvision:NAM"
    ):
        backbones.build(name, (3, 64, 64), RANDOM)


def test_vectors_have_no_backbone():
    with pytest.raises(ValueError, match=r"resnet18 takes images \(C, H, W\), not shape \(9,\)"):
        networks.Featurizer((9,), {"backbone": "resnet18"} | RANDOM)


def test_channels_last_changes_the_memory_and_not_the_features() -> None:
    def build(last: bool) -> Backbone:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Backbone(network, 4, {"channels_last": last}, dropout=0.0)

    seen, features, x = [], [], torch.randn(2, 3, 8, 8)
    for last in (True, False):
        backbone = build(last)
        backbone.network[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
        features.append(backbone(x))
    assert [maps.is_contiguous(memory_format=torch.channels_last) for maps in seen] == [True, False]
    torch.testing.assert_close(*features)

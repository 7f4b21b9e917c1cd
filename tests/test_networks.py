"""Networks: names and shapes that weights on disk rely on, the dispatch, maps, and errors without a network."""

import logging
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed import networks

MLP_HPARAMS = {"mlp_width": 6, "mlp_depth": 4, "mlp_dropout": 0.0}
RANDOM18 = {"resnet18": True, "pretrained": False}


@pytest.fixture(scope="module")
def resnet18():
    return networks.Featurizer((3, 224, 224), RANDOM18)


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


# Names and shapes


def test_mnist_cnn_has_domainbeds_weights():
    expected = {}
    for k, (fan_in, width) in enumerate([(2, 64), (64, 128), (128, 128), (128, 128)]):
        expected |= {f"conv{k + 1}.weight": (width, fan_in, 3, 3), f"conv{k + 1}.bias": (width,)}
        expected |= {f"bn{k}.weight": (width,), f"bn{k}.bias": (width,)}
    assert shapes(networks.MNIST_CNN((2, 28, 28))) == expected


def test_mnist_cnn_normalises_after_relu():
    network = networks.MNIST_CNN((1, 28, 28))
    x = torch.randn(2, 1, 28, 28)
    features = network(x)
    for k, stride in enumerate((1, 2, 1, 1)):
        weights, norm = getattr(network, f"conv{k + 1}"), getattr(network, f"bn{k}")
        x = nn.functional.conv2d(x, weights.weight, weights.bias, stride, 1).clamp(min=0)
        groups = x.reshape(2, 8, -1)
        x = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x.reshape(2, weights.out_channels, *((28, 28) if k == 0 else (14, 14)))
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(features, x.mean((2, 3)), rtol=1e-3, atol=1e-4)


def test_resnet_names_are_torchvisions_below_network(resnet18):
    from torchvision import models

    with torch.device("meta"):
        expected = {f"network.{name}" for name in models.resnet18().state_dict() if not name.startswith("fc.")}
    assert set(resnet18.state_dict()) == expected


def test_mlp_layers():
    network = networks.MLP(3, 5, MLP_HPARAMS)
    assert shapes(network) == {
        "input.weight": (6, 3), "input.bias": (6,), "hiddens.0.weight": (6, 6), "hiddens.0.bias": (6,),
        "hiddens.1.weight": (6, 6), "hiddens.1.bias": (6,), "output.weight": (5, 6), "output.bias": (5,),
    }  # fmt: skip
    assert network(torch.randn(7, 3)).shape == (7, network.n_outputs) == (7, 5)


def test_mlp_drops_hidden_units():
    network = networks.MLP(3, 5, MLP_HPARAMS | {"mlp_dropout": 1.0})
    torch.testing.assert_close(network(torch.randn(2, 3)), network.output.bias.expand(2, 5))


# Every featurizer

FEATURIZERS = {
    "vector": ((9,), MLP_HPARAMS, 6, None),
    "28": ((2, 28, 28), {}, 128, (128, 14, 14)),
    "32": ((3, 32, 32), {}, 128, (128, 8, 8)),
    "224": ((3, 224, 224), RANDOM18, 512, (512, 7, 7)),
    "small 28": ((2, 28, 28), {"backbone": "small_cnn"}, 48, (48, 7, 7)),
    "small 36": ((3, 36, 36), {"backbone": "small_cnn"}, 48, (48, 9, 9)),
}


@pytest.mark.parametrize(("shape", "hparams", "n_outputs", "map_shape"), FEATURIZERS.values(), ids=FEATURIZERS)
def test_featurizer_contract(shape, hparams, n_outputs, map_shape):
    featurizer = networks.Featurizer(list(shape), hparams)  # lists work as tuples do
    names = set(featurizer.state_dict())
    maps = []
    if map_shape is not None:
        featurizer.map_layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features = featurizer(torch.randn(2, *shape))
    assert features.shape == (2, n_outputs) == (2, featurizer.n_outputs)
    if map_shape is not None:
        assert [m.shape for m in maps] == [(2, *map_shape)]
        torch.testing.assert_close(maps[0].mean((2, 3)), features)  # pooled, with nothing in between
        assert torch.autograd.grad(features.sum(), maps[0])[0].abs().sum() > 0
    assert set(featurizer.state_dict()) == names
    assert featurizer.train() is featurizer
    featurizer.activation = nn.Threshold(1e9, 5.0)
    assert featurizer(torch.randn(2, *shape)).eq(5).all()


@pytest.mark.parametrize(("pixels", "map_size"), [(28, 7), (36, 9)])
def test_small_cnn_costs_at_most_8_mflop(pixels, map_size):
    network = networks.SmallCNN((3, pixels, pixels))
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, pixels, pixels))
    by_hand = sum(
        module.weight.numel() * side**2
        for module, side in zip(
            [m for m in network.modules() if isinstance(m, nn.Conv2d)],
            (pixels, pixels // 2, map_size, map_size, map_size),
            strict=True,
        )
    )
    assert counter.get_total_flops() == 2 * by_hand <= 8_000_000


def test_resnet18_is_enough_at_any_size():
    featurizer = networks.Featurizer(
        (3, 64, 64), {"resnet18": True, "pretrained": False, "resnet_dropout": 0.0, "freeze_bn": False}
    )
    assert featurizer(torch.rand(2, 3, 64, 64)).shape == (2, 512)


def test_unsupported_size_names_the_way_out():
    with pytest.raises(
        NotImplementedError, match=r"\(3, 64, 64\).*28 x 28, 32 x 32, 224 x 224.*backbone.*small_cnn.*timm:"
    ):
        networks.Featurizer([3, 64, 64], {})


def test_unknown_backbone_and_bare_vit():
    with pytest.raises(NotImplementedError, match="did you mean small_cnn"):
        networks.Featurizer((3, 28, 28), {"backbone": "smal_cnn"})
    with pytest.raises(NotImplementedError, match="dinov2"):
        networks.Featurizer((3, 224, 224), {"vit": True, "dinov2": False})


# ResNet


class FakeResNet(nn.Module):
    """As little of a residual network as the class touches."""

    def __init__(self, features=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, features, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.fc = nn.Linear(features, 10)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).mean((2, 3)))


@pytest.fixture
def built(monkeypatch):
    """Replaces timm and torchvision's builders; records what is asked for."""
    from torchvision import models

    calls = []

    def create_model(name, pretrained):
        calls.append(("timm", name, pretrained))
        return FakeResNet()

    def get_model(name, weights):
        calls.append(("torchvision", name, weights and str(weights)))
        return FakeResNet()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    monkeypatch.setattr(models, "get_model", get_model)
    return calls


@pytest.mark.parametrize(
    ("hparams", "call"),
    [
        ({}, ("timm", "resnet50.ram_in1k", True)),
        ({"resnet50_augmix": True, "resnet18": False}, ("timm", "resnet50.ram_in1k", True)),
        ({"resnet50_augmix": False}, ("torchvision", "resnet50", "ResNet50_Weights.IMAGENET1K_V1")),
        ({"resnet18": True, "resnet50_augmix": False}, ("torchvision", "resnet18", "ResNet18_Weights.IMAGENET1K_V1")),
        ({"resnet18": True, "resnet50_augmix": True}, ("torchvision", "resnet18", "ResNet18_Weights.IMAGENET1K_V1")),
        ({"pretrained": False}, ("torchvision", "resnet50", None)),
        (RANDOM18, ("torchvision", "resnet18", None)),
    ],
)
def test_only_the_weights_in_use_are_loaded(built, hparams, call):
    network = networks.ResNet((3, 224, 224), hparams)
    assert built == [call]
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_resnet18_that_wins_is_logged(built, caplog):
    with caplog.at_level(logging.INFO):
        networks.ResNet((3, 224, 224), {"resnet18": True, "resnet50_augmix": True})
    assert "resnet50_augmix is not used" in caplog.text
    caplog.clear()
    networks.ResNet((3, 224, 224), {"resnet18": True, "resnet50_augmix": False})
    assert caplog.text == ""


@pytest.mark.parametrize("pixels", [28, 32])
def test_resnet18_that_the_size_overrules_is_warned_of(caplog, pixels):
    networks.Featurizer((3, pixels, pixels), RANDOM18)
    assert f"resnet18 is not used: images of {pixels} x {pixels} pixels get" in caplog.text
    assert "set the hparam backbone to resnet18" in caplog.text
    caplog.clear()
    networks.Featurizer((3, pixels, pixels), {"backbone": "resnet18"} | RANDOM18)
    assert caplog.text == ""


def test_random_resnets_have_their_own_widths(resnet18):
    assert resnet18.n_outputs == 512
    with torch.device("meta"):
        assert networks.ResNet((3, 224, 224), {"pretrained": False}).n_outputs == 2048


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_first_layer_repeats_its_planes(built, monkeypatch, channels):
    original = FakeResNet()
    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda name, pretrained: original)
    old = original.conv1.weight.detach().clone()
    network = networks.ResNet((channels, 224, 224), {})
    new = network.network.conv1
    assert new.weight.requires_grad
    assert (new.stride, new.padding, new.bias) == ((2, 2), (3, 3), None)
    for plane in range(channels):
        torch.testing.assert_close(new.weight[:, plane], old[:, plane % 3])
    assert network(torch.randn(2, channels, 8, 8)).shape == (2, 4)


def test_frozen_statistics_survive_train(built):
    network = networks.ResNet((3, 224, 224), {"freeze_bn": True})
    assert not network.network.bn1.training
    assert network.train() is network
    assert network.training
    assert not network.network.bn1.training
    assert network.network.bn1.weight.requires_grad
    free = networks.ResNet((3, 224, 224), {})
    assert free.eval().train().network.bn1.training
    free.freeze_bn()
    assert not free.network.bn1.training


def test_features_are_dropped(built):
    network = networks.ResNet((3, 224, 224), {"resnet_dropout": 1.0})
    x = torch.randn(2, 3, 8, 8)
    assert network(x).eq(0).all()
    assert network.eval()(x).ne(0).any()


def test_missing_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install domainbed-ex2l\[timm\]"):
        networks.ResNet((3, 224, 224), {})


def unreachable(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


def test_missing_torchvision_weights_name_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(OSError, match=r"checkpoints/resnet18-\w+\.pth, from https.*no route.*\"pretrained\": false"):
        networks.ResNet((3, 224, 224), {"resnet18": True})


def test_weights_placed_beforehand_are_taken(monkeypatch, tmp_path, resnet18):
    from torchvision import models

    file = Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
    (tmp_path / "checkpoints").mkdir()
    state = resnet18.network.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "checkpoints" / file)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    loaded = networks.ResNet((3, 224, 224), {"resnet18": True})
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in resnet18.state_dict().items())


def test_missing_timm_weights_name_the_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=unreachable))
    with pytest.raises(OSError, match=r"timm/resnet50\.ram_in1k.*no route.*\"pretrained\": false"):
        networks.ResNet((3, 224, 224), {})


def test_folding_batch_norm_keeps_the_function(resnet18):
    network = networks.ResNet((3, 224, 224), RANDOM18).network
    x = torch.randn(2, 3, 48, 48)
    network(x)  # moves the running statistics
    expected = network.eval()(x)
    assert networks.remove_batch_norm_from_resnet(network.train()) is network
    assert network.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)


# DINOv2, from a stand-in for what torch.hub returns


class FakeViT(nn.Module):
    def __init__(self):
        super().__init__()
        layers = ("norm1", "attn", "mlp")
        self.blocks = nn.ModuleList(nn.ModuleDict({layer: nn.Linear(2, 2) for layer in layers}) for _ in range(2))
        self.patch_embed = nn.Linear(2, 2)

    def get_intermediate_layers(self, x, n, return_class_token):
        assert return_class_token
        rows = len(x)
        return tuple((torch.full((rows, 4, 768), 10.0 + k), torch.full((rows, 768), float(k))) for k in range(n))


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load(repository, model, **options):
        calls.append((repository, model, options))
        return FakeViT()

    monkeypatch.setattr(torch.hub, "load", load)
    return calls


def test_dinov2_features_are_four_class_tokens_and_the_mean_patch(hub):
    network = networks.Featurizer((3, 224, 224), {"vit": True, "dinov2": True, "vit_dropout": 0.0})
    assert hub == [("facebookresearch/dinov2", "dinov2_vitb14", {"pretrained": True})]
    features = network(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, network.n_outputs) == (2, 3840)
    assert features.reshape(2, 5, 768)[:, :, 0].tolist() == [[0.0, 1.0, 2.0, 3.0, 13.0]] * 2
    assert all(p.requires_grad for p in network.parameters())


def test_dinov2_trains_attention_only(hub):
    network = networks.DinoV2((3, 224, 224), {"vit_attn_tune": True, "pretrained": False})
    assert hub[0][2] == {"pretrained": False}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {f"network.blocks.{k}.attn.{p}" for k in (0, 1) for p in ("weight", "bias")}


def test_dinov2_errors(monkeypatch, hub):
    with pytest.raises(ValueError, match="1 channels"):
        networks.DinoV2((1, 224, 224), {})
    monkeypatch.setattr(torch.hub, "load", unreachable)
    with pytest.raises(OSError, match=r"facebookresearch/dinov2.*no route"):
        networks.DinoV2((3, 224, 224), {})


# Classifiers and the rest


def test_classifiers():
    linear = networks.Classifier(8, 3)
    assert isinstance(linear, nn.Linear)
    assert linear(torch.randn(2, 8)).shape == (2, 3)
    deep = networks.Classifier(8, 3, is_nonlinear=True)
    assert [tuple(m.weight.shape) for m in deep if isinstance(m, nn.Linear)] == [(4, 8), (2, 4), (3, 2)]
    assert deep(torch.randn(2, 8)).shape == (2, 3)


def test_context_net_keeps_the_image_size():
    network = networks.ContextNet((3, 9, 9))
    assert network(torch.randn(2, 3, 9, 9)).shape == (2, 1, 9, 9)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [64, 64, 1]


def test_whole_fish_is_set_back_to_a_copy():
    hparams = MLP_HPARAMS | {"nonlinear_classifier": False}
    first = networks.WholeFish((3,), 2, hparams)
    second = networks.WholeFish((3,), 2, hparams, weights=first.state_dict())
    x = torch.randn(4, 3)
    expected = first(x)
    torch.testing.assert_close(second(x), expected)
    with torch.no_grad():
        second.net[1].weight.zero_()
    torch.testing.assert_close(first(x), expected)
    second.reset_weights(first.state_dict())
    torch.testing.assert_close(second(x), expected)


def test_identity_is_a_module():
    x = torch.randn(2)
    assert networks.Identity()(x) is x

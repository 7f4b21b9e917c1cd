"""Branches of a shared trunk against two whole networks with equal weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from domainbed import networks
from domainbed.attribution import capture
from domainbed.backbones.base import Backbone
from domainbed.branches import Branch, _choice, trunk_output

NETWORKS = {  # backbone, input shape, layer, share of the parameters that is the branch's
    "SmallCNN": ("small_cnn", (3, 36, 36), "features.12", 0.510),
    "MNIST_CNN": ("mnist_cnn", (2, 28, 28), "conv4", 0.398),
    "ResNet-18": ("resnet18", (3, 64, 64), "network.layer4", 0.751),
    "EfficientNet-Lite0": ("efficientnet_lite0", (3, 64, 64), "network.blocks.6", 0.302),
    "ConvNeXt": ("timm:test_convnext", (3, 64, 64), "network.stages.3", 0.413),
    "ViT": ("timm:test_vit", (3, 32, 32), "network.blocks.4", 0.279),
}


def build(backbone: str, shape: tuple[int, ...], **hparams: object) -> nn.Module:
    torch.manual_seed(0)
    return networks.Featurizer(shape, {"backbone": backbone, "pretrained": False, **hparams})


def images(shape: tuple[int, ...], count: int = 4) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def without_chance(network: nn.Module) -> nn.Module:
    """The network with no dropout and no stochastic depth, so that two runs in training mode agree."""
    for module in network.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


@pytest.mark.parametrize(("backbone", "shape", "layer", "share"), NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_those_of_two_networks(backbone: str, shape: tuple[int, ...], layer: str, share: float) -> None:
    featurizer = without_chance(build(backbone, shape)).double()
    branch, twins = Branch(featurizer, layer, shape), [copy.deepcopy(featurizer) for _ in range(2)]
    x = images(shape).double()
    with trunk_output(featurizer, layer) as seen, capture(featurizer.map_layer), capture(branch.map_layer) as maps:
        both = [featurizer(x), branch(seen.value)]
    expected = [twin(x) for twin in twins]
    heads = [torch.randn(branch.n_outputs, 3).double() for _ in both]
    for outputs in (both, expected):
        sum((features @ head).square().sum() for features, head in zip(outputs, heads, strict=True)).backward()

    torch.testing.assert_close(both, expected)
    assert maps.maps.shape[0] == len(x)
    first, second = (dict(twin.named_parameters()) for twin in twins)
    rest = {name.removeprefix("rest."): parameter for name, parameter in branch.named_parameters()}
    for name, parameter in featurizer.named_parameters():
        own = first[name].grad if name in rest else first[name].grad + second[name].grad
        torch.testing.assert_close(parameter.grad, own, rtol=1e-5, atol=1e-9 * float(1 + own.abs().max()))
    for name, parameter in rest.items():
        torch.testing.assert_close(
            parameter.grad, second[name].grad, rtol=1e-5, atol=1e-9 * float(1 + parameter.grad.abs().max())
        )
    sizes = [sum(p.numel() for p in module.parameters()) for module in (branch, featurizer)]
    assert sizes[0] / sizes[1] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [("torchvision:alexnet", "network.features.8"), ("torchvision:convnext_tiny", "network.features.7")],
)
def test_features_of_large_networks(backbone: str, layer: str) -> None:
    featurizer, x = build(backbone, (3, 64, 64)).eval(), images((3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(Branch(featurizer, layer, (3, 64, 64)).full(featurizer, x), featurizer(x))


def test_state_holds_no_trunk_and_comes_back() -> None:
    featurizer = build("resnet18", (3, 64, 64))
    branch = Branch(featurizer, "network.layer4", (3, 64, 64))
    assert branch.state_dict().keys() == {
        f"rest.{name}" for name in featurizer.state_dict() if name.startswith("network.layer4.")
    }
    other = Branch(build("resnet18", (3, 64, 64)), "network.layer4", (3, 64, 64))
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter += 0.1
    other.load_state_dict(branch.state_dict())
    x = images((3, 64, 64))
    torch.testing.assert_close(other.eval().full(featurizer, x), branch.eval().full(featurizer, x))


def test_a_vit_leaves_its_positions_to_the_trunk() -> None:
    branch = Branch(build("timm:test_vit", (3, 32, 32)), "network.blocks.4", (3, 32, 32))
    prefixes = {name.split(".")[2] for name in branch.state_dict()}
    assert prefixes == {"blocks", "norm"}
    assert not list(branch.buffers())


def test_building_changes_nothing() -> None:
    featurizer = build("resnet18", (3, 64, 64), freeze_bn=True)
    featurizer.network.layer1.eval()
    state, modes = copy.deepcopy(featurizer.state_dict()), [module.training for module in featurizer.modules()]
    rng = torch.get_rng_state()
    branch = Branch(featurizer, "network.layer4", (3, 64, 64))
    torch.testing.assert_close(featurizer.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in featurizer.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in featurizer.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in featurizer.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert branch.rest.training
    assert not branch.rest.network.layer4[0].bn1.training


def test_batch_norm_counts_each_step_once() -> None:
    featurizer = build("resnet18", (3, 64, 64)).train()
    branch = Branch(featurizer, "network.layer4", (3, 64, 64)).train()
    with trunk_output(featurizer, "network.layer4") as seen:
        featurizer(images((3, 64, 64)))
    branch(seen.value)
    counts = [*(v for k, v in featurizer.state_dict().items() if k.endswith("num_batches_tracked"))]
    counts += [v for k, v in branch.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts == [1] * 25


@pytest.mark.parametrize("freeze", [True, False])
def test_modes_reach_the_branch(freeze: bool) -> None:
    featurizer = build("resnet18", (3, 64, 64), freeze_bn=freeze, resnet_dropout=1.0)
    branch, x = Branch(featurizer, "network.layer4", (3, 64, 64)), images((3, 64, 64))
    for mode in (False, True):
        assert branch.train(mode) is branch
        assert branch.full(featurizer, x).eq(0).all() == mode  # dropout takes all
    assert branch.rest.network.layer4[1].bn2.training != freeze


def test_channels_last_stays() -> None:
    featurizer = build("resnet18", (3, 64, 64), channels_last=True)
    branch = Branch(featurizer, "network.layer4", (3, 64, 64))
    with trunk_output(featurizer, "network.layer4") as seen, capture(branch.map_layer) as maps:
        featurizer(images((3, 64, 64)))
        branch(seen.value)
    assert maps.maps.is_contiguous(memory_format=torch.channels_last)
    assert not maps.maps.is_contiguous()


def test_frozen_weights_stay_frozen() -> None:
    featurizer = build("small_cnn", (3, 36, 36)).requires_grad_(False)
    branch = Branch(featurizer, "features.12", (3, 36, 36))
    assert not any(parameter.requires_grad for parameter in [*featurizer.parameters(), *branch.parameters()])


def test_a_copy_of_a_branch_reads_its_own_input() -> None:
    featurizer = build("small_cnn", (3, 36, 36)).eval()
    branch = Branch(featurizer, "features.12", (3, 36, 36))
    copied, x = copy.deepcopy(branch), images((3, 36, 36))
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied.full(featurizer, x), featurizer(x))
    assert branch.full(featurizer, x).eq(0).all()


def test_full_stops_at_the_layer() -> None:
    featurizer = build("small_cnn", (3, 36, 36))
    branch = Branch(featurizer, "features.12", (3, 36, 36))
    with capture(featurizer.features[11]) as last, capture(featurizer.features[12]) as first:
        branch.full(featurizer, images((3, 36, 36)))
    assert last.maps.shape == (4, 48, 9, 9)
    with pytest.raises(RuntimeError, match="did not run"):
        _ = first.maps


def test_other_image_sizes_pass() -> None:
    featurizer = build("small_cnn", (3, 36, 36)).eval()
    branch = Branch(featurizer, "features.12", (3, 36, 36)).eval()
    x = images((3, 28, 28), count=3)
    torch.testing.assert_close(branch.full(featurizer, x), featurizer(x))


class Overwriting(nn.Module):
    """A layer that writes into its input, one that runs twice, one with a sum around it, one that starts a sequence."""

    n_outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.overwriting, self.twice, self.inner = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)))
        x = self.overwriting(x)
        x = x + self.inner(x)
        return self.last(x).mean((2, 3))


class AroundWithoutWeights(nn.Module):
    """The images themselves are added behind the layer."""

    n_outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.last(self.stem(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (Overwriting(), "overwriting", "the layer overwrites it"),
        (Overwriting(), "twice", "runs 2 times"),
        (Overwriting(), "unused", "runs 0 times"),
        (Overwriting(), "inner", "a path leads around the layer"),
        (AroundWithoutWeights(), "last", "all the rest, and nothing else, is computed from"),
        (Overwriting(), "lost", "has no layer 'lost'.*layers to try: stem, last, "),
        (Overwriting(), "", "has no layer ''"),
    ],
)
def test_impossible_splits_are_refused(network: nn.Module, layer: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Branch(network, layer, (3, 4, 4))


def test_a_possible_split_of_the_same_network() -> None:
    network, x = Overwriting(), images((3, 4, 4))
    torch.testing.assert_close(Branch(network, "last", (3, 4, 4)).full(network, x), network(x))


@pytest.mark.parametrize("layer", ["features.14", "activation"])
def test_a_branch_without_a_map_of_its_own_is_refused(layer: str) -> None:
    with pytest.raises(ValueError, match='all that makes the map is shared; say so by the value "classifier"'):
        Branch(build("small_cnn", (3, 36, 36)), layer, (3, 36, 36))


@pytest.mark.parametrize(
    ("backbone", "shape", "layer"),
    [
        ("small_cnn", (3, 36, 36), "features.12"),
        ("mnist_cnn", (2, 28, 28), "conv4"),
        ("resnet18", (3, 64, 64), "network.layer4"),
        ("torchvision:convnext_tiny", (3, 64, 64), "network.features.7"),
    ],
)
def test_the_layers_that_messages_name_will_do(backbone: str, shape: tuple[int, ...], layer: str) -> None:
    featurizer = build(backbone, shape)
    names = _choice(featurizer).removeprefix("layers to try: ").split(", ")
    assert layer in names
    assert len(names) > 3
    for name in names[-4:]:  # of many, those that make small branches
        Branch(featurizer, name, shape)


def test_output_of_a_layer_that_has_not_run_is_no_output() -> None:
    featurizer = build("small_cnn", (3, 36, 36))
    with trunk_output(featurizer, "features.12") as seen:
        pass
    with pytest.raises(RuntimeError, match=r"features\.12 did not run"):
        _ = seen.value
    assert not featurizer.features[12]._forward_pre_hooks


def test_any_backbone_can_be_asked_for_its_own_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    featurizer = Backbone(network, 5, {}, dropout=0.0)
    branch, x = Branch(featurizer, "network.1", (3, 8, 8)), images((3, 8, 8))
    torch.testing.assert_close(branch.full(featurizer, x), featurizer(x))
    assert branch.map_layer is None


def test_another_map_layer() -> None:
    featurizer, x = build("small_cnn", (3, 36, 36)), images((3, 36, 36))
    branch = Branch(featurizer, "features.9", (3, 36, 36), map_layer="features.10")
    with capture(featurizer.features[10]) as expected, capture(branch.map_layer) as maps:
        featurizer(x)
        branch.full(featurizer, x)
    torch.testing.assert_close(maps.maps, expected.maps)
    with pytest.raises(ValueError, match="all that makes the map is shared"):
        Branch(featurizer, "features.12", (3, 36, 36), map_layer="features.11")
    with pytest.raises(ValueError, match=r"no layer 'features\.20'"):
        Branch(featurizer, "features.12", (3, 36, 36), map_layer="features.20")

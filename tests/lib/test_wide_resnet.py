"""The wide residual network: DomainBed's weights by name and shape, and a forward pass written out by formula."""

import pytest
import torch
import torch.nn.functional as F

from domainbed.lib.wide_resnet import Wide_ResNet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def block(name: str, inside: int, outside: int) -> dict[str, tuple[int, ...]]:
    """The weights of one block by name, in order."""
    found = norm(f"{name}.bn1", inside) | convolution(f"{name}.conv1", inside, outside)
    found |= norm(f"{name}.bn2", outside) | convolution(f"{name}.conv2", outside, outside)
    return found | (convolution(f"{name}.shortcut.0", inside, outside, 1) if inside != outside else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": () if part.startswith("num") else (width,) for part in NORM}


def convolution(name: str, inside: int, outside: int, side: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outside, inside, side, side), f"{name}.bias": (outside,)}


def test_names_and_shapes_are_domainbeds():
    expected = convolution("conv1", 3, 16)
    for stage, (inside, outside) in enumerate([(16, 32), (32, 64), (64, 128)], 1):
        expected |= block(f"layer{stage}.0", inside, outside) | block(f"layer{stage}.1", outside, outside)
    expected |= norm("bn1", 128)
    state = Wide_ResNet((3, 32, 32), 16, 2, 0.0).state_dict()
    assert [(name, tuple(value.shape)) for name, value in state.items()] == list(expected.items())


def test_momenta_and_the_place_of_strides_are_domainbeds():
    network = Wide_ResNet((3, 32, 32), 16, 2, 0.0)
    momenta = {name: m.momentum for name, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {name for name, momentum in momenta.items() if momentum != 0.1} == {"bn1"}
    assert momenta["bn1"] == 0.9
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    strided = {f"layer{stage}.0.{name}" for stage in (2, 3) for name in ("conv2", "shortcut.0")}
    assert {name for name, m in convolutions.items() if m.stride != (1, 1)} == strided


def test_equal_seeds_give_the_weights_of_the_layers_made_one_after_the_other():
    """The order in which DomainBed makes them, from torch's defaults."""
    torch.manual_seed(0)
    network = Wide_ResNet((2, 32, 32), 10, 1, 0.0)
    torch.manual_seed(0)
    expected = [torch.nn.Conv2d(2, 16, 3)]
    for inside, outside in ((16, 16), (16, 32), (32, 64)):
        expected += [torch.nn.Conv2d(inside, outside, 3), torch.nn.Conv2d(outside, outside, 3)]
        expected += [torch.nn.Conv2d(inside, outside, 1)] if inside != outside else []
    found = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer, own in zip(expected, found, strict=True):
        assert torch.equal(layer.weight, own.weight)
        assert torch.equal(layer.bias, own.bias)


def slow_forward(state, x):
    """The network in evaluation mode, from its weights in the order in which they are made."""
    names = {name.rpartition(".")[0] for name in state}

    def normed(name, x):
        gamma, beta, mean, variance = (state[f"{name}.{part}"].reshape(-1, 1, 1) for part in NORM[:4])
        return ((x - mean) / (variance + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    def convolved(name, x, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    x = convolved("conv1", x)
    for stage in (1, 2, 3):
        for i in (0, 1):
            place, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            inner = normed(f"{place}.bn2", convolved(f"{place}.conv1", normed(f"{place}.bn1", x)))
            inner = convolved(f"{place}.conv2", inner, stride)
            x = inner + (convolved(f"{place}.shortcut.0", x, stride) if f"{place}.shortcut.0" in names else x)
    return normed("bn1", x).mean((2, 3))


@pytest.mark.parametrize("size", [28, 32, 48])
def test_forward_follows_the_definition(size):
    torch.manual_seed(0)
    network = Wide_ResNet((2, size, size), 16, 1, 0.3).double()
    network(torch.randn(4, 2, size, size).double())  # moves the running statistics
    network.eval()
    x = torch.randn(3, 2, size, size).double()
    torch.testing.assert_close(network(x), slow_forward(network.state_dict(), x))


def test_dropout_stands_between_the_convolutions():
    torch.manual_seed(0)
    network, x = Wide_ResNet((3, 32, 32), 10, 1, 0.5), torch.randn(2, 3, 32, 32)
    places = [name for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.5]
    assert places == [f"layer{stage}.0.dropout" for stage in (1, 2, 3)]
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


def test_the_map_before_pooling():
    network, seen = Wide_ResNet((3, 32, 32), 10, 2, 0.0), []
    network.map_layer.register_forward_hook(lambda *args: seen.append(args[-1]))
    features = network(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, network.n_outputs) == (2, 128)
    assert seen[0].shape == (2, 128, 8, 8)
    torch.testing.assert_close(seen[0].mean((2, 3)), features)


@pytest.mark.parametrize("depth", [4, 15, 17])
def test_depth_is_checked(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        Wide_ResNet((3, 32, 32), depth, 2, 0.0)

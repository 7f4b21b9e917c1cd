"""Weights: what hparams ask for, files that are read, and files that are not what they should be."""

from pathlib import Path

import pytest
import torch
from torch import nn

from domainbed import networks
from domainbed.backbones import weights
from domainbed.backbones.weights import Choice


@pytest.mark.parametrize(
    ("hparams", "choice", "from_hub"),
    [
        ({}, Choice(), True),
        ({"pretrained": False}, Choice(pretrained=False), False),
        ({"weights": "IMAGENET1K_V2"}, Choice(name="IMAGENET1K_V2"), True),
        ({"weights": "a.b/c.safetensors", "pretrained": True}, Choice(file=Path("a.b/c.safetensors")), False),
        ({"weights": "~/c.pth"}, Choice(file=Path.home() / "c.pth"), False),
    ],
)
def test_choice(hparams, choice, from_hub):
    assert Choice.of(hparams) == choice
    assert choice.from_hub == from_hub


def test_weights_without_pretraining_contradict():
    with pytest.raises(ValueError, match="weights is 'IMAGENET1K_V1', but pretrained is false"):
        Choice.of({"weights": "IMAGENET1K_V1", "pretrained": False})


@pytest.fixture
def state():
    return {"0.weight": torch.randn(2, 3), "0.bias": torch.randn(2), "fc.weight": torch.randn(10, 2)}


def write(state, file):
    if file.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
def test_read_gives_back_what_was_saved(tmp_path, state, name):
    got = weights.read(write(state, tmp_path / name))
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_read_finds_a_state_dict_inside(tmp_path, state, key):
    file = write({key: state, "epoch": 3}, tmp_path / "w.pth")
    assert weights.read(file).keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "no state dict.*list"),
        ({"epoch": 3}, "no state dict"),
        (nn.Linear(1, 1), "can't be read.*weights_only"),
    ],
)
def test_read_refuses_what_is_no_state_dict(tmp_path, content, told):
    with pytest.raises(ValueError, match=rf"(?s)w\.pth.*{told}"):
        weights.read(write(content, tmp_path / "w.pth"))


def test_read_refuses_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        weights.read(tmp_path / "none.pth")
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(ValueError, match=rf"{name} can't be read as a state dict"):
            weights.read(tmp_path / name)


def test_load_leaves_out_the_head(state):
    network = nn.Sequential(nn.Linear(3, 2))
    weights.load(network, state, "w.pth", head=["fc"])
    assert torch.equal(network[0].weight, state["0.weight"])


def test_load_tells_all_that_does_not_fit(state):
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2), *(nn.PReLU() for _ in range(6)))
    missing = r"missing: 1\.weight, 1\.bias, 2\.weight, 3\.weight, 4\.weight and 3 more"
    shape = r"of another shape: 0\.weight \(2, 3\) for \(2, 4\)"
    with pytest.raises(
        ValueError, match=rf"w\.pth does not fit Sequential; {missing}; unexpected: fc\.weight; {shape}"
    ):
        weights.load(network, state, "w.pth")


def test_old_files_without_batch_counts_fit():
    network = nn.Sequential(nn.BatchNorm2d(2))
    old = {name: value + 1 for name, value in network.state_dict().items() if not name.endswith("tracked")}
    weights.load(network, old, "w.pth")
    assert network[0].running_mean.tolist() == [1, 1]


@pytest.mark.parametrize("size", [28, 32])
def test_small_networks_take_a_file_and_no_name(tmp_path, size):
    saved = networks.Featurizer((3, size, size), {})
    file = write(saved.state_dict(), tmp_path / "w.pth")
    loaded = networks.Featurizer((3, size, size), {"weights": str(file)})
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    with pytest.raises(ValueError, match=r"'V1'; (MNIST_CNN|Wide_ResNet) has no weights.*\.safetensors"):
        networks.Featurizer((3, size, size), {"weights": "V1"})


def test_by_position():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    values = {name: torch.rand_like(value, dtype=torch.float) for name, value in network.state_dict().items()}
    renamed = {f"layer{k}.{name.rpartition('.')[2]}": value for k, (name, value) in enumerate(values.items())}
    assert weights.by_position(renamed, network, "w.pth") == values
    with pytest.raises(ValueError, match=r"w\.pth holds 6 tensors; Sequential has 7"):
        weights.by_position(dict(list(renamed.items())[1:]), network, "w.pth")
    swapped = renamed | {"layer0.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=r"layer0.weight \(2, 4\) for 0.weight \(2, 3\)"):
        weights.by_position(swapped, network, "w.pth")
    names = [name.replace("bias", "scale") for name in renamed]
    with pytest.raises(ValueError, match=r"layer1\.scale"):
        weights.by_position(dict(zip(names, renamed.values(), strict=True)), network, "w.pth")

"""ColoredMNIST and RotatedMNIST against DomainBed's protocol, on random images in MNIST's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate, to_pil_image, to_tensor

from domainbed import datasets
from domainbed.datasets.mnist import load_mnist


def raw_arrays(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """The idx files read by hand, training files first."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer((root / "MNIST/raw" / name).read_bytes()[header:], np.uint8)

    images = [read(f"{part}-images-idx3-ubyte", 16).reshape(-1, 28, 28) for part in ("train", "t10k")]
    return np.concatenate(images), np.concatenate([read(f"{part}-labels-idx1-ubyte", 8) for part in ("train", "t10k")])


@pytest.mark.parametrize("seed", [0, 1])
def test_colored_mnist_draw_by_draw(mnist_root: Path, seed: int) -> None:
    torch.manual_seed(seed)
    dataset = datasets.get_dataset_class("ColoredMNIST")(str(mnist_root), [2], {})
    torch.manual_seed(seed)
    images, digits = raw_arrays(mnist_root)
    order = torch.randperm(720).numpy()
    images, digits = images[order], digits[order]
    assert dataset.input_shape == (2, 28, 28)
    assert dataset.num_classes == 2
    for e, p in enumerate([0.1, 0.2, 0.9]):
        here, those = images[e::3], digits[e::3]
        noisy = torch.rand(240).numpy() < 0.25
        turned = torch.rand(240).numpy() < p
        for i in range(240):
            y = int(those[i] < 5) ^ int(noisy[i])
            color = y ^ int(turned[i])
            expected = np.zeros((2, 28, 28), np.float32)
            expected[color] = here[i] / np.float32(255)
            x, label = dataset[e][i]
            assert np.array_equal(x.numpy(), expected)
            assert (int(label), int(dataset[e].y[i]), int(dataset[e].c[i])) == (y, y, color)
        assert torch.equal(dataset[e].tensors[0][5], dataset[e][5][0])  # a TensorDataset, as DomainBed's


def test_rotated_mnist_against_torchvision(mnist_root: Path) -> None:
    torch.manual_seed(0)
    dataset = datasets.get_dataset_class("RotatedMNIST")(str(mnist_root), [0], {})
    torch.manual_seed(0)
    images, digits = raw_arrays(mnist_root)
    order = torch.randperm(720).numpy()
    assert [len(environment) for environment in dataset] == [120] * 6
    for e, angle in enumerate(range(0, 90, 15)):
        for i in (0, 7, 50):
            source = to_pil_image(torch.from_numpy(images[order][e::6][i].copy()))
            expected = to_tensor(rotate(source, angle, InterpolationMode.BILINEAR, fill=[0]))
            x, y = dataset[e][i]
            assert torch.equal(x, expected)
            assert int(y) == digits[order][e::6][i]
            assert dataset[e].c[i] == e


def test_hooks_that_others_override(mnist_root: Path) -> None:
    base = datasets.get_dataset_class("ColoredMNIST")

    class Noiseless(base):
        def torch_bernoulli_(self, p: float, size: int) -> torch.Tensor:
            return torch.zeros(size)

    dataset = Noiseless(str(mnist_root), [0], {})
    assert all((environment.y == environment.c).all() for environment in dataset)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError, match=r"lacks train-images-idx3-ubyte, .* put them there"):
        load_mnist(str(tmp_path))


def test_no_data_dir() -> None:
    with pytest.raises(ValueError, match="MNIST needs --data_dir"):
        load_mnist(None)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x01\x02" + b[2:]])
def test_a_damaged_file_is_said_so(mnist_root: Path, tmp_path: Path, name: str, damage) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(damage(path.read_bytes()) if path.name == name else path.read_bytes())
    with pytest.raises(ValueError, match=r"damaged .* replace it"):
        load_mnist(str(tmp_path))

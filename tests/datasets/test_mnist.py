"""ColoredMNIST and RotatedMNIST against DomainBed's protocol, on random images in MNIST's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize, rotate, to_pil_image, to_tensor

from domainbed import datasets
from domainbed.datasets.mnist import load_mnist
from domainbed.loaders import TrainingLoader, evaluation_batches
from domainbed.partitions import REGISTRY as PARTITIONS
from domainbed.splits import split_environments, training_splits


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


def both(root: Path, seed: int, **hparams) -> tuple:
    """ColoredMNIST at 28 px and the enlarged one, from the same seed."""
    built = []
    for name in ("ColoredMNIST", "ColoredMNIST224"):
        torch.manual_seed(seed)
        built.append(datasets.get_dataset_class(name)(str(root), [2], hparams))
    return tuple(built)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_enlarged_one_has_the_same_draws(mnist_root: Path, seed: int) -> None:
    small, large = both(mnist_root, seed)
    assert (large.input_shape, large.num_classes, large.num_confounders) == ((3, 224, 224), 2, 2)
    for a, b in zip(small, large, strict=True):
        assert np.array_equal(a.y, b.y)
        assert np.array_equal(a.c, b.c)
        for i in (0, 17, 239):
            assert torch.equal(b.read(i).float() / 255, a[i][0])
            assert b[i][1] == int(a[i][1])


def test_enlarging_against_torchvision(mnist_root: Path) -> None:
    small, large = both(mnist_root, 0, image_size=50)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for i in (0, 5):
        color, digit = int(small[1].c[i]), small[1][i][0].sum(0)
        expected = torch.zeros(3, 50, 50)
        expected[color] = resize(digit[None], [50, 50], InterpolationMode.BILINEAR, antialias=False)[0]
        assert torch.allclose(large[1][i][0], (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-5)
        assert not large[1][i][0][1 - color].diff().any()  # the other colour's channel is empty


def test_the_enlarged_one_stays_small_in_memory(mnist_root: Path) -> None:
    _, large = both(mnist_root, 0)
    assert all(environment.images.dtype == torch.uint8 for environment in large)
    assert (
        len({environment.images.untyped_storage().data_ptr() for environment in large}) == 1
    )  # of 720 x 28 x 28 bytes
    assert large[0].images.untyped_storage().nbytes() == 720 * 28 * 28


def test_the_enlarged_one_is_read_by_the_loaders(mnist_root: Path) -> None:
    _, large = both(mnist_root, 0, image_size=30)
    splits = training_splits(large, split_environments(large, [2], 0.2), [2])
    loader = TrainingLoader(splits, PARTITIONS["environment"], 5, 2)
    minibatches = next(iter(loader))
    for e, minibatch in enumerate(minibatches):
        for x, y, c, i in zip(*minibatch, minibatch.c, minibatch.i, strict=True):
            assert torch.allclose(x, large[e][int(i)][0], atol=1e-6)
            assert (int(y), int(c)) == (large[e].y[i], large[e].c[i])
    (x, y), *_ = evaluation_batches(large[2], np.arange(3, 9))
    assert torch.allclose(x[2], large[2][5][0], atol=1e-6)
    assert y.tolist() == large[2].y[3:9].tolist()


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

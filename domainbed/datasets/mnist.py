"""ColoredMNIST (at 28 px, and enlarged) and RotatedMNIST, with colour and angle as confounders."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from domainbed.datasets.base import InMemoryEnvironment, Integers, MultipleDomainDataset, image_size, register
from domainbed.input_pipelines import normalise

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load_mnist(root: str | None) -> tuple[Tensor, Tensor]:
    """The 70,000 digits, training files first, downloaded to ``root/MNIST/raw`` where they are missing.

    Returns:
        Images (N, 28, 28) uint8 and labels (N,) int64.

    Raises:
        ValueError: no root, or a damaged file.
        FileNotFoundError: files are missing and can't be downloaded.
    """
    if root is None:
        raise ValueError("MNIST needs --data_dir: the directory that holds (or shall hold) MNIST/raw")
    from torchvision.datasets import MNIST  # seconds to import

    raw = Path(root, "MNIST", "raw")
    try:
        parts = [MNIST(root, train=train, download=True) for train in (True, False)]
        images, digits = torch.cat([part.data for part in parts]), torch.cat([part.targets for part in parts])
        if images.shape != (len(digits), 28, 28):
            raise ValueError(f"{tuple(images.shape)} images, {len(digits)} labels")
    except (RuntimeError, ValueError, AssertionError, EOFError, IndexError, OSError) as error:
        missing = [name for name in FILES if not (raw / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{raw} lacks {', '.join(missing)}, and downloading failed; put them there"
            ) from error
        raise ValueError(f"a file in {raw} is damaged ({error}); replace it: {', '.join(FILES)}") from error
    return images, digits


class MultipleEnvironmentMNIST(MultipleDomainDataset):
    """Deals the shuffled digits out in turn to environments and transforms each.

    Args:
        root: directory above ``MNIST/raw``.
        environments: one value per environment.
        dataset_transform: ``(images (N, 28, 28) uint8, digits (N,), value) -> environment``.
        input_shape: (C, H, W) after the transform.
        num_classes: K after the transform.
    """

    NEEDS_DATA_DIR = True

    def __init__(
        self,
        root: str | None,
        environments: Sequence[Any],
        dataset_transform: Callable[[Tensor, Tensor, Any], Dataset[Any]],
        input_shape: tuple[int, ...],
        num_classes: int,
    ):
        images, digits = load_mnist(root)
        shuffle = torch.randperm(len(images))
        images, digits = images[shuffle], digits[shuffle]
        stride = len(environments)
        self.datasets = [
            dataset_transform(images[i::stride], digits[i::stride], value) for i, value in enumerate(environments)
        ]
        self.input_shape, self.num_classes = input_shape, num_classes


@register
class ColoredMNIST(MultipleEnvironmentMNIST):
    """Is the digit below five? A quarter of the labels is flipped, and colour agrees with the label more often.

    Environments: colour agrees with the (noisy) label in 90, 80 and 10 % of the images; the channel with the number
    of the colour carries the digit, the other is zero. Confounder: the colour, channel 0 or 1.

    Source: Arjovsky, Bottou, Gulrajani and Lopez-Paz 2019, "Invariant Risk Minimization",
    https://arxiv.org/abs/1907.02893, in DomainBed's form (28 px, three environments of 23,333 images).
    Licence: CC BY-SA 3.0.
    Layout: ``MNIST/raw/*-ubyte``.
    """

    ENVIRONMENTS = ("+90%", "+80%", "-90%")
    INPUT_SHAPE = (2, 28, 28)
    CLASSES = ("mostly 5 to 9", "mostly 0 to 4")  # a quarter of the labels is flipped
    CONFOUNDERS = ("channel 0", "channel 1")
    HPARAMS_SIZE = "small"
    PUBLISHED_COUNTS = {"+90%": 23334, "+80%": 23333, "-90%": 23333}

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, [0.1, 0.2, 0.9], self.color_dataset, (2, 28, 28), 2)

    def color_dataset(self, images: Tensor, labels: Tensor, environment: float) -> Dataset[Any]:
        """Labels, colours and the two-channel images of one environment."""
        y, color = self.draw(labels, environment)
        x = torch.zeros(len(images), 2, 28, 28)
        x[torch.arange(len(images)), color] = images.float() / 255
        return InMemoryEnvironment(x, y, color)

    def draw(self, labels: Tensor, environment: float) -> tuple[Tensor, Tensor]:
        """Noisy labels and colours (N,) of digits (N,); two draws, in this order."""
        flipped = self.torch_bernoulli_(0.25, len(labels))
        y = self.torch_xor_((labels < 5).float(), flipped)
        color = self.torch_xor_(y, self.torch_bernoulli_(environment, len(y)))
        return y.long(), color.long()

    def torch_bernoulli_(self, p: float, size: int) -> Tensor:
        """(size,) ones with probability p, as float."""
        return (torch.rand(size) < p).float()

    def torch_xor_(self, a: Tensor, b: Tensor) -> Tensor:
        """Exclusive or of zeros and ones, as float."""
        return (a != b).float()


class EnlargedDigits(Dataset[tuple[Tensor, int]]):
    """Digits kept as bytes, 28 px and two colours, and enlarged where the algorithm is, a batch at a time.

    Args:
        images: (N, 28, 28) uint8.
        y, c: (N,) int64 labels and colours, both 0 or 1.
        size: pixels of a side of the enlarged images.
    """

    def __init__(self, images: Tensor, y: Tensor, c: Tensor, size: int):
        self.images, self.size = images, size
        self.y: Integers = y.numpy()
        self.c: Integers = c.numpy()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        return self.finish(default_collate([self.read(key)]))[0], int(self.y[key])

    def read(self, key: int, rng: np.random.Generator | None = None) -> Tensor:
        """The red and the green channel (2, 28, 28) uint8; nothing is augmented."""
        x = torch.zeros(2, 28, 28, dtype=torch.uint8)
        x[self.c[key]] = self.images[key]
        return x

    def finish(self, batch: Tensor) -> Tensor:
        """Channels (B, 2, 28, 28) uint8 -> (B, 3, size, size) float32: bilinear, blue empty, normalised by ImageNet."""
        red_green = F.interpolate(batch.float(), size=(self.size, self.size), mode="bilinear")
        return normalise(F.pad(red_green, (0, 0, 0, 0, 0, 1)))


@register
class ColoredMNIST224(ColoredMNIST):
    """ColoredMNIST in three channels at 224 px, for networks that were trained on ImageNet.

    Labels and colours are those that ColoredMNIST draws from the same seed. Channel 0 is red, channel 1 green, and
    blue is empty; enlarged bilinearly, normalised by ImageNet's means and deviations.

    Source: Arjovsky et al. 2019, https://arxiv.org/abs/1907.02893; the eX2L paper's times a step show that it ran
    this size, but it doesn't say how the images were enlarged and normalised: that is our reading.
    Licence: CC BY-SA 3.0.
    Layout: ``MNIST/raw/*-ubyte``.
    Differs from the other image sets: no augmentation.
    """

    HPARAMS_SIZE = "large"
    INPUT_SHAPE = (3, 224, 224)
    TEST_ENVS = (2,)
    N_WORKERS = 0

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        self.size = image_size(hparams)
        super().__init__(root, test_envs, dict(hparams))
        self.input_shape = (3, self.size, self.size)

    def color_dataset(self, images: Tensor, labels: Tensor, environment: float) -> EnlargedDigits:
        """The environment; the same draws as ColoredMNIST's."""
        return EnlargedDigits(images, *self.draw(labels, environment), self.size)


@register
class RotatedMNIST(MultipleEnvironmentMNIST):
    """Ten digits, each environment turned by another angle. Confounder: the angle.

    Source: Ghifary, Kleijn, Zhang and Balduzzi 2015, "Domain Generalization for Object Recognition with Multi-task
    Autoencoders", https://arxiv.org/abs/1508.07680, in DomainBed's form.
    Licence: CC BY-SA 3.0.
    Layout: ``MNIST/raw/*-ubyte``.
    """

    ENVIRONMENTS = ("0", "15", "30", "45", "60", "75")
    NUM_CLASSES = 10
    INPUT_SHAPE = (1, 28, 28)
    HPARAMS_SIZE = "small"
    CONFOUNDERS = ("0 degrees", "15 degrees", "30 degrees", "45 degrees", "60 degrees", "75 degrees")
    PUBLISHED_COUNTS = {"0": 11667, "15": 11667, "30": 11667, "45": 11667, "60": 11666, "75": 11666}

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, [0, 15, 30, 45, 60, 75], self.rotate_dataset, (1, 28, 28), 10)

    def rotate_dataset(self, images: Tensor, labels: Tensor, angle: int) -> TensorDataset:
        """Every image turned counter-clockwise by angle (degrees), bilinear, corners black."""
        turned = [np.asarray(Image.fromarray(i).rotate(angle, Image.Resampling.BILINEAR)) for i in images.numpy()]
        x = torch.from_numpy(np.stack(turned)).unsqueeze(1).float() / 255
        return InMemoryEnvironment(x, labels, torch.full((len(labels),), angle // 15))

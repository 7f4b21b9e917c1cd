"""Small sets made of real data that ships inside scikit-learn and scikit-image: nothing to download.

The digits are the 1,797 scans of the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak
1998, CC BY 4.0) as ``sklearn.datasets.load_digits`` has them, 8 x 8 pixels of 17 grey levels. The backgrounds are
crops of four photographs: ``brick``, ``grass`` and ``gravel`` of scikit-image (CC0), ``china.jpg`` of scikit-learn
(CC BY 2.0).

Every set is a function of its data seed alone (``hparams["data_seed"]``, 0 by default), and a scan belongs to one
environment and one split unit, so no scan is seen in two splits. An image's mask is the ink of its digit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from domainbed.datasets.base import InMemoryEnvironment, Integers, MultipleDomainDataset, register

SIZE = 36  # px, of a composed image
Floats = NDArray[np.float32]


def load_scans() -> tuple[Floats, Integers]:
    """The scans (1797, 8, 8) with ink in [0, 1], and their digits (1797,)."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def load_photograph(name: str, deviation: float) -> Floats:
    """A photograph in grey, brought to mean .3 and the given standard deviation and clipped to [0, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg").mean(axis=2) if name == "city" else getattr(data, name)()
    return np.clip((photograph - photograph.mean()) / photograph.std() * deviation + 0.3, 0, 1).astype(np.float32)


def enlarge(scans: Floats, size: int) -> Floats:
    """Scans (N, 8, 8) at size x size pixels, bilinear, ink in [0, 1]."""
    return F.interpolate(torch.from_numpy(scans)[:, None], size=(size, size), mode="bilinear")[:, 0].numpy()


def place(ink: Floats, side: int, rng: np.random.Generator) -> Floats:
    """Each ink (N, s, s) at a random place of an empty image (N, side, side)."""
    n, size = ink.shape[:2]
    top, left = rng.integers(0, side - size + 1, (2, n))
    rows, columns = top[:, None, None] + np.arange(size)[:, None], left[:, None, None] + np.arange(size)
    placed = np.zeros((n, side, side), np.float32)
    placed[np.arange(n)[:, None, None], rows, columns] = ink
    return placed


def crops(photographs: Sequence[Floats], kinds: Integers, rng: np.random.Generator) -> Floats:
    """One random SIZE x SIZE crop (N, SIZE, SIZE) of photograph kinds[i] for each i."""
    canvas = np.empty((len(kinds), SIZE, SIZE), np.float32)
    for kind, photograph in enumerate(photographs):
        chosen = np.flatnonzero(kinds == kind)
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIZE, SIZE))
        top, left = rng.integers(0, windows.shape[0], len(chosen)), rng.integers(0, windows.shape[1], len(chosen))
        canvas[chosen] = windows[top, left]
    return canvas


def to_bytes(images: Floats) -> Tensor:
    """Images in [0, 1] as uint8."""
    return torch.from_numpy(np.round(images * 255).astype(np.uint8))


class Digits(MultipleDomainDataset):
    """What the embedded sets share: no files, DomainBed's small-image defaults, our small backbone."""

    HPARAMS_SIZE = "small"
    HPARAMS = {"backbone": "small_cnn", "data_seed": 0}
    HAS_MASKS = True  # the digit's ink

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        self.rng = np.random.default_rng(hparams.get("data_seed", 0))
        self.scans, self.digits = load_scans()

    def deal(self, digits: Sequence[int], shares: Sequence[float]) -> list[Integers]:
        """Deals the scans of some digits out to environments, in random order.

        Args:
            digits: the digits whose scans are dealt.
            shares: fraction of the scans that each environment gets.

        Returns:
            Per environment, positions of scans (len(digits), n) with one row per digit; n is the same for all digits.
        """
        shuffled = [self.rng.permutation(np.flatnonzero(self.digits == d)) for d in digits]
        n = min(map(len, shuffled))
        ends = np.round(np.cumsum(shares) * n).astype(int)
        return list(np.split(np.stack([s[:n] for s in shuffled]), ends[:-1], axis=1))[: len(shares)]


@register
class ColoredDigits(Digits):
    """ColoredMNIST's protocol on the scans: is the digit below five? A quarter of the labels is flipped.

    Colour agrees with the noisy label in 90, 80 and 10 % of the images of the three environments. Images are
    (2, 28, 28): the channel with the number of the colour carries the digit, drawn with 20 px at a random place,
    the other is zero. Five images are made of each scan. Confounder: the colour, channel 0 or 1.

    Source: the protocol of Arjovsky et al. 2019, https://arxiv.org/abs/1907.02893; the scans of Alpaydin and
    Kaynak 1998.
    Licence: CC BY 4.0.
    Layout: inside scikit-learn.
    """

    ENVIRONMENTS = ("+90%", "+80%", "-90%")
    INPUT_SHAPE = (2, 28, 28)
    TEST_ENVS = (2,)
    CLASSES = ("mostly 5 to 9", "mostly 0 to 4")  # a quarter of the labels is flipped
    CONFOUNDERS = ("channel 0", "channel 1")
    COPIES = 5  # images of one scan

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, test_envs, hparams)
        self.input_shape, self.num_classes = (2, 28, 28), 2
        dealt = np.array_split(self.rng.permutation(len(self.scans)), 3)
        self.datasets = [self.environment(scans, p) for scans, p in zip(dealt, (0.1, 0.2, 0.9), strict=True)]

    def environment(self, scans: Integers, disagreement: float) -> InMemoryEnvironment:
        """Images of the given scans whose colour differs from the label with the given probability."""
        units = np.repeat(scans, self.COPIES)
        n = len(units)
        y = (self.digits[units] < 5) ^ (self.rng.random(n) < 0.25)
        color = (y ^ (self.rng.random(n) < disagreement)).astype(np.int64)
        ink = to_bytes(place(enlarge(self.scans[units], 20), 28, self.rng))
        images = torch.zeros((n, 2, 28, 28), dtype=torch.uint8)
        images[torch.arange(n), torch.from_numpy(color)] = ink
        return InMemoryEnvironment(images, *map(torch.as_tensor, (y.astype(np.int64), color, units, ink)))


class DigitsOnPhotographs(Digits):
    """Digits pasted at random places of crops of photographs; the kind of photograph is the confounder."""

    DIGIT_SIZES = (22, 26)  # px, both ends included
    DEVIATION = 0.11  # standard deviation of a background's grey levels, in [0, 1]

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, test_envs, hparams)
        self.photographs = [load_photograph(name, self.DEVIATION) for name in self.CONFOUNDERS]

    def compose(self, scans: Integers, counts: Integers) -> InMemoryEnvironment:
        """An environment of counts[y, c] images, made evenly from the scans (K, n).

        Unit u holds the u-th scan of every class, so that every split has the classes in equal parts.
        """
        n_units = scans.shape[1]
        cells = [(y, c, i % n_units) for (y, c), count in np.ndenumerate(counts) for i in range(count)]
        y, c, units = np.array(cells).T
        canvas = crops(self.photographs, c, self.rng)
        sizes = self.rng.integers(self.DIGIT_SIZES[0], self.DIGIT_SIZES[1] + 1, len(y))
        ink = np.empty_like(canvas)
        for size in np.unique(sizes):
            chosen = sizes == size
            ink[chosen] = place(enlarge(self.scans[scans[y, units]][chosen], size), SIZE, self.rng)
        images = to_bytes(canvas + (1 - canvas) * ink)[:, None].repeat(1, 3, 1, 1)
        return InMemoryEnvironment(images, *map(torch.as_tensor, (y, c, units, to_bytes(ink))))


class SpawriousDigits(DigitsOnPhotographs):
    """The digits 0, 1, 4 and 6, a third of their scans in each of Spawrious' three environments.

    Class attributes:
        DESIGNS: per environment a table (K, V): how many images of each scan of class y lie on background c.
    """

    ENVIRONMENTS = ("Test", "SC_group_1", "SC_group_2")
    INPUT_SHAPE = (3, 36, 36)
    TEST_ENVS = (0,)
    CLASSES = ("0", "1", "4", "6")
    CONFOUNDERS = ("brick", "grass", "gravel", "city")
    DIGITS = (0, 1, 4, 6)
    DESIGNS: Sequence[Sequence[Sequence[int]]]

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, test_envs, hparams)
        self.input_shape, self.num_classes = (3, SIZE, SIZE), len(self.DIGITS)
        dealt = self.deal(self.DIGITS, [1 / 3] * 3)
        counts = [scans.shape[1] * np.array(design) for scans, design in zip(dealt, self.DESIGNS, strict=True)]
        self.datasets = [self.compose(*pair) for pair in zip(dealt, counts, strict=True)]


@register
class DigitsO2O(SpawriousDigits):
    """One digit, one background: class y lies on background y in 97 and 87 % of the images, else on its neighbour's.

    In the test environment class y lies on background y + 2 (mod 4) only, where training never shows it.
    Of each scan 32 images are made for training, 8 for testing.

    Source: the one-to-one design of Spawrious, Lynch, Dovonon, Kaddour and Silva 2023,
    https://arxiv.org/abs/2303.05470.
    Licence: scans CC BY 4.0, photographs CC0 and CC BY 2.0.
    Layout: inside scikit-learn and scikit-image.
    """

    DESIGNS = (
        ((0, 0, 8, 0), (0, 0, 0, 8), (8, 0, 0, 0), (0, 8, 0, 0)),
        ((31, 1, 0, 0), (0, 31, 1, 0), (0, 0, 31, 1), (1, 0, 0, 31)),
        ((28, 4, 0, 0), (0, 28, 4, 0), (0, 0, 28, 4), (4, 0, 0, 28)),
    )


@register
class DigitsM2M(SpawriousDigits):
    """Two digits, two backgrounds: each pair of classes has a pair of backgrounds, and the test swaps the pairs.

    Classes 0 and 1 are trained on backgrounds 0 and 1 (one each in the first training environment, the other one in
    the second), classes 2 and 3 on backgrounds 2 and 3; tested on the other pair, groups that training never shows.
    Of each scan 7 images are made for training, 4 on each background for testing.

    Source: the many-to-many design of Spawrious, Lynch, Dovonon, Kaddour and Silva 2023,
    https://arxiv.org/abs/2303.05470.
    Licence: scans CC BY 4.0, photographs CC0 and CC BY 2.0.
    Layout: inside scikit-learn and scikit-image.
    """

    DESIGNS = (
        ((0, 0, 4, 4), (0, 0, 4, 4), (4, 4, 0, 0), (4, 4, 0, 0)),
        ((7, 0, 0, 0), (0, 7, 0, 0), (0, 0, 7, 0), (0, 0, 0, 7)),
        ((0, 7, 0, 0), (7, 0, 0, 0), (0, 0, 0, 7), (0, 0, 7, 0)),
    )


@register
class DigitsSubpop(DigitsOnPhotographs):
    """A subpopulation shift like Waterbirds': the digits 3 and 8 on brick and gravel, 73 / 4 / 1 / 22 % in training.

    Two training environments hold the same P(label | background) and differ in the share of brick, 85 and 63 %.
    Validation and test are official and balanced: all four groups are equally large there.

    Source: the group shares of Waterbirds, Sagawa, Koh, Hashimoto and Liang 2020, https://arxiv.org/abs/1911.08731.
    Licence: scans CC BY 4.0, photographs CC0.
    Layout: inside scikit-learn and scikit-image.
    """

    ENVIRONMENTS = ("train, 85% brick", "train, 63% brick", "validation", "test")
    INPUT_SHAPE = (3, 36, 36)
    VALIDATION_ENVS = (2,)
    TEST_ENVS = (3,)
    CLASSES = ("3", "8")
    CONFOUNDERS = ("brick", "gravel")
    DIGITS = (3, 8)
    COUNTS = (  # images by environment, label and background
        ((1258, 35), (17, 190)),
        ((932, 85), (13, 470)),
        ((100, 100), (100, 100)),
        ((300, 300), (300, 300)),
    )

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        super().__init__(root, test_envs, hparams)
        self.input_shape, self.num_classes = (3, SIZE, SIZE), 2
        dealt = self.deal(self.DIGITS, [0.3, 0.3, 0.2, 0.2])
        self.datasets = [
            self.compose(scans, np.array(counts)) for scans, counts in zip(dealt, self.COUNTS, strict=True)
        ]

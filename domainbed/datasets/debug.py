"""Random images, to try code on."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from domainbed.datasets.base import InMemoryEnvironment, MultipleDomainDataset, register


class Debug(MultipleDomainDataset):
    """Sixteen images of normal noise in each of three environments, two classes, two confounder values.

    Source: none; the images are drawn from torch's global generator, the confounder alternates.
    """

    ENVIRONMENTS = ("0", "1", "2")
    NUM_CLASSES = 2
    CONFOUNDERS = ("even", "odd")
    INPUT_SHAPE: ClassVar[tuple[int, ...]]

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        self.input_shape, self.num_classes, n = self.INPUT_SHAPE, 2, 16
        self.datasets = [
            InMemoryEnvironment(torch.randn(n, *self.INPUT_SHAPE), torch.randint(0, 2, (n,)), torch.arange(n) % 2)
            for _ in self.ENVIRONMENTS
        ]


@register
class Debug28(Debug):
    """Debug images of 28 px.

    Source: none, random. Licence: none needed. Layout: no files.
    """

    INPUT_SHAPE = (3, 28, 28)
    HPARAMS_SIZE = "small"


@register
class Debug224(Debug):
    """Debug images of 224 px.

    Source: none, random. Licence: none needed. Layout: no files.
    """

    INPUT_SHAPE = (3, 224, 224)

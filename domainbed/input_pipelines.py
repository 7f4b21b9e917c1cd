"""Ways from an image file to the network's input; they differ in speed, and in pixels by how they resample and round.

``docs/input_pipelines.md`` says by how much, and when to take which.
"""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from domainbed import augmentation
from domainbed.augmentation import Augmentation
from domainbed.image_cache import ImageCache, open_cache, squash
from domainbed.images import Images
from domainbed.registry import Registry

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue in [0, 1]

DEFAULT = "pil"
REGISTRY: Registry[Any] = Registry("input pipeline", (DEFAULT, "cv2", "device"))
register = REGISTRY.register


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) in levels 0 to 255 as float32 of ImageNet's mean 0 and deviation 1."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


class Pipeline:
    """How the images of a pool are read, augmented and normalised.

    Args:
        images: the pool.
    """

    def __init__(self, images: Images):
        self.images = images

    def prepare(self) -> None:
        """What is done once, before loader processes start."""

    def read(self, position: int, rng: np.random.Generator | None) -> Any:
        """One image in a compact form that collates.

        Args:
            position: in the pool.
            rng: draws the image's augmentation; None: it is not augmented.
        """
        raise NotImplementedError

    def finish(self, batch: Any) -> Tensor:
        """The network's input (B, 3, S, S) float32 of a collated batch, on the batch's device."""
        return normalise(batch)

    def read_mask(self, masks: Images, position: int, rng: np.random.Generator | None) -> Tensor:
        """The mask (S, S) uint8 of what ``read`` gives for the position and a generator in the same state.

        Args:
            masks: a pool aligned with the images.
        """
        mask, size, whole = masks.open(position).convert("L"), self.images.size, self.images.crop == "original"
        if rng is None or not whole:
            mask = squash(mask, size)
        if rng is not None:
            height, width = self.original_size(position) if whole else (size, size)
            mask = augmentation.cut_pil(mask, self.draw(rng, height, width), size)
        return torch.from_numpy(np.array(mask))

    def original_size(self, position: int) -> tuple[int, int]:
        """Height and width of the file's image."""
        with Image.open(self.images.root / self.images.paths[position]) as image:  # reads no pixels
            return image.height, image.width

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Augmentation:
        """The augmentation of an image whose file has height x width pixels."""
        if self.images.crop != "original":
            height = width = self.images.size
        return augmentation.draw(rng, height, width, crop=self.images.crop != "none")


# The classes bear the names that users write.


@register
class pil(Pipeline):
    """The reference: the file is decoded and augmented by PIL each time, as torchvision's transforms do."""

    def read(self, position: int, rng: np.random.Generator | None) -> Tensor:
        """(3, S, S) uint8."""
        image, size = self.images.open(position), self.images.size
        height, width = image.height, image.width
        if rng is None or self.images.crop != "original":
            image = squash(image, size)
        if rng is not None:
            image = augmentation.apply_pil(image, self.draw(rng, height, width), size)
        return _planes(np.asarray(image))


class Cached(Pipeline):
    """Reads images that were decoded once for all jobs."""

    @functools.cached_property
    def cache(self) -> ImageCache:
        return open_cache(self.images)

    def prepare(self) -> None:
        """Decodes the pool's images, unless some job has done so."""
        assert len(self.cache) == len(self.images)

    def original_size(self, position: int) -> tuple[int, int]:
        """Height and width of the file's image."""
        height, width = self.cache.original[position].tolist()
        return height, width


@register
class cv2(Cached):
    """Decoded images, augmented one by one by OpenCV in 8 bits."""

    def __init__(self, images: Images):
        augmentation.opencv()
        super().__init__(images)

    def read(self, position: int, rng: np.random.Generator | None) -> Tensor:
        """(3, S, S) uint8."""
        pixels = self.cache.pixels[position]
        if rng is None:
            return _planes(pixels)
        change = self.draw(rng, *self.original_size(position))
        return torch.from_numpy(augmentation.apply_opencv(pixels, change))


@register
class device(Cached):
    """Decoded images, augmented batch by batch on the device of the network."""

    def read(self, position: int, rng: np.random.Generator | None) -> Tensor | tuple[Tensor, Tensor]:
        """(3, S, S) uint8; and, to be augmented, the drawn numbers (11,) float32."""
        pixels = _planes(self.cache.pixels[position])
        if rng is None:
            return pixels
        return pixels, torch.tensor(self.draw(rng, *self.original_size(position)), dtype=torch.float32)

    def finish(self, batch: Any) -> Tensor:
        """The network's input; the numbers in the batch say how each image is augmented."""
        return normalise(batch if isinstance(batch, Tensor) else augmentation.apply_batch(*batch))


def _planes(pixels: NDArray[np.uint8]) -> Tensor:
    """(3, S, S) of (S, S, 3); a copy."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

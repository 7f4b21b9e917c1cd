"""Images seen through masks: a fill in place of what is taken away; masks at the size of heatmaps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FILLS = ("blur", "mean", "zero")
BLUR_SIZE = 11 / 224  # of the image's side, as the kernel of 11 pixels at 224
BLUR_SIGMA = 5 / 11  # of the kernel's size


def fill(x: Tensor, how: str, mean: Tensor) -> Tensor:
    """The image that stands where nothing of the original shall be seen.

    Args:
        x: images (B, C, H, W), as the network takes them.
        how: "blur": the image without its details, by a Gaussian of 11 pixels and a standard deviation of 5 at 224
            pixels, in proportion at other sizes, never below 5 pixels; "mean": the mean colour; "zero": what the
            network takes for 0.
        mean: (C,), the mean colour of the dataset's images.

    Returns:
        (B, C, H, W), or what broadcasts to it.

    Raises:
        ValueError: no such fill.

    Source: size and deviation of the blur as for DRE's insertion curves, Li et al. 2023,
    https://arxiv.org/abs/2303.16390.
    Differs: the image goes on mirrored beyond its border, not black.
    """
    if how == "zero":
        return torch.zeros_like(x[:1])
    if how == "mean":
        return mean.to(x)[None, :, None, None]
    if how == "blur":
        return _blur(x)
    raise ValueError(f"unknown fill of masked pixels: {how!r}; take one of {', '.join(FILLS)}")


def _blur(x: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    size = max(5, 2 * round(BLUR_SIZE * min(x.shape[2:]) / 2 - 0.5) + 1)
    return gaussian_blur(x, [size, size], [BLUR_SIGMA * size, BLUR_SIGMA * size])


def keep(x: Tensor, mask: Tensor, filled: Tensor) -> Tensor:
    """``x * mask + filled * (1 - mask)``: images (B, C, H, W) seen through masks (B, H, W) in [0, 1]."""
    mask = mask[:, None]
    return x * mask + filled * (1 - mask)


def at_size(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B, H, W) at the size (h, w) of heatmaps, by the average over each pixel's area; still in [0, 1]."""
    with torch.autocast(mask.device.type, enabled=False):
        return F.interpolate(mask.float()[:, None], size=tuple(size), mode="area")[:, 0].clamp(0, 1)

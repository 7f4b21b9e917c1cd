"""Maskers: images or their feature maps -> one soft mask each; what a classifier looks at, learned from it."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 64)  # channels of the levels, each of half the size of the one before


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    # GroupNorm: a masker has no batch statistics that masked or mixed images could spoil.
    norm = nn.GroupNorm(4, outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), norm, nn.ReLU())


def _last(inputs: int, start: float) -> nn.Conv2d:
    """A 1 x 1 convolution, a sigmoid of which begins near ``start`` everywhere."""
    last = nn.Conv2d(inputs, 1, 1)
    nn.init.normal_(last.weight, std=0.01)
    with torch.no_grad():
        last.bias.copy_(torch.tensor(start).logit())  # type: ignore[union-attr]
    return last


class ConvMasker(nn.Module):
    """Images (B, C, H, W) -> masks (B, H, W) in [0, 1], by an encoder and a decoder with skip connections.

    Four levels of one 3 x 3 convolution of stride 2 each down, and one each up again after bilinear enlargement; about
    170,000 weights, and about as much work on 36 pixels as three forward passes of ``networks.SmallCNN``.

    Args:
        input_shape: (C, H, W).
        start: about what masks are before training, in (0, 1).
    """

    def __init__(self, input_shape: Sequence[int], start: float = 0.5):
        super().__init__()
        widths = (input_shape[0], *WIDTHS)
        self.down = nn.ModuleList(_block(a, b, 2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(
            _block(below + skip, skip, 1) for below, skip in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True)
        )
        self.last = nn.Sequential(_block(WIDTHS[0] + input_shape[0], WIDTHS[0], 1), _last(WIDTHS[0], start))

    def forward(self, x: Tensor) -> Tensor:
        levels = [x]
        for block in self.down:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in (*self.up, self.last):
            skip = levels.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="bilinear"), skip], dim=1))
        return x[:, 0].float().sigmoid()


class MapMasker(nn.Module):
    """Feature maps (B, C, h, w) -> masks (B, h, w) in [0, 1], by two 1 x 1 convolutions; ``start`` as above."""

    def __init__(self, channels: int, start: float = 0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.ReLU(), _last(64, start))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)[:, 0].float().sigmoid()


def total_variation(masks: Tensor) -> Tensor:
    """How much neighbouring pixels differ: mean |vertical step| + mean |horizontal step| of masks (B, H, W)."""
    return masks.diff(dim=1).abs().mean() + masks.diff(dim=2).abs().mean()

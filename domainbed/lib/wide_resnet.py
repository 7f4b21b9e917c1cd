"""Wide residual network for 32 x 32 images, with DomainBed's names, so that its weights load."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution with bias that keeps the size, or divides it by the stride."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=1)


class _WideBlock(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU, added to the input; the second one strides."""

    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = _conv3x3(in_planes, planes)
        self.dropout = nn.Dropout(dropout_rate)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(residual))) + self.shortcut(x)


class Wide_ResNet(nn.Module):
    """DomainBed's WRN-depth-widen_factor without its last linear layer: (B, C, H, W) -> (B, 64 * widen_factor).

    Names, shapes, order of creation and momenta are DomainBed's, so that its ``model.pkl`` loads and equal seeds give
    equal weights.

    Source: Zagoruyko & Komodakis 2016, Wide Residual Networks, https://arxiv.org/abs/1605.07146, table 1.
    Differs: as DomainBed from the source: convolutions have biases, a block strides in its second convolution, its
        shortcut takes the input before BatchNorm and ReLU, the last BatchNorm has a momentum of .9, and weights start
        from torch's defaults, not He's. From DomainBed: pooled over the whole map, whatever its size; DomainBed takes
        its first 8 x 8 values, which is the same for 32 x 32 images.

    Args:
        input_shape: (C, H, W) of one image.
        depth: number of convolutions, 6 n + 4 with n blocks in each of three stages.
        widen_factor: multiple of the 16, 32 and 64 channels of the stages.
        dropout_rate: dropped between the two convolutions of a block.

    Raises:
        ValueError: depth is not 6 n + 4 with n >= 1.
    """

    def __init__(self, input_shape: Sequence[int], depth: int, widen_factor: int, dropout_rate: float):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth is {depth}; a wide ResNet has 6 n + 4 layers: 10, 16, 22, 28, ...")
        widths = [16, *(width * widen_factor for width in (16, 32, 64))]
        self.conv1 = _conv3x3(input_shape[0], widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, dropout_rate, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, dropout_rate, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, dropout_rate, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=0.9)
        self.relu = nn.ReLU()
        self.n_outputs = widths[3]
        self.activation: nn.Module = nn.Identity()

    @property
    def map_layer(self) -> nn.Module:
        """The last ReLU: its output (B, n_outputs, H/4, W/4) is what is pooled."""
        return self.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.activation(self.relu(self.bn1(x)).mean((2, 3)))


def _stage(in_planes: int, planes: int, blocks: int, dropout_rate: float, stride: int) -> nn.Sequential:
    """Blocks in a row; the first one widens and strides."""
    first = _WideBlock(in_planes, planes, dropout_rate, stride)
    return nn.Sequential(first, *(_WideBlock(planes, planes, dropout_rate) for _ in range(blocks - 1)))

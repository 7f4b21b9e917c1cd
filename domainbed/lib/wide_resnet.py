"""Wide residual network for 32 x 32 images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class _WideBlock(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU, added to the input; the first one strides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout_rate: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout_rate)
        self.conv2 = _conv3x3(out_channels, out_channels)
        same_shape = in_channels == out_channels and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        residual = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class Wide_ResNet(nn.Module):
    """WRN-depth-widen_factor without its last linear layer: (B, C, H, W) -> (B, 64 * widen_factor).

    Source: Zagoruyko & Komodakis 2016, Wide Residual Networks, https://arxiv.org/abs/1605.07146, table 1.
    Differs: pooled over the whole map, whatever its size. DomainBed's network of this name has biases in its
        convolutions and other strides, so its weights don't load here.

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
        blocks_per_stage, remainder = divmod(depth - 4, 6)
        if remainder or blocks_per_stage < 1:
            raise ValueError(f"depth is {depth}; a wide ResNet has 6 n + 4 layers: 10, 16, 22, 28, ...")
        layers: list[nn.Module] = [_conv3x3(input_shape[0], 16)]
        width = 16
        for stage, stage_width in enumerate(w * widen_factor for w in (16, 32, 64)):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_WideBlock(width, stage_width, stride, dropout_rate))
                width = stage_width
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.n_outputs = width
        self.activation: nn.Module = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def map_layer(self) -> nn.Module:
        """The module whose output (B, n_outputs, H/4, W/4) is the last map before pooling."""
        return self.features[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.features(x).mean((2, 3)))

"""What all backbones share: maps on the way to the features, a wrapper, and surgery on first and last layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed.registry import Registry

Identity = nn.Identity

BACKBONES: Registry[Any] = Registry("backbone")  # function of (input_shape, hparams) -> featurizer


class MapTap(nn.Module):
    """A place on the way from the images to the features where they are maps (B, D, h, w).

    Grad-CAM asks how the score changes with the maps, so that they must lie on that way; reshaped copies of tokens
    don't. ``through`` turns a layer's output into maps, calls itself on them, for forward hooks to see, and gives
    back the same values, made from the maps, in the layer's own form.

    Args:
        grid: h and w of the tokens, row by row; None if the layer's output has four dimensions.
        prefix: class and register tokens, which come first and are no part of the maps.
        channels_last: the output is (B, h, w, D).
    """

    def __init__(self, grid: tuple[int, int] | None = None, prefix: int = 0, channels_last: bool = False):
        super().__init__()
        self.grid = grid
        self.prefix = prefix
        self.channels_last = channels_last

    def forward(self, maps: Tensor) -> Tensor:
        return maps

    def through(self, output: Tensor) -> Tensor:
        if self.channels_last:
            return self(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.grid is None:
            return self(output)
        maps = self(output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid))
        return torch.cat([output[:, : self.prefix], maps.flatten(2).transpose(1, 2)], dim=1)

    # A method, not a closure: copies of a network (copy.deepcopy) then have hooks that call their own tap.
    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.through(output)

    def put_behind(self, layer: nn.Module) -> "MapTap":
        """Sends all that the layer gives through the maps."""
        layer.register_forward_hook(self._hook)
        return self


class Backbone(nn.Module):
    """A network without its last layer: images (B, C, H, W) -> features (B, n_outputs).

    Names in its state dict are the network's own below ``network.``.

    Args:
        network: (B, C, H, W) -> (B, n_outputs).
        n_outputs: number of features.
        hparams: kept as an attribute.
        dropout: share of the features dropped.

    Hparams:
        freeze_bn: BatchNorm keeps its statistics; its weights are still trained.
        channels_last: computes with the channels as the innermost dimension; rounds differently.
    """

    n_outputs: int

    def __init__(self, network: nn.Module, n_outputs: int, hparams: Mapping[str, Any], dropout: float):
        super().__init__()
        self.hparams = hparams
        self.network: Any = network
        self.n_outputs = n_outputs
        self.dropout = nn.Dropout(dropout)
        self.activation: nn.Module = Identity()
        self.memory_format = torch.channels_last if hparams.get("channels_last", False) else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.train()

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dropout(self.features(x.contiguous(memory_format=self.memory_format))))

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.hparams.get("freeze_bn", False):
            self.freeze_bn()
        return self

    def freeze_bn(self) -> None:
        """Puts every BatchNorm in evaluation mode."""
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
                module.eval()


def take_channels(network: nn.Module, channels: int) -> None:
    """Lets the first convolution take another number of channels than 3; its planes are the old ones in turn."""
    if channels == 3:
        return
    convolution = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is None or convolution.groups != 1:
        raise ValueError(f"{type(network).__name__} takes 3 channels, not {channels}; repeat channels of the images")
    old = convolution.weight.detach()
    convolution.weight = nn.Parameter(old[:, torch.arange(channels) % old.shape[1]])
    convolution.in_channels = channels


def cut_last_layer(network: nn.Module) -> tuple[str, int]:
    """Replaces the last layer with weights by the identity; returns its name and the number of its inputs."""
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    name, last = layers[-1]
    network.set_submodule(name, Identity())
    return name, last.weight.shape[1]


@contextmanager
def fitting(name: str, input_shape: Sequence[int]) -> Iterator[None]:
    """Says that images of that shape are what a network, as it is built or first run, complains about.

    Raises:
        ValueError: with what the library says.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} takes no images of shape {tuple(input_shape)}: {error}; give another image_size or backbone"
        ) from error


def answer(network: nn.Module, run: Callable[[Tensor], Any], input_shape: Sequence[int]) -> Any:
    """What the network makes of one black image, in evaluation mode."""
    network.eval()
    weight = next(network.parameters())
    with torch.no_grad():
        return run(torch.zeros(1, *input_shape, device=weight.device))

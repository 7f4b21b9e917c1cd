"""torchvision's classification models, and DomainBed's ResNets, whose default weights are timm's."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from domainbed.backbones import weights
from domainbed.backbones.base import BACKBONES, Backbone, MapTap, answer, cut_last_layer, fitting, take_channels
from domainbed.backbones.weights import Choice
from domainbed.messages import not_found

logger = logging.getLogger(__name__)


def _torchvision_weights(name: str, choice: Choice) -> Any:
    """The entry of torchvision's list of weights, or None for none of them."""
    from torchvision import models

    known = models.get_model_weights(name)
    if not choice.from_hub:
        return None
    if choice.name is None:  # DomainBed takes the older ones, which the name "default" no longer means
        return known["IMAGENET1K_V1"] if name.startswith("resnet") else known.DEFAULT
    if choice.name not in known.__members__:
        choice.refuse_name(f"torchvision's {name}", f"; it has {', '.join(known.__members__)}")
    return known[choice.name]


def _size_option(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """torchvision builds these two families for one size; all others take any that is large enough."""
    if name.startswith("vit_"):
        return {"image_size": size[0]}
    return {"input_size": size} if name.startswith("maxvit") else {}


def _torchvision_network(name: str, hparams: Mapping[str, Any], size: tuple[int, int] = (224, 224)) -> tuple[Any, int]:
    """torchvision's network without its last layer, and the number of its features."""
    from torchvision import models

    choice = Choice.of(hparams)
    entry = _torchvision_weights(name, choice)
    option = _size_option(name, size)
    if entry is None:
        with fitting(f"torchvision's {name}", (3, *size)):
            network = models.get_model(name, weights=None, **option)
    elif option and size != tuple(entry.meta["min_size"]):
        raise ValueError(
            f"torchvision's {name} with these weights takes images of {entry.meta['min_size'][0]} pixels, not "
            f"{size[0]} x {size[1]}; resize them, or take a ViT of timm's, whose positions are interpolated"
        )
    else:
        file = f"{torch.hub.get_dir()}/checkpoints/{entry.url.rpartition('/')[2]}"
        with weights.explained(f"{file}, from {entry.url},"):
            network = models.get_model(name, weights=entry)
    last, width = cut_last_layer(network)
    _drop_auxiliary_heads(network)
    if choice.file is not None:
        weights.load(
            network, weights.read(choice.file), choice.file, [last.partition(".")[0], "AuxLogits", "aux1", "aux2"]
        )
    return network, width


def _drop_auxiliary_heads(network: Any) -> None:
    """With them GoogLeNet and Inception give three outputs in training."""
    if hasattr(network, "aux_logits"):
        network.aux_logits = False
        network.AuxLogits = network.aux1 = network.aux2 = None


def _last(network: nn.Module, name: str) -> Any:
    layer = getattr(network, name)
    return layer[-1] if isinstance(layer, nn.Sequential | nn.ModuleList) else layer


class TorchvisionBackbone(Backbone):
    """A classification model of torchvision without its last layer.

    What stands between the last map and the last layer stays as it is: AlexNet and VGG keep two layers of 4096 units
    with their dropout, ConvNeXt its LayerNorm, EfficientNet its dropout.

    Args:
        input_shape: (C, H, W); with C other than 3 the first layer repeats its three planes in turn.
        hparams: see below.
        name: as in ``torchvision.models.list_models()``.

    Hparams:
        pretrained: False starts from random weights and downloads nothing.
        weights: "IMAGENET1K_V1", "IMAGENET1K_V2" or the like, or a local file; default: V1 for ResNets, as in
            DomainBed, else what torchvision calls the default.
        freeze_bn: BatchNorm keeps its statistics; its weights are still trained.
        resnet_dropout: share of the features dropped.

    Raises:
        NotImplementedError: no such model.
        ValueError: no such weights, a file that does not fit, or a size that the model does not take.
        OSError: the weights can't be loaded.
    """

    # Where the last map before pooling is, by the first of these names that the model has. Swin's `features` give
    # (B, h, w, D), its `permute` what is pooled.
    MAP_LAYERS = (
        "permute", "layer4", "features", "trunk_output", "conv5", "Mixed_7c", "inception5b", "layers", "blocks"
    )  # fmt: skip

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any], name: str):
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            raise NotImplementedError(not_found("torchvision model", name, known))
        channels, height, width = input_shape
        network, n_outputs = _torchvision_network(name, hparams, (height, width))
        take_channels(network, channels)
        if hasattr(network, "transform_input"):  # two models want other means than ImageNet's, and see to it
            network.transform_input = channels == 3
        with fitting(f"torchvision's {name}", input_shape):
            answer(network, network, input_shape)
        super().__init__(network, n_outputs, hparams, hparams.get("resnet_dropout", 0.0))
        if hasattr(network, "encoder"):  # ViT: see docs/backbones.md for the choice of the layer
            grid = (height // network.patch_size, width // network.patch_size)
            self.tap = MapTap(grid, prefix=1).put_behind(network.encoder.layers[-1].ln_1)

    @property
    def map_layer(self) -> nn.Module:
        """The last map before pooling; a ViT's tokens as they enter the attention of its last block."""
        if hasattr(self, "tap"):
            return self.tap
        layer: nn.Module = _last(self.network, next(name for name in self.MAP_LAYERS if hasattr(self.network, name)))
        return layer


class ResNet(Backbone):
    """ResNet-18 or -50 without its last layer: (B, C, H, W) -> (B, 512) or (B, 2048).

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385; weights from torchvision (IMAGENET1K_V1) or, for
        ``resnet50_augmix``, timm's ``resnet50.ram_in1k`` (AugMix, https://arxiv.org/abs/1912.02781).
    Differs: ``resnet18: true`` wins over ``resnet50_augmix``; ``train`` returns the module.

    Args:
        input_shape: (C, H, W); with C other than 3 the first layer repeats its three planes in turn.

    Hparams:
        resnet18: 18 layers, not 50.
        resnet50_augmix: weights trained with AugMix (default); the architecture is the same, so other weights don't
            need timm.
        pretrained: False starts from random weights and downloads nothing.
        weights: "IMAGENET1K_V1", "IMAGENET1K_V2" (ResNet-50 only) or a local file; wins over ``resnet50_augmix``.
        freeze_bn: BatchNorm keeps its statistics; its weights are still trained.
        resnet_dropout: share of the features dropped.

    Raises:
        ImportError: timm is needed and missing.
        ValueError: no such weights, or a file that does not fit.
        OSError: the weights can't be loaded.
    """

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any]):
        network, n_outputs = _resnet(hparams)
        take_channels(network, input_shape[0])
        super().__init__(network, n_outputs, hparams, hparams.get("resnet_dropout", 0.0))

    @property
    def map_layer(self) -> nn.Module:
        """The last residual block: its output (B, n_outputs, H/32, W/32) is what is pooled."""
        layer: nn.Module = self.network.layer4[-1]
        return layer


def _resnet(hparams: Mapping[str, Any]) -> tuple[Any, int]:
    """The residual network that the hparams ask for, and its width; only the weights in use are loaded."""
    small, augmix = hparams.get("resnet18", False), hparams.get("resnet50_augmix", True)
    choice = Choice.of(hparams)
    if small and augmix:
        logger.info("resnet18 is set, so resnet50_augmix is not used (in DomainBed it would win)")
    if augmix and not small and choice.from_hub and choice.name is None:
        network = _timm_resnet50_augmix()
        return network, cut_last_layer(network)[1]
    return _torchvision_network("resnet18" if small else "resnet50", hparams)


def _timm_resnet50_augmix() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "resnet50_augmix (DomainBed's default backbone) needs timm: pip install domainbed-ex2l[timm]; "
            "or choose torchvision's with --hparams '{\"resnet50_augmix\": false}'"
        ) from error
    with weights.explained(
        "model.safetensors of timm/resnet50.ram_in1k, from the Hugging Face hub's cache ($HF_HOME),"
    ):
        return timm.create_model("resnet50.ram_in1k", pretrained=True)


@BACKBONES.register
def resnet18(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return ResNet(input_shape, {**hparams, "resnet18": True, "resnet50_augmix": False})


@BACKBONES.register
def resnet50(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return ResNet(input_shape, {**hparams, "resnet18": False})

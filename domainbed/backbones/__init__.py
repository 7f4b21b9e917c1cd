"""Backbones: networks of torchvision, timm and torch.hub as featurizers, at any size that they take.

Every one has ``n_outputs``, a replaceable module ``activation``, applied last, and mostly ``map_layer``: the module
whose output (B, D, h, w) is the last map that features are made from, for a forward hook. Transformers' tokens are
reshaped to maps on their way, so that a score depends on what the hook sees. ``docs/backbones.md`` is the user's page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from domainbed.backbones.base import BACKBONES, Backbone, MapTap
from domainbed.backbones.dinov2 import DinoV2
from domainbed.backbones.identity import identity
from domainbed.backbones.timm_models import TimmBackbone
from domainbed.backbones.torchvision_models import ResNet, TorchvisionBackbone
from domainbed.messages import not_found

__all__ = ["BACKBONES", "LIBRARIES", "Backbone", "DinoV2", "MapTap", "ResNet", "build"]

LIBRARIES = {"timm": TimmBackbone, "torchvision": TorchvisionBackbone}
_FLAGS = ("resnet18", "dinov2")  # hparams of DomainBed's that also name a network


def build(name: str, input_shape: Sequence[int], hparams: Mapping[str, Any]) -> Any:
    """The featurizer of a name.

    Args:
        name: in ``BACKBONES``, or "timm:NAME" or "torchvision:NAME" for a model of these libraries.
        input_shape: (C, H, W), or (D,) for the identity.
        hparams: read by the featurizer.

    Raises:
        NotImplementedError: no backbone of that name.
        ValueError: the shape is no image's, or a flag in hparams names another network.
    """
    if len(input_shape) != 3 and name != identity.__name__:
        raise ValueError(f"backbone {name} takes images (C, H, W), not shape {tuple(input_shape)}; leave it out")
    for flag in _FLAGS:
        if hparams.get(flag, False) and name != flag:
            raise ValueError(f"{flag} is true, but backbone is {name!r}; drop one of the two hparams")
    library, _, model = name.partition(":")
    if model and library in LIBRARIES:
        return LIBRARIES[library](input_shape, hparams, model)
    if name not in BACKBONES:
        libraries = ", ".join(f"{known}:NAME" for known in LIBRARIES)
        raise NotImplementedError(f"{not_found('backbone', name, BACKBONES)}, {libraries}")
    return BACKBONES[name](input_shape, hparams)

"""Classifiers whose heatmaps can be a part of their loss."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from domainbed import similarities
from domainbed.algorithms.base import HparamsEntry
from domainbed.algorithms.erm import ERM
from domainbed.attribution import METHODS, POLICIES, explain
from domainbed.feature_maps import check_maps, has_linear_head

logger = logging.getLogger(__name__)

MAP_HPARAMS: Mapping[str, HparamsEntry] = {  # of whatever trains by heatmaps
    "map_gradient": ("constant", lambda r: "constant"),
    "map_layer": ("", lambda r: ""),
    "map_relu": (True, lambda r: True),
    "map_method": ("grad_cam", lambda r: "grad_cam"),
}


def check_choices(hparams: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Raises ValueError if an hparam is none of its choices."""
    for name, allowed in choices.items():
        if hparams[name] not in allowed:
            raise ValueError(f"{name} {hparams[name]!r} is unknown; take one of {', '.join(allowed)}")


def check_not_negative(hparams: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError if an hparam is below 0, or infinite."""
    for name in names:
        if not 0 <= hparams[name] < math.inf:
            raise ValueError(f"{name} {hparams[name]}: must not be negative, nor infinite")


def report_warmup(name: str, warmup: int, steps: int) -> None:
    """Warns if a run of so many updates (0: not known) never leaves its warm-up."""
    if 0 < steps <= warmup:
        logger.warning("%s: the warm-up of %d updates outlasts the run of %d; no mask is followed", name, warmup, steps)


def check_scale(hparams: Mapping[str, Any]) -> None:
    """Raises ValueError if heatmaps so normalised need not lie in [0, 1], as those that stand beside masks must."""
    how, relu = hparams["map_normalisation"], hparams["map_relu"]
    if how == "none" or not (how.startswith("minmax") or relu):
        raise ValueError(
            f"map_normalisation {how} with map_relu {str(relu).lower()}: heatmaps must lie in [0, 1] here; take minmax "
            "or minmax_live, or set map_relu to true and take max, max_live or l1"
        )


def require_maps(featurizer: Any, input_shape: Sequence[int], hparams: Mapping[str, Any]) -> None:
    """Raises ValueError if the featurizer has no feature maps, or none at the layer that the hparams name."""
    if not hasattr(featurizer, "map_layer"):
        raise ValueError(
            f"{type(featurizer).__name__} has no feature maps (B, C, h, w), which Grad-CAM needs; "
            "take a convolutional network, a ViT or a Swin (docs/backbones.md)"
        )
    if hparams["map_layer"]:
        check_maps(featurizer, hparams["map_layer"], input_shape)


def map_layer(featurizer: Any, hparams: Mapping[str, Any]) -> nn.Module:
    """The module of the featurizer whose output is explained."""
    name = hparams["map_layer"]
    layer: nn.Module = featurizer.get_submodule(name) if name else featurizer.map_layer
    return layer


class ExplainedERM(ERM):
    """ERM that can say where it looks; what is made of it is the subclass's.

    Hparams:
        map_gradient: what a loss on the heatmaps trains: "constant" (the maps A) or "full" (A and their weights w).
        map_layer: module of the featurizer whose output is explained; "" is its ``map_layer``.
        map_relu: keep only what speaks for the label.
        map_method: a name in ``attribution.METHODS``.
        map_normalisation: how heatmaps are put on the scale [0, 1] of a mask, one of ``similarities.NORMALISATIONS``.
    """

    HPARAMS = {
        **MAP_HPARAMS,
        "map_relu": (False, lambda r: False),
        "map_normalisation": ("minmax_live", lambda r: "minmax_live"),
    }
    CHOICES: ClassVar[Mapping[str, Any]] = {
        "map_gradient": [policy for policy in POLICIES if policy != "none"],
        "map_method": METHODS,
        "map_normalisation": similarities.NORMALISATIONS,
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_choices(hparams, self.CHOICES)
        check_scale(hparams)
        require_maps(self.featurizer, input_shape, hparams)
        self.linear_head = not hparams["map_layer"] and has_linear_head(self.featurizer, self.classifier, input_shape)

    def explained(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and heatmaps (B, h, w) of the target classes (B,), from one forward pass."""
        hparams = self.hparams
        linear: Any = self.classifier if self.linear_head else None
        layer = map_layer(self.featurizer, hparams)
        how = hparams["map_method"], hparams["map_gradient"], hparams["map_relu"]
        return explain(self.network, layer, x, target, *how, linear)

    def normalised(self, heatmaps: Tensor) -> Tensor:
        """Heatmaps (B, h, w) on the scale of a mask."""
        return similarities.normalise(heatmaps, self.hparams["map_normalisation"])

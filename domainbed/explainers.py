"""Where any algorithm looks: heatmaps of its prediction, of its two networks, and the mask that it learned."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed import attribution
from domainbed.feature_maps import capture, evaluating
from domainbed.messages import not_found


class Explainer:
    """Explains what an algorithm predicts, by any attribution method, without changing it.

    It must be in evaluation mode: ``with evaluating(explainer.network)`` (``feature_maps.evaluating``).

    Attributes:
        network: images -> ``algorithm.predict``'s logits, as a module.
        layer: the module whose maps are explained: the one of the featurizer that the hparam ``map_layer`` names, else
            the featurizer's own ``map_layer``.

    Args:
        algorithm: anything that predicts from such a featurizer.
        method: a name in ``attribution.METHODS`` or ``attribution.EVALUATION_METHODS``.

    Raises:
        NotImplementedError: no such method.
        ValueError: the algorithm has no such layer.
    """

    def __init__(self, algorithm: Any, method: str = "grad_cam"):
        known = [*attribution.METHODS, *attribution.EVALUATION_METHODS]
        if method not in known:
            raise NotImplementedError(not_found("attribution method", method, known))
        self.algorithm, self.method = algorithm, method
        self.network, self.layer = _Predictor(algorithm), map_layer(algorithm)

    def check(self, input_shape: Sequence[int]) -> None:
        """Raises ValueError if ``predict`` does not run the layer, or the layer gives no maps (``Captured.maps``)."""
        weight = next(self.network.parameters())
        x = torch.zeros(2, *input_shape, device=weight.device)
        with torch.no_grad(), evaluating(self.network), capture(self.layer) as seen:
            self.network(x)
        name = type(self.algorithm).__name__
        if not seen.has_run:
            raise ValueError(f"{name}.predict does not run the map_layer of its featurizer, so it can't be explained")
        try:
            _ = seen.maps
        except ValueError as error:
            raise ValueError(f"{name} can't be explained: {error}") from error

    def heatmaps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and heatmaps (B, h, w) of the predicted class, without graph."""
        x = x.detach().requires_grad_()  # maps have a graph even where all weights are frozen
        with torch.no_grad():
            logits, found = attribution.explain(self.network, self.layer, x, None, self.method, policy="none")
        return logits.detach(), found.detach()

    def pair(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
        """Heatmaps (B, h, w) of label and confounder network for y and c (B,); None where the algorithm has no two."""
        explain = _own(self.algorithm, "explain", 3)
        if explain is None:
            return None
        with torch.enable_grad():
            (_, label_maps), (_, confounder_maps) = explain(x.detach().requires_grad_(), y, c)
        return label_maps.detach(), confounder_maps.detach()

    def mask(self, x: Tensor) -> Tensor | None:
        """The masks (B, H, W) in [0, 1] that the algorithm gives to images; None where it makes none."""
        mask = _own(self.algorithm, "mask", 1)
        if mask is None:
            return None
        with torch.no_grad():
            found: Tensor = mask(x)
        return found


class _Predictor(nn.Module):
    def __init__(self, algorithm: Any):
        super().__init__()
        self.algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.algorithm.predict(x)
        return logits


def _own(algorithm: Any, name: str, arguments: int) -> Callable[..., Any] | None:
    """An optional method of the algorithm, if it takes so many arguments: an equal name may mean something else."""
    found = getattr(algorithm, name, None)
    if not callable(found) or isinstance(found, nn.Module):
        return None
    try:
        inspect.signature(found).bind(*[None] * arguments)
    except TypeError:
        return None
    return found


def map_layer(algorithm: Any) -> nn.Module:
    """The module whose maps explain the algorithm (see ``Explainer``).

    Raises:
        ValueError: there is none.
    """
    featurizer = getattr(algorithm, "featurizer", None)
    hparams = getattr(algorithm, "hparams", None)
    name = hparams.get("map_layer") if isinstance(hparams, dict) else None
    modules = dict(featurizer.named_modules()) if isinstance(featurizer, nn.Module) else {}
    layer = modules.get(name) if name else getattr(featurizer, "map_layer", None)
    if not isinstance(layer, nn.Module):
        raise ValueError(
            f"{type(algorithm).__name__} can't be explained: heatmaps need an attribute `featurizer` with `map_layer`, "
            "the module that gives maps (B, C, h, w), as networks.Featurizer's convolutional networks and "
            "transformers have, or the hparam map_layer, which names such a module of the featurizer"
        )
    return layer

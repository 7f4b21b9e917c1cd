"""Where any algorithm looks: heatmaps of its prediction, of its two networks, and the mask that it learned."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from domainbed import attribution
from domainbed.feature_maps import capture, evaluating
from domainbed.messages import not_found

FEATURIZER = "featurizer"  # the attribute by which an algorithm says which network predicts


class Explainer:
    """Explains what an algorithm predicts, by any attribution method, without changing it.

    It must be in evaluation mode: ``with evaluating(explainer.network)`` (``feature_maps.evaluating``).

    An algorithm may predict an image from the others of its batch, too: its heatmap is then that of its own logit, the
    other images being what they are (``attribution.Method``).

    Attributes:
        network: images -> ``algorithm.predict``'s logits, as a module.

    Args:
        algorithm: anything that predicts from maps (``map_layers``).
        method: a name in ``attribution.METHODS`` or ``attribution.EVALUATION_METHODS``.

    Raises:
        NotImplementedError: no such method.
        ValueError: the algorithm has no layer of maps.
    """

    def __init__(self, algorithm: Any, method: str = "grad_cam"):
        known = [*attribution.METHODS, *attribution.EVALUATION_METHODS]
        if method not in known:
            raise NotImplementedError(not_found("attribution method", method, known))
        self.algorithm, self.method = algorithm, method
        self.network, self._layers = _Predictor(algorithm), map_layers(algorithm)
        self._layer: nn.Module | None = None

    def check(self, input_shape: Sequence[int]) -> None:
        """Raises ValueError if images (C, H, W) can't be explained (see ``layer``)."""
        weight = next(self.network.parameters())
        self.layer(torch.zeros(2, *input_shape, device=weight.device))

    def layer(self, x: Tensor) -> nn.Module:
        """The module whose maps are explained: of ``map_layers`` that which ``predict`` runs, the featurizer's first.

        Args:
            x: images (B, C, H, W), of which the first call predicts two.

        Raises:
            ValueError: ``predict`` runs none of them, or several of which none is the featurizer's, or the maps are
                none (``Captured.maps``).
        """
        if self._layer is None:
            self._layer = self._find_layer(x[:2])
        return self._layer

    def _find_layer(self, x: Tensor) -> nn.Module:
        with torch.no_grad(), evaluating(self.network), ExitStack() as stack:
            seen = {name: stack.enter_context(capture(layer)) for name, layer in self._layers.items()}
            self.network(x)
        name, ran = type(self.algorithm).__name__, [name for name, captured in seen.items() if captured.has_run]
        if not ran:
            where = ", ".join(seen)
            raise ValueError(f"{name}.predict does not run the map_layer of its {where}, so it can't be explained")
        if len(ran) > 1 and FEATURIZER not in ran:
            raise ValueError(
                f"{name} can't be explained: its predict runs several networks that have maps, {', '.join(ran)}; name "
                f"the one to explain `{FEATURIZER}`"
            )
        chosen = FEATURIZER if FEATURIZER in ran else ran[0]
        try:
            _ = seen[chosen].maps
        except ValueError as error:
            raise ValueError(f"{name} can't be explained: {error}") from error
        return self._layers[chosen]

    def heatmaps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and heatmaps (B, h, w) of the predicted class, without graph; errors as of ``layer``."""
        layer, x = self.layer(x), x.detach().requires_grad_()  # maps have a graph even where all weights are frozen
        with torch.no_grad():
            logits, found = attribution.explain(self.network, layer, x, None, self.method, policy="none")
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
        self.algorithm, self.training = algorithm, algorithm.training

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


def map_layers(algorithm: Any) -> dict[str, nn.Module]:
    """The modules whose maps may explain what the algorithm predicts, by the names of the networks that they are of.

    First that of its ``featurizer``, then those of its other networks that have an attribute ``map_layer``, such as a
    copy that has averaged weights. A network's layer is its ``map_layer``, or the module of it that the hparam
    ``map_layer`` names.

    Raises:
        ValueError: there is none.
    """
    hparams, featurizer = getattr(algorithm, "hparams", None), getattr(algorithm, FEATURIZER, None)
    wanted = hparams.get("map_layer") if isinstance(hparams, dict) else None
    networks = {FEATURIZER: featurizer} if isinstance(featurizer, nn.Module) else {}
    inner = {module for network in networks.values() for module in network.modules()}
    for name, module in algorithm.named_modules():
        if name and module not in inner and isinstance(getattr(module, "map_layer", None), nn.Module):
            networks[name] = module
            inner.update(module.modules())  # what a network is made of may have a map_layer, too
    layers = {name: _layer_of(network, wanted) for name, network in networks.items()}
    found = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    if not found:
        raise ValueError(
            f"{type(algorithm).__name__} can't be explained: heatmaps need an attribute `featurizer` with `map_layer`, "
            "the module that gives maps (B, C, h, w), as networks.Featurizer's convolutional networks and "
            "transformers have, or another network with such an attribute; the hparam map_layer may name another "
            "module of it"
        )
    return found


def _layer_of(network: nn.Module, name: str | None) -> Any:
    return dict(network.named_modules()).get(name) if name else getattr(network, "map_layer", None)

"""Two featurizers that share a trunk: all that runs before a layer is computed once, the rest belongs to each.

``Branch`` is the second one's rest. In a training step the first featurizer runs as ever, and ``trunk_output`` keeps
what enters the layer::

    branch = Branch(featurizer, "network.layer4", input_shape)
    with trunk_output(featurizer, branch.layer) as seen:
        features = featurizer(x)
    other_features = branch(seen.value)  # its gradients reach the trunk, too

and where the first one's features are not needed, ``branch.full(featurizer, x)`` stops at the layer.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from domainbed.backbones.base import Identity
from domainbed.feature_maps import evaluating

_PROBE = 2  # images
_CHAINS = (nn.Sequential, nn.ModuleList)
# What a network may raise if its layers don't get what they expect.
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)


class TrunkOutput:
    """What enters a layer."""

    def __init__(self, layer: str, stop: bool):
        self._layer, self._stop = layer, stop
        self._value: Tensor | None = None

    def _enters(self, module: nn.Module, inputs: Any) -> None:
        self._value = inputs[0]
        if self._stop:
            raise _Reached

    @property
    def value(self) -> Tensor:
        """The layer's input, of any shape (B, ...), still in the graph.

        Raises:
            RuntimeError: the layer has not run.
        """
        if self._value is None:
            raise RuntimeError(f"{self._layer} did not run; call the featurizer inside the `with`")
        return self._value


class _Reached(Exception):
    """The layer is about to run, and nothing after it is asked for."""


@contextmanager
def trunk_output(featurizer: nn.Module, layer: str, stop: bool = False) -> Iterator[TrunkOutput]:
    """Watches what enters a layer: ``with trunk_output(featurizer, layer) as seen: ...``, then ``seen.value``.

    Args:
        featurizer: images (B, C, H, W) -> features (B, n_outputs).
        layer: name of a module in it, as in ``named_modules``.
        stop: leave the ``with`` as soon as the layer is reached; neither it nor what follows is computed.
    """
    seen = TrunkOutput(layer, stop)
    handle = featurizer.get_submodule(layer).register_forward_pre_hook(seen._enters)
    try:
        with suppress(_Reached):
            yield seen
    finally:
        handle.remove()


class Branch(nn.Module):
    """A second rest of a featurizer, behind a trunk that the two share: (B, ...) into the layer -> (B, n_outputs).

    Starts with copies of the featurizer's weights. Parameters, buffers and state dict hold nothing of the trunk; those
    are the featurizer's. Modes (dropout, frozen BatchNorm) and ``map_layer`` are as in the featurizer.

    The copy runs as the featurizer does, but on images without values (of torch's device "meta", where nothing is
    computed): what ran before the layer is replaced by stand-ins, and the layer gets the trunk's output in place of
    its input. A network in which that output is not all that the rest needs can't run so.

    Args:
        featurizer: images (B, C, H, W) -> features (B, n_outputs).
        layer: name of the first module that is not shared, as in ``named_modules``: "network.layer4" of a ResNet.
        input_shape: (C, H, W) of an image.
        map_layer: name of the featurizer's module that is ``map_layer`` of the branch; "" is the featurizer's own.

    Raises:
        ValueError: there is no such layer; the featurizer can't be split there; or the branch would have no weights of
            its own on the way to its map.
    """

    def __init__(self, featurizer: Any, layer: str, input_shape: Sequence[int], map_layer: str = ""):
        super().__init__()
        known = {name for name, _ in featurizer.named_modules() if name}
        for name in {layer, map_layer or layer} - known:
            raise ValueError(f"{type(featurizer).__name__} has no layer {name!r}; {_choice(featurizer)}")
        self.layer, self.input_shape, self.n_outputs = layer, tuple(input_shape), featurizer.n_outputs
        self._map_layer = map_layer
        self._value: Tensor | None = None
        with evaluating(featurizer), _explained(featurizer, layer):
            x = torch.randn(_PROBE, *input_shape, generator=torch.Generator().manual_seed(0))
            x = x.to(next(featurizer.parameters()))  # its device and dtype
            watch = _Watch(featurizer, layer, _map_layer(featurizer, map_layer))
            watch.run(x)
        if not watch.map_is_own:
            raise ValueError(
                f"a branch from {layer!r} of {type(featurizer).__name__} has no weights of its own on the way to its "
                'map: all that makes the map is shared; say so by the value "classifier", or take an earlier layer'
            )
        with _explained(featurizer, layer):
            self.rest: Any = watch.rest()
            self.rest.get_submodule(layer).register_forward_pre_hook(self._enters)
            self.activation: nn.Module = Identity()
            self._compare(featurizer, x)

    def _compare(self, featurizer: nn.Module, x: Tensor) -> None:
        with torch.no_grad(), evaluating(featurizer), evaluating(self):
            expected, given = featurizer(x), self.full(featurizer, x)
        if not torch.allclose(given, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()), equal_nan=True):
            raise ValueError("a copy of the rest gives other features")

    # A method, not a closure: copies of a branch (copy.deepcopy) then have a hook that reads their own value.
    def _enters(self, module: nn.Module, inputs: Any) -> Any:
        return (self._value, *inputs[1:])

    @property
    def map_layer(self) -> nn.Module:
        """The branch's own module whose output (B, D, h, w) is the last map before pooling."""
        return _map_layer(self.rest, self._map_layer)

    def forward(self, value: Tensor) -> Tensor:
        """Features of the images whose trunk output (``TrunkOutput.value``) is given."""
        self._value = value
        try:
            features: Tensor = self.rest(torch.empty(len(value), *self.input_shape, device="meta"))
        finally:
            self._value = None
        return self.activation(features)

    def full(self, featurizer: nn.Module, x: Tensor) -> Tensor:
        """Features of images x (B, C, H, W); the featurizer runs as far as the trunk goes."""
        with trunk_output(featurizer, self.layer, stop=True) as seen:
            featurizer(x)
        return self(seen.value)


class _StandIn(nn.Module):
    """In place of a module of the trunk: its settings, and outputs of its shape where nothing is computed."""

    def __init__(self, module: nn.Module, shape: Sequence[int] | None):
        super().__init__()
        settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self.__dict__.update(settings)  # a network may read its layers' sizes
        self._shape = shape

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        if self._shape is None:
            raise ValueError("a module of the trunk gives something other than one tensor")
        return torch.empty(len(x), *self._shape, device="meta")


class _Watch:
    """What runs before a layer and what after it, seen in one run of the featurizer."""

    def __init__(self, featurizer: nn.Module, layer: str, map_layer: Any):
        self.featurizer, self.layer, self.map_layer = featurizer, featurizer.get_submodule(layer), map_layer
        self.before: dict[nn.Module, Sequence[int] | None] = {}  # what is done when the layer starts -> shape it gave
        self.runs, self.maps = 0, None
        # Names of the parameters that the features depend on, if the trunk's output is given.
        self.own: set[str] = set()
        self.map_is_own = True

    def _starts(self, module: nn.Module, inputs: Any) -> Any:
        if self.runs:
            self.before.pop(module, None)
        if module is not self.layer:
            return None
        self.runs += 1
        self.entered = inputs[0].detach()  # which cuts the graph
        self.version = self.entered._version
        return (self.entered, *inputs[1:])

    def _ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.runs:
            self.before[module] = output.shape[1:] if isinstance(output, Tensor) else None
        if module is self.map_layer:
            self.maps = output

    @torch.enable_grad()
    def run(self, x: Tensor) -> None:
        """Fills the attributes; the featurizer is left as it was."""
        modules = list(self.featurizer.modules())
        handles = [module.register_forward_pre_hook(self._starts) for module in modules]
        handles += [module.register_forward_hook(self._ends) for module in modules]
        parameters = {name: p.detach().requires_grad_() for name, p in self.featurizer.named_parameters()}
        try:
            features = torch.func.functional_call(self.featurizer, parameters, (x,))
        finally:
            for handle in handles:
                handle.remove()
        self.own = _reached_from(features, parameters)
        self._check()
        if self.map_layer is not None:
            self.map_is_own = self.map_layer not in self.before and bool(_reached_from(self.maps, parameters))

    def _check(self) -> None:
        if self.runs != 1:
            raise ValueError(f"the layer runs {self.runs} times, not once")
        if self.entered._version != self.version:
            raise ValueError("the layer overwrites it; begin one layer earlier or later")
        around = {id(p) for module in self.before for p in module.parameters()}
        if any(id(p) in around for name, p in self.featurizer.named_parameters() if name in self.own):
            raise ValueError("a path leads around the layer, as in a residual block")

    def rest(self) -> Any:
        """A copy of the featurizer without its trunk."""
        memo: dict[int, Any] = {id(module): _StandIn(module, shape) for module, shape in self.before.items()}
        for name, parameter in self.featurizer.named_parameters():
            if name not in self.own:
                memo[id(parameter)] = parameter.detach().to("meta")
        rest = copy.deepcopy(self.featurizer, memo)
        for module in rest.modules():  # such as a ViT's positions, which belong to the network and not to a layer
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    delattr(module, name)
                    setattr(module, name, parameter)  # no parameter any more, and not in the state dict
        return rest


def _reached_from(output: Any, parameters: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that the output depends on."""
    if not (isinstance(output, Tensor) and output.requires_grad):
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


@contextmanager
def _explained(featurizer: nn.Module, layer: str) -> Iterator[None]:
    try:
        yield
    except _MISFITS as error:
        raise ValueError(
            f"{type(featurizer).__name__} can't be split at {layer!r}: what enters this layer must be one tensor that "
            f"all the rest, and nothing else, is computed from ({error}); {_choice(featurizer)}"
        ) from error


def _map_layer(featurizer: Any, name: str) -> Any:
    return featurizer.get_submodule(name) if name else getattr(featurizer, "map_layer", None)


def _choice(featurizer: nn.Module) -> str:
    """Where a split is likely to succeed, for messages: layers with weights, blocks as a whole, up to the last map."""
    names, map_layer, size = [], getattr(featurizer, "map_layer", None), _size(featurizer)
    within = None  # name of a block, whose parts hang together
    for name, module in featurizer.named_modules():
        if within is None or not name.startswith(within):
            in_chain = name and isinstance(featurizer.get_submodule(name.rpartition(".")[0]), _CHAINS)
            within = f"{name}." if in_chain and not isinstance(module, _CHAINS) else None
            if 0 < _size(module) < size:
                names.append(name)
        if module is map_layer:
            break
    return f"layers to try: {', '.join(names)}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

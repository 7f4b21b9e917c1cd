"""A layer's feature maps: seen in a forward pass, and how the score depends on them where one linear layer says it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from domainbed.messages import not_found

_TOLERANCE = 1e-5  # a fraction of the largest value


class Captured:
    """The last output of a module, as feature maps."""

    def __init__(self, name: str):
        self._name = name
        self._output: Any = None

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._output = output

    @property
    def has_run(self) -> bool:
        return self._output is not None

    @property
    def maps(self) -> Tensor:
        """Feature maps (B, C, h, w), still in the graph, as the forward pass left them.

        Where a later module works in place (an AlexNet's ReLU, a DenseNet's last one), they are what it made of them.

        Raises:
            RuntimeError: the module has not run.
            ValueError: its output is not (B, C, h, w), or has a single pixel.
        """
        if not self.has_run:
            raise RuntimeError(f"{self._name} did not run while it was captured; call the network inside the `with`")
        if not isinstance(self._output, Tensor) or self._output.ndim != 4:
            given = tuple(self._output.shape) if isinstance(self._output, Tensor) else type(self._output).__name__
            raise ValueError(
                f"{self._name} gave {given}; a heatmap needs a layer that gives (B, C, h, w), such as a featurizer's "
                "map_layer, which makes maps of tokens"
            )
        if self._output.shape[2:].numel() == 1:
            raise ValueError(
                f"{self._name} gave {tuple(self._output.shape)}: a map of one pixel explains nothing; take larger "
                "images or a backbone with less stride (a ResNet makes 7 x 7 maps of 224 pixels, and 1 x 1 of 28)"
            )
        return self._output


@contextmanager
def capture(module: nn.Module) -> Iterator[Captured]:
    """Watches a layer: ``with capture(layer) as seen: logits = network(x)``, then ``seen.maps``."""
    captured = Captured(type(module).__name__)
    handle = module.register_forward_hook(captured._hook)
    try:
        yield captured
    finally:
        handle.remove()


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of each image's target class: the score that a heatmap explains.

    Args:
        logits: (B, K); K = 1 is a binary classifier with one logit z, which speaks for class 1.
        target: (B,) int64 in [0, K), or in {0, 1} if K = 1.

    Returns:
        (B,); for one logit z where the target is 1, else -z (eX2L, appendix B.1).

    Raises:
        ValueError: wrong shapes or a target that is not int64.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} of {target.dtype} do not fit; "
            "give logits (B, K) and target (B,) of torch.int64"
        )
    if logits.shape[1] == 1:
        return torch.where(target == 1, logits[:, 0], -logits[:, 0])
    return logits.gather(1, target[:, None])[:, 0]


def read_off_gradient(classifier: nn.Linear, target: Tensor, maps: Tensor) -> Tensor:
    """``d score_i / d maps_ikp = w_{t_i k} / Z``, where the logits are this layer of the maps' averages over pixels.

    It costs no backward pass. Whether it holds is for the caller to know: see ``has_linear_head`` and
    ``has_active_dropout``.

    Args:
        classifier: with weights w (K, C), C of them for each logit; K = 1 is as in ``target_logit``.
        target: (B,) int64, the class t_i whose logit is the score.
        maps: (B, C, h, w) with Z = h w pixels.

    Returns:
        (B, C, h, w), the same at every pixel, in the graph of the classifier's weights only.

    Raises:
        ValueError: no linear layer, or one of another width than the maps.
    """
    if not isinstance(classifier, nn.Linear) or classifier.in_features != maps.shape[1]:
        raise ValueError(
            f"the gradient of maps {tuple(maps.shape)} can't be read off {classifier}; that takes an nn.Linear "
            "which follows their averages over pixels (has_linear_head)"
        )
    weight = classifier.weight
    if len(weight) == 1:
        weight = torch.cat([-weight, weight])
    return (weight[target] / maps.shape[2:].numel())[:, :, None, None].expand_as(maps)


def has_linear_head(featurizer: nn.Module, classifier: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether logits are one linear layer of the averages of ``map_layer``'s maps, as in a ResNet; see below."""
    return isinstance(classifier, nn.Linear) and averages_maps(featurizer, input_shape)


def check_maps(featurizer: nn.Module, layer: str, input_shape: Sequence[int]) -> None:
    """Raises ValueError if the featurizer has no module of that name, or it gives no maps (see ``Captured.maps``)."""
    known = [name for name, _ in featurizer.named_modules() if name]
    if layer not in known:
        raise ValueError(not_found(f"map_layer of {type(featurizer).__name__}", layer, known))
    weight = next(featurizer.parameters())
    x = torch.zeros(2, *input_shape).to(weight)
    with torch.no_grad(), evaluating(featurizer), capture(featurizer.get_submodule(layer)) as seen:
        featurizer(x)
    try:
        _ = seen.maps
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{layer} of {type(featurizer).__name__}: {error}") from error


def has_active_dropout(module: nn.Module) -> bool:
    """Whether anything in it drops units now: dropout layers, or timm's ``drop_rate``, above 0 and in training."""
    for part in module.modules():
        rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "drop_rate", 0.0)
        if part.training and isinstance(rate, float | int) and rate > 0:
            return True
    return False


def averages_maps(featurizer: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether a featurizer's features are the averages over pixels of its ``map_layer``'s maps.

    Tried on two random images in evaluation mode: features and averages agree, so do their gradients (a second ReLU
    would change those only), and no module with weights or statistics runs after the maps (one that does may be the
    identity at the start of training). Weights, their gradients, statistics, modes and the state of random numbers
    stay as they are. Dropout, off in evaluation, is not looked at.

    Args:
        featurizer: images -> features (B, D).
        input_shape: (C, H, W).

    Raises:
        ValueError: the maps are no maps, or have a single pixel (see ``Captured.maps``).
    """
    layer = getattr(featurizer, "map_layer", None)
    if layer is None:
        return False
    weight = next(featurizer.parameters())
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(weight).requires_grad_()
    with torch.enable_grad(), evaluating(featurizer), capture(layer) as seen, _later(featurizer, seen) as later:
        features = featurizer(x)
    maps = seen.maps
    averages = maps.mean(dim=(2, 3))
    if later or features.shape != averages.shape or not _close(features, averages):
        return False
    (slope,) = torch.autograd.grad(features.sum(), maps, allow_unused=True)
    return slope is not None and _close(slope, torch.full_like(slope, 1 / maps.shape[2:].numel()))


def _close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=_TOLERANCE * expected.abs().max().item())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being; after it every module has its own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _later(network: nn.Module, seen: Captured) -> Iterator[list[nn.Module]]:
    """Modules with weights or buffers of their own that begin to run after the captured one."""
    later: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if seen.has_run:
            later.append(module)

    owners = (module for module in network.modules() if any(True for _ in _tensors(module)))
    handles = [owner.register_forward_pre_hook(note) for owner in owners]
    try:
        yield later
    finally:
        for handle in handles:
            handle.remove()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)

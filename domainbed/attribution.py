"""Where a network looks: class activation maps that can themselves be trained, and one that can't.

All of them weight the maps of a layer and add up the channels. A method in ``METHODS`` finds the weights from the
gradient of the score, so that heatmaps can be part of a loss; those in ``EVALUATION_METHODS`` ask the network again.
``explain`` calls any of them. ``docs/attribution.md`` compares them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from domainbed.feature_maps import capture, has_active_dropout, read_off_gradient, target_logit
from domainbed.lib.misc import predicted_labels
from domainbed.messages import not_found
from domainbed.registry import Registry

POLICIES = ("constant", "full", "none")

Weights = Callable[[Tensor, Tensor], Tensor]  # (maps, gradient), both (B, C, h, w) -> (B, C) or (B, C, h, w)


class Method(Protocol):
    """A method that can be trained: maps and score -> heatmaps.

    ``heatmap_ip = ReLU(sum_k weight_ikp maps_ikp)``, the weights being the method's function of the maps and of
    ``gradient_ikp = d score_i / d maps_ikp``. All images share one backward pass, from the sum of the scores; that is
    exact as long as nothing after the layer mixes images (batch norm before it may). Where something does,
    ``own_gradient`` gives the gradient.

    Args:
        maps: (B, C, h, w), output of the layer, still in the graph that leads to ``score``.
        score: (B,), the logit to explain, of the same forward pass (see ``target_logit``).
        policy: what a loss on the heatmaps can change. "constant": the maps, while the weights are plain numbers;
            costs one backward pass of the head. "full": both, by second derivatives, which torch's fused attention does
            not have (``explain`` sees to it). "none": nothing.
        relu: keep only what speaks for the target; without it heatmaps have both signs (Grad-CAM++ and LayerCAM have
            no negative weights in any case).
        gradient: (B, C, h, w), where it is known without a backward pass (see ``read_off_gradient``); neither maps
            nor score need a graph then.

    Returns:
        Heatmaps (B, h, w), float32 also under autocast. The graph is kept for the caller's own backward pass.

    Raises:
        ValueError: wrong shapes or policy, no graph, or a score that does not depend on the maps.
    """

    def __call__(
        self,
        maps: Tensor,
        score: Tensor,
        *,
        policy: str = "constant",
        relu: bool = True,
        gradient: Tensor | None = None,
    ) -> Tensor: ...


METHODS: Registry[Method] = Registry("attribution method")


def method(weights: Weights) -> Method:
    """Registers a function of (maps, gradient) that gives the weights as a ``Method`` of that name."""

    def attribution(
        maps: Tensor,
        score: Tensor,
        *,
        policy: str = "constant",
        relu: bool = True,
        gradient: Tensor | None = None,
    ) -> Tensor:
        _check(maps, score, policy, gradient)
        if gradient is None:
            gradient = _slope(maps, score.sum(), policy == "full")
        with torch.autocast(maps.device.type, enabled=False):  # which would round products
            maps, gradient = maps.float(), gradient.float()
            factors = weights(maps, gradient) if policy == "full" else weights(maps.detach(), gradient.detach())
            combined = _combine(factors, maps.detach() if policy == "none" else maps)
        return combined.relu() if relu else combined

    # Not functools.wraps, with which help() would show the arguments of `weights`.
    attribution.__name__ = attribution.__qualname__ = weights.__name__
    attribution.__doc__ = weights.__doc__
    return METHODS.register(attribution)


def _check(maps: Tensor, score: Tensor, policy: str, gradient: Tensor | None) -> None:
    if policy not in POLICIES:
        raise ValueError(f"unknown gradient policy: {policy!r}; take one of {', '.join(POLICIES)}")
    if maps.ndim != 4 or score.shape != maps.shape[:1]:
        raise ValueError(
            f"maps {tuple(maps.shape)} and score {tuple(score.shape)} do not fit; give maps (B, C, h, w) and score (B,)"
        )
    if gradient is None and not (maps.requires_grad and score.requires_grad):
        raise ValueError("maps or score carry no graph; run the forward pass with gradients enabled, detach neither")
    if gradient is not None and gradient.shape != maps.shape:
        raise ValueError(f"gradient {tuple(gradient.shape)} does not fit maps {tuple(maps.shape)}; give the same shape")


def own_gradient(maps: Tensor, score: Tensor) -> Tensor:
    """``d score_i / d maps_ikp`` (B, C, h, w), also where an image's score depends on the other images' maps.

    It costs two backward passes, one of every other image; if it turns out that they reach the maps of the images in
    between, one for each image. Too much for each step of a training.
    """
    _check(maps, score, "none", None)
    even, odd = (_slope(maps, score[first::2].sum()) for first in (0, 1))
    if not even[1::2].any() and not odd[0::2].any():
        return even + odd
    return torch.stack([_slope(maps, own)[i] for i, own in enumerate(score)])


def _slope(maps: Tensor, total: Tensor, create_graph: bool = False) -> Tensor:
    (slope,) = torch.autograd.grad(total, maps, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if slope is None:
        raise ValueError("score does not depend on maps; pass both from the same forward pass, maps first")
    return slope


def _combine(weights: Tensor, maps: Tensor) -> Tensor:
    """``sum_k weights_ik maps_ikp``, or with weights_ikp: (B, h, w)."""
    if weights.ndim == 4:
        return (weights * maps).sum(dim=1)
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("bc,bchw->bhw", weights, maps)


@method
def grad_cam(maps: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM: a channel's weight is its mean gradient, ``weight_ik = (1 / Z) sum_p gradient_ikp``.

    Arguments and result: ``Method``.

    Source: Selvaraju et al. 2017, Grad-CAM, equations 1 and 2, https://arxiv.org/abs/1610.02391.
    """
    return gradient.mean(dim=(2, 3))


@method
def grad_cam_plus_plus(maps: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++: a channel's weight is a sum of its positive gradients g, which does not favour large objects.

    ``weight_ik = sum_p a_ikp ReLU(g_ikp)`` with ``a = g^2 / (2 g^2 + S_ik g^3)`` and ``S_ik = sum_p maps_ikp``: the
    paper's closed form for the exponential of the score. That exponential is a common factor of all weights of an
    image, and left out. Arguments and result: ``Method``.

    Source: Chattopadhay et al. 2018, Grad-CAM++, equation 19, https://arxiv.org/abs/1710.11063.
    Differs: ``a`` is 1 / (2 + S g), the same without 0 / 0. The paper's maps come out of a ReLU, so that this
        denominator is at least 2; where maps have both signs it could vanish or turn, and is kept at 1 or more.
    """
    total = maps.sum(dim=(2, 3), keepdim=True)
    return (gradient.relu() / (2 + total * gradient).clamp(min=1)).sum(dim=(2, 3))


@method
def hires_cam(maps: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM: every pixel of a channel has its own weight, its gradient; where Grad-CAM would average it.

    Behind the maps' average and one linear layer it is Grad-CAM. Signed, and with one linear layer right behind the
    maps, it adds up to the logit less its bias. Arguments and result: ``Method``.

    Source: Draelos and Carin 2020, HiResCAM, https://arxiv.org/abs/2011.08891.
    """
    return gradient


@method
def layer_cam(maps: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM: every pixel of a channel has its own weight, its gradient where that is positive, else 0.

    Arguments and result: ``Method``.

    Source: Jiang et al. 2021, LayerCAM, https://doi.org/10.1109/TIP.2021.3089943.
    """
    return gradient.relu()


EVALUATION_METHODS: Registry[Callable[..., Tensor]] = Registry("attribution method")  # arguments as of ``score_cam``


@EVALUATION_METHODS.register
def score_cam(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    batch_size: int = 64,
    relu: bool = True,
) -> Tensor:
    """Score-CAM: a channel's weight is the score of the image of which only what it responds to is left.

    ``heatmap_ip = ReLU(sum_k weight_ik maps_ikp)``, ``weight_i = softmax_k(score of x_i * mask_ik)``; a mask is the
    channel at the image's size, scaled to [0, 1] by its minimum and maximum. No gradient is used, and none is given:
    for evaluation only. It costs C forward passes of an image.

    Args:
        predict: images -> logits (B, K), in evaluation mode.
        x: (B, C', H, W); what is masked becomes 0, the mean image if images are normalised.
        maps: (B, C, h, w) of x, without graph.
        target: (B,) int64, the class to explain (see ``target_logit``).
        batch_size: masked images in one forward pass.
        relu: keep only what speaks for the target.

    Returns:
        Heatmaps (B, h, w), float32.

    Raises:
        ValueError: x or maps carry a graph, which ends here, or wrong shapes.

    Source: Wang et al. 2020, Score-CAM, algorithm 1, https://arxiv.org/abs/1910.01279.
    Differs: the score is the logit, as for all methods here. That of a baseline image, which the paper subtracts, is
        the same for all channels, so that the softmax does not see it. A constant channel has the mask 0, not 0 / 0.
    """
    if maps.ndim != 4 or len(maps) != len(x):
        raise ValueError(f"maps {tuple(maps.shape)} do not fit {len(x)} images; give maps (B, C, h, w)")
    if maps.requires_grad or x.requires_grad:
        raise ValueError("score_cam has no gradient, but x or maps carry a graph; detach them, or take one of METHODS")
    maps = maps.float()
    scores = []
    with torch.no_grad():
        for pairs in torch.arange(maps[:, :, 0, 0].numel(), device=x.device).split(batch_size):
            images = pairs // maps.shape[1]
            masked = x[images] * _masks(maps.flatten(0, 1)[pairs], x.shape[2:])
            scores.append(target_logit(predict(masked), target[images]).float())
    weights = torch.cat(scores).view(maps.shape[:2]).softmax(dim=1)
    combined = _combine(weights, maps)
    return combined.relu() if relu else combined


def _masks(channels: Tensor, size: torch.Size) -> Tensor:
    """(n, h, w) -> (n, 1, H, W) in [0, 1]."""
    enlarged = F.interpolate(channels[:, None], size=tuple(size), mode="bilinear")
    low, high = enlarged.amin(dim=(2, 3), keepdim=True), enlarged.amax(dim=(2, 3), keepdim=True)
    # Asked of the channels as they are, since rounding would give a constant one a pattern.
    varies = (channels.amax(dim=(1, 2)) > channels.amin(dim=(1, 2)))[:, None, None, None] & (high > low)
    return torch.where(varies, (enlarged - low) / (high - low).where(varies, 1), 0)


def explain(
    network: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Tensor | None,
    method: str = "grad_cam",
    policy: str = "constant",
    relu: bool = True,
    linear: nn.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and heatmaps of images by any method, from one forward pass (and those that Score-CAM is made of).

    Args:
        network: images -> logits (B, K).
        layer: its module whose output (B, C, h, w) is explained, such as a featurizer's ``map_layer``.
        x: (B, C', H, W).
        target: (B,) int64, the class to explain (see ``target_logit``); None: the predicted one.
        method: a name in ``METHODS`` or ``EVALUATION_METHODS``.
        policy: what a loss on the heatmaps can change (see ``Method``). With "none" gradients may be disabled; an
            image's weights then follow from its own score, whatever its maps do to the others' (``own_gradient``).
        relu: keep only what speaks for the target.
        linear: the network's last layer, if the logits are this layer of the averages of the maps
            (``has_linear_head``): the gradient is then its weights, without a backward pass. While dropout is active
            that is not so, and autograd is used all the same.

    Returns:
        Logits (B, K) and heatmaps (B, h, w), float32.

    Raises:
        NotImplementedError: no such method.
        ValueError: a method without gradient with another policy than "none" or in training mode; what ``Method`` and
            ``capture`` refuse.
    """
    if method in EVALUATION_METHODS:
        return _evaluate(network, layer, x, target, method, policy, relu)
    if method not in METHODS:
        raise NotImplementedError(not_found("attribution method", method, [*METHODS, *EVALUATION_METHODS]))
    trained = torch.is_grad_enabled()
    with torch.set_grad_enabled(trained or policy == "none"), capture(layer) as seen:
        with differentiable(policy):
            logits = network(x)
        linear = None if has_active_dropout(network) else linear
        found = heatmaps(seen.maps, logits, target, method, policy, relu, linear, own=not trained)
    return logits if trained else logits.detach(), found


def heatmaps(
    maps: Tensor,
    logits: Tensor,
    target: Tensor | None,
    method: str = "grad_cam",
    policy: str = "constant",
    relu: bool = True,
    linear: nn.Linear | None = None,
    own: bool = False,
) -> Tensor:
    """Heatmaps (B, h, w) by a method that can be trained, from the maps and logits of a forward pass that is done.

    Args:
        maps: (B, C, h, w), in the graph that leads to the logits.
        logits: (B, K).
        linear: the layer that makes the logits of the maps' averages, if one does, with no active dropout between.
        own: take ``own_gradient``, which a loss on the heatmaps does not reach.

    The rest is as in ``explain``.
    """
    target = predicted_labels(logits) if target is None else target
    score, gradient = target_logit(logits, target), None
    if linear is not None:
        gradient = read_off_gradient(linear, target, maps)
    elif own:
        gradient = own_gradient(maps, score)
    return METHODS[method](maps, score, policy=policy, relu=relu, gradient=gradient)


def differentiable(policy: str) -> AbstractContextManager[Any]:
    """The context for a forward pass whose heatmaps have this policy: fused attention has no second derivatives."""
    return sdpa_kernel(SDPBackend.MATH) if policy == "full" else nullcontext()


def _evaluate(
    network: nn.Module, layer: nn.Module, x: Tensor, target: Tensor | None, method: str, policy: str, relu: bool
) -> tuple[Tensor, Tensor]:
    if policy != "none":
        raise ValueError(
            f"{method} has no gradient, so that nothing can be trained by it; policy is {policy!r}: give 'none', or "
            f"take one of {', '.join(METHODS)}"
        )
    if any(module.training for module in network.modules()):
        raise ValueError(f"{method} asks the network about masked images, for evaluation only; call eval() on it first")
    with torch.no_grad():
        with capture(layer) as seen:
            logits = network(x)
        target = predicted_labels(logits) if target is None else target
        return logits, EVALUATION_METHODS[method](network, x.detach(), seen.maps, target, relu=relu)

"""Where a network looks: Grad-CAM that can itself be trained, with its gradient policy spelled out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

POLICIES = ("constant", "full", "none")


def grad_cam(maps: Tensor, score: Tensor, *, policy: str = "constant", relu: bool = True) -> Tensor:
    """Grad-CAM: the channels of a layer, each weighted by how much it raises the score.

    ``weight_ik = (1 / Z) sum_p d score_i / d maps_ikp`` and ``heatmap_ip = ReLU(sum_k weight_ik maps_ikp)``. All
    images share one backward pass, from the sum of the scores; that is exact as long as nothing after the layer
    mixes images (batch norm before it may).

    Args:
        maps: (B, C, h, w), output of the layer, still in the graph that leads to ``score``.
        score: (B,), the logit to explain, of the same forward pass (see ``target_logit``).
        policy: what a loss on the heatmap can change. "constant": the maps, while the weights are plain numbers;
            costs one backward pass of the head. "full": both, by second derivatives. "none": nothing.
        relu: keep only what speaks for the target; without it heatmaps have both signs.

    Returns:
        Heatmaps (B, h, w), float32 also under autocast. The graph is kept for the caller's own backward pass.

    Raises:
        ValueError: wrong shapes or policy, no graph, or a score that does not depend on the maps.

    Source: Selvaraju et al. 2017, Grad-CAM, equations 1 and 2, https://arxiv.org/abs/1610.02391.
    """
    _check(maps, score, policy)
    (gradient,) = torch.autograd.grad(
        score.sum(), maps, retain_graph=True, create_graph=policy == "full", allow_unused=True
    )
    if gradient is None:
        raise ValueError("score does not depend on maps; pass both from the same forward pass, maps first")
    weights = gradient.float().mean(dim=(2, 3))  # (B, C)
    activations = maps.detach() if policy == "none" else maps
    with torch.autocast(maps.device.type, enabled=False):  # which would round the product
        heatmaps = torch.einsum("bc,bchw->bhw", weights, activations.float())
    return heatmaps.relu() if relu else heatmaps


def _check(maps: Tensor, score: Tensor, policy: str) -> None:
    if policy not in POLICIES:
        raise ValueError(f"unknown gradient policy: {policy!r}; take one of {', '.join(POLICIES)}")
    if maps.ndim != 4 or score.shape != maps.shape[:1]:
        raise ValueError(
            f"maps {tuple(maps.shape)} and score {tuple(score.shape)} do not fit; give maps (B, C, h, w) and score (B,)"
        )
    if not (maps.requires_grad and score.requires_grad):
        raise ValueError("maps or score carry no graph; run the forward pass with gradients enabled, detach neither")


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of each image's target class: the score that Grad-CAM explains.

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


class Captured:
    """The last output of a module, as feature maps."""

    def __init__(self, name: str):
        self._name = name
        self._output: Any = None

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._output = output

    @property
    def maps(self) -> Tensor:
        """Feature maps (B, C, h, w), still in the graph.

        Raises:
            RuntimeError: the module has not run.
            ValueError: its output is not (B, C, h, w), or has a single pixel.
        """
        if self._output is None:
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

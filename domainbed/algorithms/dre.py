"""Distributionally robust explanations: the heatmap of a mixture is the mixture of the heatmaps."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.explained import ExplainedERM, check_not_negative


def partners(y: Tensor) -> Tensor:
    """For each image (B,) another of its class, drawn as a random permutation of the class's images.

    The draw is torch's global generator's. An image may be its own partner, and is if it is alone in its class.
    """
    shuffled = torch.randperm(len(y)).to(y.device)
    found = torch.empty_like(shuffled)
    found[y.argsort(stable=True)] = shuffled[y[shuffled].argsort(stable=True)]
    return found


@register
class DRE(ExplainedERM):
    """ERM whose heatmaps are few, and behave under mixing of two images of a class as the images do.

    ``L = CE(f(x), y) + R``, ``R = a mean |N(H~) - (l N(H) + (1 - l) N(H'))| + b mean N(H) + c CE(f(x~), y)`` for
    ``x~ = l x + (1 - l) x'`` with an image x' of the same class and ``l ~ Beta(s, s)`` drawn for each image. H, H', H~
    (h, w) are the heatmaps of x, x', x~ for their label, N scales them to [0, 1]. H' is that of another image of the
    same step, so that there is one further forward pass only, that of x~.

    Source: Li, Qiao, Ma and Peng 2023, Are Data-driven Explanations Robust against Out-of-distribution Data?,
        https://arxiv.org/abs/2303.16390, with the weights of its published training script.
    Differs: terms are means over images, where the script sums the classes' means and divides by the number of classes
        (the same for balanced classes). The sparsity is the mean of the map, the paper's l1 norm, of the image as it
        is; the script takes the mean of the columns' maxima, half of it of the mixture. A constant map is 0 after N,
        where the script divides 0 by 0. The script freezes batch norm (here ``freeze_bn``). Learning rate, schedule and
        steps are DomainBed's.

    Hparams:
        dre_consistency, dre_sparsity, dre_mixed: the weights a, b, c (ranges: ours).
        dre_alpha: s of the Beta distribution.
        map_relu, map_normalisation: false and "minmax_live", which are the script's.
        map_gradient, map_layer, map_method: of ``ExplainedERM``.
    """

    HPARAMS = {
        "dre_consistency": (1.0, lambda r: 10 ** r.uniform(-2, 1)),
        "dre_sparsity": (0.5, lambda r: 10 ** r.uniform(-3, 0)),
        "dre_mixed": (0.1, lambda r: 10 ** r.uniform(-2, 0)),
        "dre_alpha": (0.2, lambda r: 0.2),
    }
    CONTROL = {"dre_consistency": 0.0, "dre_sparsity": 0.0, "dre_mixed": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, "dre_consistency", "dre_sparsity", "dre_mixed")
        if not hparams["dre_alpha"] > 0:
            raise ValueError(f"dre_alpha {hparams['dre_alpha']}: must be above 0")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        logits, heatmaps = self.explained(x, y)
        risk = F.cross_entropy(logits, y)
        regulariser, values = self.regulariser(x, y, self.normalised(heatmaps))
        loss = risk + regulariser
        self.step(loss)
        return {"loss": loss.item(), "risk": risk.item(), **values}

    def regulariser(self, x: Tensor, y: Tensor, maps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """R, and its three terms, of images (B, C, H, W) with normalised heatmaps (B, h, w)."""
        weights: list[Any] = [self.hparams[f"dre_{term}"] for term in ("consistency", "sparsity", "mixed")]
        if not any(weights):  # then not even the statistics of a batch norm see mixed images
            return maps.new_zeros(()), {}
        other, share = partners(y), self._shares(x)
        mixed = _mixed(share, x, x[other])
        logits, heatmaps = self.explained(mixed, y)
        terms = {
            "consistency": (self.normalised(heatmaps) - _mixed(share, maps, maps[other])).abs().mean(),
            "sparsity": maps.mean(),
            "mixed_risk": F.cross_entropy(logits, y),
        }
        total = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))
        return torch.as_tensor(total), {name: term.item() for name, term in terms.items()}

    def _shares(self, x: Tensor) -> Tensor:
        alpha = self.hparams["dre_alpha"]
        return torch.distributions.Beta(alpha, alpha).sample((len(x),)).to(x)


def _mixed(share: Tensor, a: Tensor, b: Tensor) -> Tensor:
    share = share.view(-1, *[1] * (a.ndim - 1))
    return share * a + (1 - share) * b

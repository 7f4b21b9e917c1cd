"""Representation self-challenging."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM


@register
class RSC(ERM):
    """Takes from an image the features that its label rests on most, and learns from what is left.

    A feature is muted if its gradient of the true class's logit is at or above the ``1 - rsc_f_drop_factor`` quantile
    of the image's features. Images whose probability of the true class this lowers least stay whole: all that are
    below the ``1 - rsc_b_drop_factor`` quantile of the step. The loss is the risk on what is left.

    Source: Zeyi Huang, Haohan Wang, Eric P. Xing and Dong Huang, Self-Challenging Improves Cross-Domain
        Generalization, ECCV 2020, https://arxiv.org/abs/2007.02454, Algorithm 1.
    Differs: as DomainBed, features are muted after pooling, one by one (the source also mutes whole channels or
        places of the last map). From DomainBed: a factor of 0 mutes nothing (there the largest is muted even so); the
        masks are made on the device, in any precision; where a value is itself the quantile it is muted (there, in
        float32, the rounding of numpy's version decides).

    Hparams:
        rsc_f_drop_factor: share of an image's features that are muted, in [0, 1].
        rsc_b_drop_factor: share of the images in which they are, in [0, 1].
    """

    HPARAMS = {
        "rsc_f_drop_factor": (1 / 3, lambda r: r.uniform(0, 0.5)),
        "rsc_b_drop_factor": (1 / 3, lambda r: r.uniform(0, 0.5)),
    }
    CONTROL = {"rsc_f_drop_factor": 0.0, "rsc_b_drop_factor": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        for name in RSC.HPARAMS:
            if not 0 <= hparams[name] <= 1:
                raise ValueError(f"hparam {name} is {hparams[name]}; it is a share, give a number in [0, 1]")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features = self.featurizer(x)
        loss = F.cross_entropy(self.classifier(features * self._kept(features.detach(), y)), y)
        self.step(loss)
        return {"loss": loss.item()}

    def _kept(self, features: Tensor, y: Tensor) -> Tensor:
        """True on the features (N, D) that stay; found in float32 also under autocast, which would make ties."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32)).requires_grad_()
            logits = self.classifier(features)
            (gradient,) = autograd.grad(_of_label(logits, y).sum(), features)
            kept = _all_but_the_largest(gradient, self.hparams["rsc_f_drop_factor"])
            with torch.no_grad():
                muted = self.classifier(features * kept)
                lost = _of_label(logits.softmax(1), y) - _of_label(muted.softmax(1), y)  # (N,)
        return kept | _all_but_the_largest(lost, self.hparams["rsc_b_drop_factor"])[:, None]


def _of_label(values: Tensor, y: Tensor) -> Tensor:
    """The entries (N,) of values (N, K) in the columns y (N,)."""
    return values.gather(1, y[:, None])[:, 0]


def _all_but_the_largest(values: Tensor, share: float) -> Tensor:
    """True where a value is below the ``1 - share`` quantile of the last dimension; everywhere if the share is 0."""
    if share == 0:
        return torch.ones_like(values, dtype=torch.bool)
    # The quantile lies between two neighbours in order. What is below it is what is below the upper one, to the bit in
    # any precision; torch.quantile rounds, so that a value that is the quantile may come out on either side of it.
    rank = (1 - share) * (values.shape[-1] - 1)
    upper = values.sort(-1).values[..., math.ceil(rank - 1e-9), None]
    return values < upper

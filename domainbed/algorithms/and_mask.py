"""Gradients masked by how far the minibatches agree, and the AND mask."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM


class MaskedERM(ERM):
    """Descends the mean of the minibatches' gradients, each parameter's times a mask of its entries.

    Each masked gradient is divided by its mask's mean, so that few entries step as far as all would. Subclasses have
    the hparam ``tau``, the agreement of signs that an entry needs.
    """

    HPARAMS = {}
    MIN_PARTS = 2

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 <= hparams["tau"] <= 1:
            raise ValueError(f"hparam tau is {hparams['tau']!r}; it is compared with shares, give a number in [0, 1]")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        risks, gradients = [], []
        for x, y in minibatches:  # one forward pass for each: their batch statistics stay apart
            risk = F.cross_entropy(self.predict(x), y)
            gradients.append(autograd.grad(risk, parameters, allow_unused=True))
            risks.append(risk.detach())
        for parameter, of_parts in zip(parameters, zip(*gradients, strict=True), strict=True):
            known = [gradient for gradient in of_parts if gradient is not None]  # none of what the network leaves out
            parameter.grad = self._masked_mean(torch.stack(known)) if known else None
        self.optimizer.step()
        return {"loss": torch.stack(risks).mean().item()}

    def _masked_mean(self, gradients: Tensor) -> Tensor:
        mask = self.gradient_mask(gradients)
        return mask * gradients.mean(0) / (mask.mean() + 1e-10)

    def gradient_mask(self, gradients: Tensor) -> Tensor:
        """Weights in [0, 1] of one parameter's entries (...), from the E minibatches' gradients (E, ...) of it."""
        raise NotImplementedError


def agreement(gradients: Tensor) -> Tensor:
    """In [0, 1], how far the signs of E gradients (E, ...) agree, entry by entry: |their mean|."""
    return gradients.sign().mean(0).abs()


@register
class ANDMask(MaskedERM):
    """Descends where the minibatches' gradients agree: an entry counts if ``|mean_e sign(gradient_e)| >= tau``.

    Adam's moments and weight decay still move the other entries.

    Source: Giambattista Parascandolo, Alexander Neitz, Antonio Orvieto, Luigi Gresele and Bernhard Schoelkopf,
        Learning Explanations That Are Hard to Vary, ICLR 2021, https://arxiv.org/abs/2009.00329, Section 3.
    Differs: as DomainBed, each parameter's gradient is divided by the share of its entries that count. Parameters that
        are frozen or unused are left alone, where DomainBed fails.

    Hparams:
        tau: how far the signs must agree, in [0, 1]; 1: all are equal, 0: every entry counts, as in the mean risk.
    """

    HPARAMS = {"tau": (1.0, lambda r: r.uniform(0.5, 1))}
    CONTROL = {"tau": 0.0}

    def gradient_mask(self, gradients: Tensor) -> Tensor:
        return (agreement(gradients) >= self.hparams["tau"]).to(gradients.dtype)

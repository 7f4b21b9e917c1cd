"""Distributionally robust optimisation without groups: the conditional value at risk of the losses."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM


def worst_share_weights(losses: Tensor, alpha: float) -> Tensor:
    """The q (m,) that maximises ``sum_i q_i losses_i`` over ``sum_i q_i = 1``, ``0 <= q_i <= 1 / (alpha m)``.

    The ``alpha m`` largest of the losses (m,) weigh alike, and the one at the boundary by the fraction that is left;
    of equal losses the earlier ones come first. Below one whole loss it is the largest that counts.
    """
    whole = max(alpha * len(losses), 1.0)
    order = losses.argsort(descending=True, stable=True)
    rank = torch.empty_like(losses).scatter_(0, order, torch.arange(len(losses)).to(losses))
    return (whole - rank).clamp(0, 1) / whole


@register
class CVaR_DRO(ERM):
    """Minimises the mean of the worst share alpha of the losses: ``max_q sum_i q_i l_i``, ``q_i <= 1 / (alpha m)``.

    l_i is the cross-entropy of image i of the m of a step, in all minibatches; q is a constant for the gradient. With
    alpha m < 1 it is the largest loss, with alpha 1 (the control) the mean.

    Annotations: none in training; validation confounders for selection only.

    Source: Daniel Levy, Yair Carmon, John C. Duchi and Aaron Sidford, Large-Scale Methods for Distributionally Robust
        Optimization, NeurIPS 2020, https://arxiv.org/abs/2010.05893, the CVaR objective and its minibatch estimator.
    Differs: the sample is the step's, thus of the partition that is trained on, where the source draws from all
        examples alike (here partition ``random``). Adam, steps and learning rate are DomainBed's.

    Hparams:
        cvar_alpha: the share, in (0, 1].
    """

    HPARAMS = {"cvar_alpha": (0.1, lambda r: 10 ** r.uniform(-2, 0))}
    CONTROL = {"cvar_alpha": 1.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 < hparams["cvar_alpha"] <= 1:
            raise ValueError(f"cvar_alpha {hparams['cvar_alpha']}: give a share of the losses, above 0 and at most 1")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        losses = F.cross_entropy(self.predict(x), y, reduction="none")
        loss = (worst_share_weights(losses.detach(), self.hparams["cvar_alpha"]) * losses).sum()
        self.step(loss)
        return {"loss": loss.item(), "risk": losses.mean().item()}

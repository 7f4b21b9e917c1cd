"""Spectral decoupling."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM


@register
class SD(ERM):
    """Keeps logits small, so that easy features don't starve the others: ``risk + sd_reg * mean of logits^2``.

    The mean is over all images of a step and all classes. The reported ``loss`` is the risk without the penalty, as
    in DomainBed.

    Source: Mohammad Pezeshki, Sekou-Oumar Kaba, Yoshua Bengio, Aaron Courville, Doina Precup and Guillaume Lajoie,
        Gradient Starvation: A Learning Proclivity in Neural Networks, NeurIPS 2021,
        https://arxiv.org/abs/2011.09468.
    Differs: as DomainBed, the mean of the squares over images and classes, where the source halves their sum.

    Hparams:
        sd_reg: weight of the penalty.
    """

    HPARAMS = {"sd_reg": (0.1, lambda r: 10 ** r.uniform(-5, -1))}
    CONTROL = {"sd_reg": 0.0}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        logits = self.predict(x)
        risk = F.cross_entropy(logits, y)
        penalty = F.mse_loss(logits, torch.zeros_like(logits))
        self.step(risk + self.hparams["sd_reg"] * penalty)
        return {"loss": risk.item(), "penalty": penalty.item()}

"""Mixup across minibatches."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM
from domainbed.lib.misc import random_pairs_of_minibatches


@register
class Mixup(ERM):
    """Trains on ``t * x_i + (1 - t) * x_j`` for pairs of minibatches, with both labels' risks mixed alike.

    One ``t ~ Beta(alpha, alpha)`` per pair (from numpy's global generator), one pair per minibatch.

    Source: Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin and David Lopez-Paz, mixup: Beyond Empirical Risk
        Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412; between domains: Shen Yan, Huan Song, Nanxiang Li,
        Lincan Zou and Liu Ren, Improve Unsupervised Domain Adaptation with Mixup Training, 2020,
        https://arxiv.org/abs/2001.00677.
    Differs: the first source mixes within a batch, this one mixes minibatches of different parts, as DomainBed does.

    Hparams:
        mixup_alpha: towards 0 nothing is mixed, towards infinity all is halved.
    """

    HPARAMS = {"mixup_alpha": (0.2, lambda r: 10 ** r.uniform(-1, 1))}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risks = []
        for (x1, y1), (x2, y2) in random_pairs_of_minibatches(minibatches):
            t = np.random.beta(self.hparams["mixup_alpha"], self.hparams["mixup_alpha"])
            logits = self.predict(t * x1 + (1 - t) * x2)
            risks.append(t * F.cross_entropy(logits, y1) + (1 - t) * F.cross_entropy(logits, y2))
        loss = torch.stack(risks).mean()
        self.step(loss)
        return {"loss": loss.item()}

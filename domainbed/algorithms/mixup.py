"""Mixup, across minibatches and within a step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.explained import check_not_negative
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


@register
class InBatchMixup(ERM):
    """Trains on ``t * x_i + (1 - t) * x_p(i)`` for a permutation p of a step's images, both labels' risks alike.

    One ``t ~ Beta(alpha, alpha)`` for each step, of numpy's global generator; p is of torch's.

    Annotations: none in training; validation confounders for selection only.

    Source: Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin and David Lopez-Paz, mixup: Beyond Empirical Risk
        Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412.
    Differs: a step's images are those of all its minibatches, drawn as the partition has it. ``Mixup`` is the one that
        mixes whole minibatches with one another.

    Hparams:
        mixup_alpha: not negative; towards 0 less is mixed, at 0 nothing, towards infinity all is halved.
    """

    HPARAMS = {"mixup_alpha": (0.2, lambda r: 10 ** r.uniform(-1, 1))}
    CONTROL = {"mixup_alpha": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, "mixup_alpha")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        alpha = self.hparams["mixup_alpha"]
        if alpha == 0:
            return super().update(minibatches, unlabeled)
        x, y = concatenate(minibatches)
        t, order = np.random.beta(alpha, alpha), torch.randperm(len(y)).to(y.device)
        logits = self.predict(t * x + (1 - t) * x[order])
        loss = t * F.cross_entropy(logits, y) + (1 - t) * F.cross_entropy(logits, y[order])
        self.step(loss)
        return {"loss": loss.item()}


def mixed(share: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``share * a + (1 - share) * b`` of a and b (B, ...), with a share (B,) for each of the rows."""
    share = share.view(-1, *[1] * (a.ndim - 1))
    return share * a + (1 - share) * b

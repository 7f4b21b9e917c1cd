"""Invariant causal mechanisms: two random mixtures of the minibatches look alike in feature space."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.mmd import AbstractMMD


class AbstractCausIRL(AbstractMMD):
    """``mean_e risk_e + mmd_gamma * distance(first, second)`` of the features of two random shares of the step.

    Every minibatch of n rows is cut at a row drawn uniformly from 0 to n - 1 (numpy's global generator); what comes
    before the cuts is ``first``, the rest is ``second``. Both mix all minibatches, in proportions that change with
    every update, so one distance stands for those between all pairs of domains; it also works with one minibatch.
    Where a share has fewer than two rows there is no penalty. The reported ``loss`` is the mean risk without it.

    Source: Mathieu Chevalley, Charlotte Bunne, Andreas Krause and Stefan Bauer, Invariant Causal Mechanisms through
        Distribution Matching, 2022, https://arxiv.org/abs/2206.11646.
    Differs: a penalty that is not finite shows as such (DomainBed reports 0 or the largest float in its place). Under
        autocast the distance is that of float32.

    Args:
        gaussian: the distance is the kernel's (MMD), else that of means and covariances (CORAL).

    Hparams:
        mmd_gamma: weight of the penalty.
    """

    HPARAMS = {}
    MIN_PARTS = 1

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        features = [self.featurizer(x) for x, _ in minibatches]
        risks = [F.cross_entropy(self.classifier(f), y) for f, (_, y) in zip(features, minibatches, strict=True)]
        risk = torch.stack(risks).mean()
        shares = [(f[:cut], f[cut:]) for f in features for cut in [np.random.randint(len(f))]]
        first, second = (torch.cat(share) for share in zip(*shares, strict=True))
        penalty = self.mmd(first, second) if min(len(first), len(second)) > 1 else torch.zeros_like(risk)
        self.step(risk + self.hparams["mmd_gamma"] * penalty)
        return {"loss": risk.item(), "penalty": penalty.item()}


@register
class CausIRL_MMD(AbstractCausIRL):
    """AbstractCausIRL under MMD's sum of Gaussian kernels."""

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=True)


@register
class CausIRL_CORAL(AbstractCausIRL):
    """AbstractCausIRL under CORAL's difference of means and covariances."""

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=False)

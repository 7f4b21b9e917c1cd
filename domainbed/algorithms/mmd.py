"""Matching the distributions of features: maximum mean discrepancy and CORAL."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM

GAMMAS = (1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)  # from wide to narrow kernels


class AbstractMMD(ERM):
    """``mean_e risk_e + mmd_gamma * mean over pairs of minibatches of a distance of their features``.

    The reported ``loss`` is the mean risk without the penalty, as in DomainBed.

    Args:
        gaussian: the distance is the kernel's (MMD), else that of means and covariances (CORAL).
    """

    HPARAMS = {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))}
    CONTROL = {"mmd_gamma": 0.0}
    MIN_PARTS = 2

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        gaussian: bool,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.gaussian = gaussian

    def my_cdist(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Squared distances (B1, B2), at least 1e-30, of the rows of x1 (B1, D) and x2 (B2, D)."""
        squares = x1.square().sum(1)[:, None] + x2.square().sum(1)
        return (squares - 2 * x1 @ x2.T).clamp_min(1e-30)

    def gaussian_kernel(self, x: Tensor, y: Tensor, gamma: Sequence[float] = GAMMAS) -> Tensor:
        """Kernel matrix (B1, B2): the sum of ``exp(-g * squared distance)`` over g in gamma."""
        distances = self.my_cdist(x, y)
        return torch.stack([torch.exp(-g * distances) for g in gamma]).sum(0)

    def mmd(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar distance of the features x (B1, D) and y (B2, D), in float32 also under autocast.

        It is a small difference of large products, which bfloat16 would round away.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._distance(x, y) if x.dtype == torch.float64 else self._distance(x.float(), y.float())

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        if self.gaussian:
            within = self.gaussian_kernel(x, x).mean() + self.gaussian_kernel(y, y).mean()
            return within - 2 * self.gaussian_kernel(x, y).mean()
        means = (x.mean(0) - y.mean(0)).square().mean()
        return means + (torch.cov(x.T) - torch.cov(y.T)).square().mean()

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        features = [self.featurizer(x) for x, _ in minibatches]
        risks = [F.cross_entropy(self.classifier(f), y) for f, (_, y) in zip(features, minibatches, strict=True)]
        risk = torch.stack(risks).mean()
        distances = [self.mmd(f1, f2) for f1, f2 in combinations(features, 2)]
        penalty = torch.stack(distances).mean() if distances else torch.zeros_like(risk)
        self.step(risk + self.hparams["mmd_gamma"] * penalty)
        return {"loss": risk.item(), "penalty": penalty.item()}


@register
class MMD(AbstractMMD):
    """Features alike under a sum of Gaussian kernels: ``mean K(x, x) + mean K(y, y) - 2 mean K(x, y)`` per pair.

    Source: Haoliang Li, Sinno Jialin Pan, Shiqi Wang and Alex C. Kot, Domain Generalization with Adversarial Feature
        Learning, CVPR 2018,
        https://openaccess.thecvf.com/content_cvpr_2018/html/Li_Domain_Generalization_With_CVPR_2018_paper.html; the
        distance: Arthur Gretton et al., A Kernel Two-Sample Test, JMLR 2012, https://jmlr.org/papers/v13/gretton12a.html.
    Differs: as DomainBed, only the first source's MMD, without its autoencoder and adversarial prior; the biased
        estimate, diagonals included; seven fixed widths.

    Hparams:
        mmd_gamma: weight of the penalty.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=True)


@register
class CORAL(AbstractMMD):
    """Features alike in mean and covariance: mean squared difference of the D means plus that of the D x D entries.

    Source: Baochen Sun and Kate Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, 2016,
        https://arxiv.org/abs/1607.01719.
    Differs: as DomainBed, the means are matched too and the covariances' term is 4 times the source's; every pair of
        training minibatches is compared, where the source compares a source and a target domain.

    Hparams:
        mmd_gamma: weight of the penalty.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=False)

"""Empirical quantile risk minimisation, and the quantile of a kernel density."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, make_optimizer, register
from domainbed.algorithms.erm import ERM

BISECTIONS = 32


class Distribution(Protocol):
    """A distribution of risks that is estimated from some and gives quantiles."""

    def estimate_parameters(self, x: Tensor) -> None:
        """Fits risks (E,)."""

    def icdf(self, q: Tensor) -> Tensor:
        """The quantile of probability q, from which a gradient reaches the risks."""


def kernel_quantile(values: Tensor, q: Tensor) -> Tensor:
    """The quantile of a kernel density: ``mean_i Normal(value_i, h)``, with ``h = 1.06 * std * E ** -0.2``.

    It is found by halving the span between the quantiles of the least and the greatest value's kernels. The gradient
    is that of the point that divides this span in the same ratio; it is not the quantile's own derivative.

    Args:
        values: (E,), at least two.
        q: float64 scalar, a probability in (0, 1); or log(1 - probability) < 0 for one so near to 1 that floats
            don't tell it from 1: then the result is ``mean(values) + h * sqrt(-2 q)``.

    Returns:
        float64 scalar.
    """
    values = values.double()
    width = 1.06 * values.std() * len(values) ** -0.2
    if q < 0:
        return values.mean() + width * (-2 * q).sqrt()
    reach = width * torch.special.ndtri(q)
    low, high = values.min() + reach, values.max() + reach
    share = _share(values.detach(), width.detach(), q, low.detach(), high.detach())
    return (1 - share) * low + share * high


def _share(values: Tensor, width: Tensor, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far from low to high the quantile is, in [0, 1]; a scalar without gradient."""
    share = torch.full_like(q, 0.5)
    for halving in range(BISECTIONS):
        point = low + share * (high - low)
        # Without a width the span is a point, and any share will do.
        above = torch.special.ndtr((point - values) / width).mean() > q
        share = share + torch.where(above, -1.0, 1.0) * 0.5 ** (halving + 2)
    return share


@register
class EQRM(ERM):
    """Minimises a quantile of the minibatches' risks, after some updates on their mean: ``quantile_alpha(risk_e)``.

    The risks are taken for draws from a distribution of risks over all environments, so that the quantile bounds the
    risk of a new one with probability alpha. The distribution is a kernel density; see ``kernel_quantile``.

    Args:
        dist: another distribution of the risks than the kernel density.

    Source: Cian Eastwood, Alexander Robey, Shashank Singh, Julius von Kuegelgen, Hamed Hassani, George J. Pappas and
        Bernhard Schoelkopf, Probable Domain Generalization via Quantile Risk Minimization, NeurIPS 2022,
        https://arxiv.org/abs/2207.09944, Algorithm 1.
    Differs: as DomainBed, the gradient is that of the bisection's span, which reaches the least and the greatest risk,
        and the others through the width only. The optimizer starts afresh with ``eqrm_lr`` at the first quantile; in
        DomainBed a drawn number of updates is no whole number and this never happens. Equal risks have themselves as
        quantile, where DomainBed fails.

    Hparams:
        eqrm_quantile: alpha in (0, 1); or log(1 - alpha) < 0.
        eqrm_burnin_iters: updates on the mean risk; rounded up if it is no whole number.
        eqrm_lr: learning rate from then on.
    """

    HPARAMS = {
        "eqrm_quantile": (0.75, lambda r: r.uniform(0.5, 0.99)),
        "eqrm_burnin_iters": (2500.0, lambda r: 10 ** r.uniform(2.5, 3.5)),
        "eqrm_lr": (1e-6, lambda r: 10 ** r.uniform(-7, -5)),
    }
    MIN_PARTS = 2

    update_count: Tensor
    alpha: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        dist: Distribution | None = None,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        alpha = hparams["eqrm_quantile"]
        if alpha == 0 or not alpha < 1:
            raise ValueError(
                f"hparam eqrm_quantile is {alpha!r}; give a probability in (0, 1), or log(1 - probability) below 0"
            )
        self.register_buffer("update_count", torch.tensor([0]))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self.dist = dist

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risks = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches])  # (E,)
        updates, switch = int(self.update_count), math.ceil(self.hparams["eqrm_burnin_iters"])
        loss = risks.mean() if updates < switch else self._quantile(risks)
        if updates == switch:
            self.optimizer = self._second_optimizer()
        self.step(loss)
        self.update_count += 1
        return {"loss": loss.item()}

    def _second_optimizer(self) -> torch.optim.Optimizer:
        rates = self.hparams["eqrm_lr"], self.hparams["weight_decay"]
        return make_optimizer(self.network.parameters(), *rates, self.hparams)

    def _quantile(self, risks: Tensor) -> Tensor:
        if self.dist is None:
            return kernel_quantile(risks, self.alpha)
        self.dist.estimate_parameters(risks)
        return self.dist.icdf(self.alpha)

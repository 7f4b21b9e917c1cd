"""Empirical quantile risk minimisation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, make_optimizer, register
from domainbed.algorithms.erm import ERM
from domainbed.lib.distributions import Distribution1D, Nonparametric


@register
class EQRM(ERM):
    """Minimises a quantile of the minibatches' risks, after some updates on their mean: ``quantile_alpha(risk_e)``.

    The risks are taken for draws from a distribution of risks over all environments, so that the quantile bounds the
    risk of a new one with probability alpha. The distribution is a kernel density; see ``Nonparametric``.

    Args:
        dist: another distribution of the risks; it needs the two methods of ``Distribution1D`` only.

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
        dist: Distribution1D | None = None,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        alpha = hparams["eqrm_quantile"]
        if alpha == 0 or not alpha < 1:
            raise ValueError(
                f"hparam eqrm_quantile is {alpha!r}; give a probability in (0, 1), or log(1 - probability) below 0"
            )
        self.register_buffer("update_count", torch.tensor([0]))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self.dist = Nonparametric() if dist is None else dist

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risks = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches])  # (E,)
        updates, switch = int(self.update_count), math.ceil(self.hparams["eqrm_burnin_iters"])
        loss = risks.mean() if updates < switch else self._quantile(risks)
        if updates == switch:
            self.optimizer = self._second_optimizer()
        self.step(loss)
        self._forget_graph()
        self.update_count += 1
        return {"loss": loss.item()}

    def _second_optimizer(self) -> torch.optim.Optimizer:
        rates = self.hparams["eqrm_lr"], self.hparams["weight_decay"]
        return make_optimizer(self.network.parameters(), *rates, self.hparams)

    def _quantile(self, risks: Tensor) -> Tensor:
        self.dist.estimate_parameters(risks)
        return self.dist.icdf(self.alpha)

    def _forget_graph(self) -> None:
        """Cuts what the distribution keeps from the update's graph, which would live on and can't be deep-copied."""
        attributes = getattr(self.dist, "__dict__", {})
        kept = {name: value for name, value in attributes.items() if isinstance(value, Tensor)}
        attributes.update({name: value.detach() for name, value in kept.items() if value.grad_fn is not None})

"""Inter-environmental gradient alignment."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM


@register
class IGA(ERM):
    """Asks for equal gradients: ``mean_e risk_e + penalty * sum_e |gradient_e - mean_e gradient_e|^2``.

    ``gradient_e`` is that of ``risk_e`` by all weights. The reported ``loss`` is the mean risk without the penalty.

    Source: Masanori Koyama and Shoichiro Yamaguchi, When Is Invariance Useful in an Out-of-Distribution Generalization
        Problem?, 2020, https://arxiv.org/abs/2008.01883; first called Out-of-Distribution Generalization with Maximal
        Invariant Predictor.
    Differs: as DomainBed, the penalty is E times the source's trace of the gradients' variance. Parameters that are
        frozen or unused are left out, where DomainBed fails.

    Hparams:
        penalty: weight of the gradients' squared distances; with the optimizer sgd the default diverges, take less.
    """

    HPARAMS = {"penalty": (1000.0, lambda r: 10 ** r.uniform(1, 5))}
    CONTROL = {"penalty": 0.0}
    MIN_PARTS = 2

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risks = [F.cross_entropy(self.predict(x), y) for x, y in minibatches]
        risk, penalty = torch.stack(risks).mean(), self._penalty(risks)
        self.step(risk + self.hparams["penalty"] * penalty)
        return {"loss": risk.item(), "penalty": penalty.item()}

    def _penalty(self, risks: Sequence[Tensor]) -> Tensor:
        """Scalar: the squared distances of the risks' gradients from their mean, summed."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        gradients = [autograd.grad(risk, parameters, create_graph=True, allow_unused=True) for risk in risks]
        total = torch.zeros_like(risks[0])
        for of_parts in zip(*gradients, strict=True):
            known = [gradient for gradient in of_parts if gradient is not None]
            if known:
                stacked = torch.stack(known)
                # The distances don't change with their mean to first order: it can be a constant.
                total = total + (stacked - stacked.detach().mean(0)).square().sum()
        return total

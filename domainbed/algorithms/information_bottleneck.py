"""Invariance and the information bottleneck: features that tell little about the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import AnnealedERM
from domainbed.algorithms.irm import IRM


@register
class IB_ERM(AnnealedERM):
    """Asks for features that vary little: ``mean_e risk_e + lambda * mean_e variance_e``.

    ``variance_e`` is the variance of a feature over minibatch e (divided by B - 1), averaged over the features: with
    it the entropy of features falls, and with that what they tell of the image.

    Source: Kartik Ahuja, Ethan Caballero, Dinghuai Zhang, Jean-Christophe Gagnon-Audet, Yoshua Bengio, Ioannis
        Mitliagkas and Irina Rish, Invariance Principle Meets Information Bottleneck for Out-of-Distribution
        Generalization, NeurIPS 2021, https://arxiv.org/abs/2106.06607.
    Differs: the weight is annealed and the optimizer restarted as in DomainBed. The reported ``nll`` is the mean risk;
        DomainBed reports the loss under both names.

    Hparams:
        ib_lambda: weight of the variance after annealing.
        ib_penalty_anneal_iters: updates with weight 0; then the optimizer starts afresh.
    """

    HPARAMS = {
        "ib_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 5)),
        "ib_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    }
    CONTROL = {"ib_lambda": 0.0, "ib_penalty_anneal_iters": 0}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        nll, bottleneck, _ = self._terms(minibatches)
        loss = nll + self._bottleneck_weight() * bottleneck
        self.step(loss)
        return {"loss": loss.item(), "nll": nll.item(), "IB_penalty": bottleneck.item()}

    def _bottleneck_weight(self) -> float:
        """The weight in this update; as ``penalty_weight``, but 0 at first."""
        weight = self.penalty_weight("ib")
        return weight if int(self.update_count) >= self.hparams["ib_penalty_anneal_iters"] else 0.0

    def _terms(self, minibatches: Minibatches) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The mean risk, the mean variance, and the logits (B, K) of each minibatch."""
        sizes = [len(y) for _, y in minibatches]
        if min(sizes) < 2:
            raise ValueError(
                f"{type(self).__name__} takes the features' variance in each minibatch, so each needs 2 rows; got the "
                f"sizes {sizes}; raise batch_size or choose a --partition with larger parts"
            )
        x, y = concatenate(minibatches)
        features = self.featurizer(x)
        logits = list(self.classifier(features).split(sizes))
        nll = torch.stack([F.cross_entropy(z, k) for z, k in zip(logits, y.split(sizes), strict=True)]).mean()
        wide = features.to(torch.promote_types(features.dtype, torch.float32))  # autocast's bfloat16 would round it
        bottleneck = torch.stack([part.var(0).mean() for part in wide.split(sizes)]).mean()
        return nll, bottleneck, logits


@register
class IB_IRM(IB_ERM):
    """IB_ERM that also asks for one optimal classifier: ``+ irm_lambda * mean_e penalty_e``, IRM's penalty.

    Source: as IB_ERM; the penalty: Martin Arjovsky et al., Invariant Risk Minimization, 2019,
        https://arxiv.org/abs/1907.02893.
    Differs: as IB_ERM and IRM.

    Hparams:
        irm_lambda, irm_penalty_anneal_iters: of IRM's penalty, whose weight is 1 at first; see IRM.
        ib_lambda, ib_penalty_anneal_iters: of the variance; see IB_ERM.
    """

    HPARAMS = IRM.HPARAMS  # and IB_ERM's
    CONTROL = {"ib_lambda": 0.0, "ib_penalty_anneal_iters": 0, "irm_lambda": 0.0, "irm_penalty_anneal_iters": 0}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        nll, bottleneck, logits = self._terms(minibatches)
        penalties = [IRM._irm_penalty(z, y) for z, (_, y) in zip(logits, minibatches, strict=True)]
        penalty = torch.stack(penalties).mean()
        loss = nll + self.penalty_weight("irm") * penalty + self._bottleneck_weight() * bottleneck
        self.step(loss)
        return {
            "loss": loss.item(),
            "nll": nll.item(),
            "IRM_penalty": penalty.item(),
            "IB_penalty": bottleneck.item(),
        }

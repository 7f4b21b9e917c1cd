"""Variance risk extrapolation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import AnnealedERM


@register
class VREx(AnnealedERM):
    """Asks for equal risks: ``mean_e risk_e + lambda * variance_e risk_e`` (population variance, divided by E).

    Source: David Krueger, Ethan Caballero, Joern-Henrik Jacobsen, Amy Zhang, Jonathan Binas, Dinghuai Zhang,
        Remi Le Priol and Aaron Courville, Out-of-Distribution Generalization via Risk Extrapolation, ICML 2021,
        https://arxiv.org/abs/2003.00688, V-REx.
    Differs: the mean of the risks where the source has their sum. The reported ``nll`` is the mean risk; DomainBed
        reports the last environment's.

    Hparams:
        vrex_lambda: weight of the variance after annealing.
        vrex_penalty_anneal_iters: updates with weight 1; then the optimizer starts afresh.
    """

    HPARAMS = {
        "vrex_lambda": (10.0, lambda r: 10 ** r.uniform(-1, 5)),
        "vrex_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    }
    CONTROL = {"vrex_lambda": 0.0, "vrex_penalty_anneal_iters": 0}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        sizes = [len(labels) for _, labels in minibatches]
        parts = zip(self.predict(x).split(sizes), y.split(sizes), strict=True)
        risk = torch.stack([F.cross_entropy(logits, labels) for logits, labels in parts])  # (E,)
        penalty = risk.var(correction=0)
        loss = risk.mean() + self.penalty_weight("vrex") * penalty
        self.step(loss)
        return {"loss": loss.item(), "nll": risk.mean().item(), "penalty": penalty.item()}

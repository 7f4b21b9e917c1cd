"""Invariant risk minimisation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import AnnealedERM


@register
class IRM(AnnealedERM):
    """Asks that one classifier be optimal in every minibatch: ``mean_e risk_e + lambda * mean_e penalty_e``.

    ``penalty_e`` estimates the squared derivative of ``risk_e(s * logits)`` by the scalar s at s = 1. It is the
    product of the derivatives over the even and over the odd rows, two independent samples, so it has no bias (and
    may be negative).

    Source: Martin Arjovsky, Leon Bottou, Ishaan Gulrajani and David Lopez-Paz, Invariant Risk Minimization, 2019,
        https://arxiv.org/abs/1907.02893, IRMv1 and its unbiased estimate in the appendix.
    Differs: the weight is annealed and the optimizer restarted as in DomainBed; the loss is not divided by a large
        weight.

    Hparams:
        irm_lambda: weight of the penalty after annealing.
        irm_penalty_anneal_iters: updates with weight 1.
    """

    HPARAMS = {
        "irm_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 5)),
        "irm_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    }
    CONTROL = {"irm_lambda": 0.0, "irm_penalty_anneal_iters": 0}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        sizes = [len(y) for _, y in minibatches]
        if min(sizes) < 2:
            raise ValueError(
                f"IRM splits each minibatch into even and odd rows, so each needs 2 rows; got the sizes {sizes}; "
                "raise batch_size or choose a --partition with larger parts"
            )
        x, y = concatenate(minibatches)
        parts = list(zip(self.predict(x).split(sizes), y.split(sizes), strict=True))
        nll = torch.stack([F.cross_entropy(logits, labels) for logits, labels in parts]).mean()
        penalty = torch.stack([self._irm_penalty(logits, labels) for logits, labels in parts]).mean()
        loss = nll + self.penalty_weight("irm") * penalty
        self.step(loss)
        return {"loss": loss.item(), "nll": nll.item(), "penalty": penalty.item()}

    @staticmethod
    def _irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
        """Scalar penalty of one minibatch, logits (B, K), y (B,)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's bfloat16 would round it
        # d/ds cross_entropy(s * z, y) at s = 1 is sum_k (p_k - [k = y]) z_k: no second pass of autograd is needed.
        error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
        slope = (error * logits).sum(1)  # (B,)
        return slope[::2].mean() * slope[1::2].mean()

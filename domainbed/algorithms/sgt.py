"""Saliency guided training: what the score hardly depends on may as well be noise."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.explained import check_choices, check_not_negative
from domainbed.feature_maps import evaluating, target_logit

REPLACEMENTS = ("uniform", "mean")


@register
class SGT(ERM):
    """ERM that predicts the same of an image and of one whose least salient pixels are replaced.

    ``L = CE(f(x), y) + sgt_lambda KL(f(x) || f(x~))``

    The divergence is ``sum_k p_k(x) (log p_k(x) - log p_k(x~))`` in nats, a mean over the images; its gradient trains
    both f(x) and f(x~). x~ is x with floor(sgt_k Z) of its Z pixels replaced: those where the logit of the label
    depends on the image the least, by the mean over the channels of d logit_y / dx, without its sign. That gradient
    is taken in evaluation mode and is a constant; f(x) and f(x~) are two passes in training mode. Of equally salient
    pixels the earlier ones are replaced. Vectors (B, D) have D pixels of one channel. With sgt_lambda 0 nothing of
    this is computed, so that the control is ERM, batch statistics and random draws included.

    Source: Ismail, Corrada Bravo and Feizi 2021, Improving Deep Learning Interpretability by Saliency Guided Training,
        NeurIPS, https://arxiv.org/abs/2111.14338; the direction of the divergence, its gradient and the modes
        as in the script published with it.
    Differs: pixels are ranked without the gradient's sign, which is the script's option (here ``sgt_signed``); all
        channels of a pixel are replaced, each by a draw of its own; "mean" is the image's mean. Range of sgt_lambda,
        which the script lacks, and of sgt_k: ours. Adam, steps and learning rate are DomainBed's.

    Hparams:
        sgt_lambda: weight of the divergence, not negative.
        sgt_k: fraction of the pixels that are replaced, in (0, 1).
        sgt_fill: what replaces them: "uniform" draws between the image's smallest and largest value, over all channels,
            from torch's global generator; or the image's "mean" over pixels and channels.
        sgt_signed: rank by the gradient itself, so that what speaks against the label goes first.
    """

    HPARAMS = {
        "sgt_lambda": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "sgt_k": (0.5, lambda r: r.uniform(0.1, 0.7)),
        "sgt_fill": ("uniform", lambda r: "uniform"),
        "sgt_signed": (False, lambda r: False),
    }
    CONTROL = {"sgt_lambda": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 < hparams["sgt_k"] < 1:
            raise ValueError(f"sgt_k {hparams['sgt_k']}: the fraction of pixels to replace must be above 0 and below 1")
        check_not_negative(hparams, "sgt_lambda")
        check_choices(hparams, {"sgt_fill": REPLACEMENTS})

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.hparams["sgt_lambda"] == 0:
            return super().update(minibatches, unlabeled)
        x, y = concatenate(minibatches)
        masked = self.masked(x, y)
        logits = self.predict(x)
        risk, kl = F.cross_entropy(logits, y), divergence(logits, self.predict(masked))
        loss = risk + self.hparams["sgt_lambda"] * kl
        self.step(loss)
        return {"loss": loss.item(), "risk": risk.item(), "kl": kl.item()}

    def masked(self, x: Tensor, y: Tensor) -> Tensor:
        """x~: inputs (B, C, H, W) or (B, D), their least salient pixels for the labels (B,) replaced."""
        saliency = self._saliency(x, y)
        count = int(self.hparams["sgt_k"] * saliency.shape[1])
        least = saliency.argsort(dim=1, stable=True)[:, :count]
        replaced = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, least, True)
        replaced = replaced.view(len(x), 1, *x.shape[2:]) if x.ndim > 2 else replaced
        return torch.where(replaced, self._fill(x), x)

    def _saliency(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, Z): the gradient of the label's logit by which pixels are ranked."""
        x = x.detach().requires_grad_()
        with evaluating(self.network):
            (gradient,) = torch.autograd.grad(target_logit(self.predict(x), y).sum(), x)
        saliency = gradient.mean(1).flatten(1) if x.ndim > 2 else gradient
        return saliency if self.hparams["sgt_signed"] else saliency.abs()

    def _fill(self, x: Tensor) -> Tensor:
        """What stands in for replaced values; broadcasts to x."""
        values = tuple(range(1, x.ndim))
        if self.hparams["sgt_fill"] == "mean":
            return x.mean(values, keepdim=True)
        low, high = x.amin(values, keepdim=True), x.amax(values, keepdim=True)
        return low + (high - low) * torch.rand_like(x)


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Mean of ``KL(p || q)`` in nats, of p and q with logits (B, K); at least float32 also under autocast."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = logits.to(dtype).log_softmax(1), other.to(dtype).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()

"""Contrastive adversarial domain bottlenecks: features whose neighbours tell nothing about their domain."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import (
    Algorithm,
    Minibatches,
    concatenate,
    descend,
    make_optimizer,
    part_numbers,
    register,
)

BASE_TEMPERATURE = 0.07


class AbstractCAD(Algorithm):
    """``risk + lmbda * bottleneck``, where the bottleneck asks each image for neighbours in other minibatches.

    Let ``s_ij = z_i . z_j / temperature`` and ``share_i`` be the sum of ``exp(s_ij)`` over the targets j of image i,
    divided by that over its pool. The bottleneck is the mean over i of ``-(temperature / 0.07) * log share_i`` with
    the other minibatches as targets, or, unflipped, of ``+(temperature / 0.07) * log share_i`` with i's own. No image
    is in its own pool. Images without a target are left out; if none is left the bottleneck is 0.

    Source: Yangjun Ruan, Yann Dubois and Chris J. Maddison, Optimal Representations for Covariate Shift, ICLR 2022,
        https://arxiv.org/abs/2201.00057.
    Differs: as DomainBed, supervised risk in place of the source's self-supervised ones, and the factor
        temperature / 0.07. DomainBed's ``is_project`` ends in a NameError, here it works. DomainBed's unflipped CAD
        counts an image, with similarity 0, among its own targets but not in its pool, so that a share may exceed 1;
        here it is in neither. Under autocast the bottleneck is that of float32.

    Args:
        is_conditional: the pool are the images of the same class, else all others.

    Hparams:
        lmbda: weight of the bottleneck.
        temperature: of the similarities, above 0.
        is_normalized: similarities are cosines.
        is_project: similarities are those of a learned projection of the features, (D,) -> (128,).
        is_flipped: raise the share of the other minibatches, in place of lowering that of the own one.
    """

    HPARAMS = {
        "lmbda": (0.1, lambda r: r.choice([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2])),
        "temperature": (0.1, lambda r: r.choice([0.05, 0.1])),
        "is_normalized": (False, lambda r: False),
        "is_project": (False, lambda r: False),
        "is_flipped": (True, lambda r: True),
    }
    CONTROL = {"lmbda": 0.0}
    MIN_PARTS = 2

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        is_conditional: bool,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["temperature"] <= 0:
            raise ValueError(f"hparam temperature is {hparams['temperature']}; take a number above 0, such as 0.1")
        self.is_conditional = is_conditional
        self.featurizer = networks.Featurizer(input_shape, hparams)
        width = self.featurizer.n_outputs
        self.classifier = networks.Classifier(width, num_classes, hparams["nonlinear_classifier"])
        if hparams["is_project"]:
            self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
        self.optimizer = make_optimizer(self.parameters(), hparams["lr"], hparams["weight_decay"], hparams)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        parts = part_numbers(minibatches)
        features = self.featurizer(x)
        bottleneck = self.bn_loss(features, y, parts)
        risk = F.cross_entropy(self.classifier(features), y)
        loss = risk + self.hparams["lmbda"] * bottleneck
        descend(loss, self.optimizer)
        return {"clf_loss": risk.item(), "bn_loss": bottleneck.item(), "total_loss": loss.item()}

    def bn_loss(self, z: Tensor, y: Tensor, dom_labels: Tensor) -> Tensor:
        """Scalar bottleneck of features z (N, D) with labels y (N,) from the minibatches dom_labels (N,)."""
        flipped, temperature = self.hparams["is_flipped"], self.hparams["temperature"]
        similarity = self._similarity(z) / temperature
        others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
        same_class = (y[:, None] == y) & others
        same_part = dom_labels[:, None] == dom_labels
        pool = same_class if self.is_conditional else others
        targets = pool & (same_part != flipped)
        kept = targets.any(1) & same_class.any(1)
        if not kept.any():
            return similarity.new_zeros(())
        log_share = _masked_logsumexp(similarity[kept], targets[kept]) - _masked_logsumexp(similarity[kept], pool[kept])
        return (-1 if flipped else 1) * temperature / BASE_TEMPERATURE * log_share.mean()

    def _similarity(self, z: Tensor) -> Tensor:
        """Scalar products (N, N), which bfloat16 would round too much for a low temperature."""
        if self.hparams["is_project"]:
            z = self.project(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z if z.dtype == torch.float64 else z.float()
            z = F.normalize(z, dim=1) if self.hparams["is_normalized"] else z
            return z @ z.T

    def predict(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp over each row's True entries, of which it has at least one; (R, N) -> (R,)."""
    return values.masked_fill(~mask, -torch.inf).logsumexp(1)


@register
class CAD(AbstractCAD):
    """Neighbours of all classes tell nothing about the minibatch; see AbstractCAD for loss and hparams.

    Differs: as DomainBed, images whose class occurs once in the step are left out of the bottleneck, though it does
        not read the class otherwise.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, is_conditional=False)


@register
class CondCAD(AbstractCAD):
    """Given the class, neighbours tell nothing about the minibatch; see AbstractCAD for loss and hparams."""

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, is_conditional=True)

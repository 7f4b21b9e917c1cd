"""Self-supervised contrastive regularisation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed.algorithms.base import Minibatches, concatenate, register
from domainbed.algorithms.erm import ERM

FEATURE_WEIGHT = 0.3  # of the features' distances beside the logits'


@register
class SelfReg(ERM):
    """Draws images of one class together: ``risk + min(risk, 1) * (t * individual + (1 - t) * mixed)``.

    With i and j two partners of each image, drawn from the images of its class in the step, z logits, f features, p
    the projected features ``cdpl(f)`` and mse the mean over images and entries:
    individual = ``mse(z, z_i) + 0.3 mse(f, p_i)``,
    mixed = ``mse(z, t z_i + (1 - t) z_j) + 0.3 mse(f, t p_i + (1 - t) p_j)``,
    with one ``t ~ Beta(1/2, 1/2)`` for the step (from numpy's global generator). ``min(risk, 1)`` is a constant.

    Source: Daehee Kim, Youngjun Yoo, Seunghyun Park, Jinkyu Kim and Jaekoo Lee, SelfReg: Self-supervised Contrastive
        Regularization for Domain Generalization, ICCV 2021, https://arxiv.org/abs/2104.09841.
    Differs: as DomainBed, without the source's stochastic weight averaging, gradient stabilisation and curriculum of
        domains. From DomainBed: the projection ``cdpl`` is trained, as in the source; there the optimizer does not
        know it. Classes are those that occur, whatever their numbers. Equal labels keep their order; there it depends
        on the machine's sort.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        width = self.featurizer.n_outputs
        hidden = width if width == 2048 else 2 * width
        self.cdpl = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
            nn.BatchNorm1d(width),
        )
        self.optimizer.add_param_group({"params": list(self.cdpl.parameters())})

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        t = np.random.beta(0.5, 0.5)
        x, y = concatenate(minibatches)
        if len(y) < 2:
            raise ValueError("SelfReg normalises over the images of a step, so it needs 2; got 1; raise batch_size")
        y, order = y.sort(stable=True)
        features = self.featurizer(x[order])
        projected, logits = self.cdpl(features), self.classifier(features)
        first, second = (index.to(x.device) for index in _partners(y))
        risk = F.cross_entropy(logits, y)
        regularizer = _distance(logits, logits[first], logits[second], t)
        regularizer = regularizer + FEATURE_WEIGHT * _distance(features, projected[first], projected[second], t)
        loss = risk + risk.detach().clamp(max=1.0) * regularizer
        self.step(loss)
        return {"loss": loss.item()}


def _partners(y: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows (N,) for each row of the sorted labels y (N,), of its class: two permutations of every class."""
    pairs, start = [], 0
    for size in y.unique_consecutive(return_counts=True)[1].tolist():
        pairs.append((start + torch.randperm(size), start + torch.randperm(size)))
        start += size
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)


def _distance(own: Tensor, first: Tensor, second: Tensor, t: float) -> Tensor:
    """t times the distance of the first partners, and 1 - t times that of both partners' mix; each (N, D)."""
    individual, mixed = F.mse_loss(own, first), F.mse_loss(own, t * first + (1 - t) * second)
    return t * individual + (1 - t) * mixed

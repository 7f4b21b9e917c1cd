"""Matching the distributions of risks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, batch_size, concatenate, make_optimizer, register
from domainbed.algorithms.erm import ERM

GAMMAS = (1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)  # from wide to narrow kernels


def _batch_size(dataset: Any) -> tuple[int, Callable[[Any], int]]:
    if dataset.small:
        return batch_size(dataset)
    if dataset.name in ("DomainNet", "TerraIncognita"):
        return 40, lambda r: int(r.uniform(30, 60))
    return 88, lambda r: int(r.uniform(70, 100))


def _lambda(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    if dataset.name == "DomainNet":
        return 0.5, lambda r: r.uniform(0.1, 1)
    if dataset.name in ("PACS", "TerraIncognita"):
        return 5.0, lambda r: r.uniform(1, 10)
    return 5.0, lambda r: r.uniform(0.1, 10)


def _anneal_iters(dataset: Any) -> tuple[int, Callable[[Any], int]]:
    if dataset.name == "DomainNet":
        return 2400, lambda r: int(r.uniform(1500, 3000))
    return 1500, lambda r: int(r.uniform(800, 2700))


def _variance_weight(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    if dataset.name in ("TerraIncognita", "OfficeHome", "DomainNet"):
        return 0.0, lambda r: 0.0
    return 0.004, lambda r: r.uniform(0.001, 0.007)


@register
class RDM(ERM):
    """Asks that the worst minibatch's risks be distributed as those of all images.

    With l the cross-entropies of the single images, ``all`` of them and those of the ``worst`` minibatch (of the
    largest mean), the loss is ``mean_e risk_e + rdm_lambda * MMD(l_worst, l_all) + variance_weight *
    (var l_all + var l_worst)``. MMD sums Gaussian kernels of eight widths, diagonals included; variances are unbiased.
    Before annealing ends both weights are 0; then the optimizer starts afresh, with its own learning rate.

    Source: Toan Nguyen, Kien Do, Bao Duong and Thin Nguyen, Domain Generalisation via Risk Distribution Matching,
        WACV 2024, https://arxiv.org/abs/2310.18598.
    Differs: the variances, the annealing and the second learning rate are DomainBed's. Works without CUDA and with
        minibatches of different sizes, DomainBed's does not; a minibatch of one image has variance 0 (there: not a
        number). Squared distances of risks are computed from their differences, which rounds less.

    Hparams:
        rdm_lambda: weight of the MMD.
        rdm_penalty_anneal_iters: updates of mere ERM.
        variance_weight: weight of the variances.
        rdm_lr: learning rate from then on.
        batch_size: on large images RDM takes more of them than other algorithms, to see a distribution.
    """

    HPARAMS = {
        "batch_size": _batch_size,
        "rdm_lambda": _lambda,
        "rdm_penalty_anneal_iters": _anneal_iters,
        "variance_weight": _variance_weight,
        "rdm_lr": (1.5e-5, lambda r: r.uniform(8e-6, 2e-5)),
    }
    CONTROL = {"rdm_lambda": 0.0, "variance_weight": 0.0}
    MIN_PARTS = 2

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("update_count", torch.tensor([0]))

    def update(
        self,
        minibatches: Minibatches,
        unlabeled: Sequence[Tensor] | None = None,
        held_out_minibatches: Minibatches | None = None,
    ) -> dict[str, float]:
        """One training step; ``held_out_minibatches`` is DomainBed's and not read, there or here."""
        x, y = concatenate(minibatches)
        losses = F.cross_entropy(self.predict(x), y, reduction="none")
        parts = losses.split([len(labels) for _, labels in minibatches])
        risk = torch.stack([part.mean() for part in parts])  # (E,)
        worst = parts[int(risk.argmax())]
        matching, variance = self.mmd(worst, losses), _variance(losses) + _variance(worst)
        loss = risk.mean()
        if int(self.update_count) >= self.hparams["rdm_penalty_anneal_iters"]:
            loss = loss + self.hparams["rdm_lambda"] * matching + self.hparams["variance_weight"] * variance
        self.step(loss)
        return {
            "update_count": int(self.update_count),
            "total_loss": loss.item(),
            "erm_loss": risk.mean().item(),
            "matching_penalty": matching.item(),
            "variance_penalty": variance.item(),
            "rdm_lambda": self.hparams["rdm_lambda"],
        }

    def step(self, loss: Tensor) -> None:
        if int(self.update_count) == self.hparams["rdm_penalty_anneal_iters"]:
            lr, weight_decay = self.hparams["rdm_lr"], self.hparams["weight_decay"]
            self.optimizer = make_optimizer(self.network.parameters(), lr, weight_decay, self.hparams)
        super().step(loss)
        self.update_count += 1

    def mmd(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared maximum mean discrepancy of two samples of numbers, x (N1,) and y (N2,)."""
        return _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all pairs of x (N1,) and y (N2,) of the sum of ``exp(-g * (x - y)^2)`` over g in GAMMAS."""
    squares = (x[:, None] - y).square()
    return torch.stack([torch.exp(-gamma * squares).mean() for gamma in GAMMAS]).sum()


def _variance(losses: Tensor) -> Tensor:
    return losses.var() if len(losses) > 1 else losses.new_zeros(())

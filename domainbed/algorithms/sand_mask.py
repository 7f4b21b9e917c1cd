"""The smoothed AND mask."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from domainbed.algorithms.and_mask import MaskedERM, agreement
from domainbed.algorithms.base import Minibatches, register

logger = logging.getLogger(__name__)


@register
class SANDMask(MaskedERM):
    """Descends where gradients agree in sign and size: ``mask = max(0, tanh(k * (agreement - tau) / variance))``.

    ``agreement`` is ``|mean_e sign(gradient_e)|``, ``variance`` that of an entry's E gradients (divided by E - 1).

    Source: Soroosh Shahtalebi, Jean-Christophe Gagnon-Audet, Touraj Laleh, Mojtaba Faramarzi, Kartik Ahuja and Irina
        Rish, SAND-mask: An Enhanced Gradient Masking Strategy for the Discovery of Invariances in Domain
        Generalization, 2021, https://arxiv.org/abs/2106.02266.
    Differs: as DomainBed, each parameter's gradient is divided by its mask's mean. Entries of variance 0 and agreement
        tau, where the formula says 0 / 0, are masked; DomainBed gives them 1e-17. Parameters that are frozen or unused
        are left alone, where DomainBed fails.

    Hparams:
        tau: agreement, in [0, 1], up to which an entry is masked. At 1, DomainBed's default, all of them are: only
            weight decay changes the network, so give another value or draw one.
        k: steepness of the mask.
    """

    HPARAMS = {"tau": (1.0, lambda r: r.uniform(0, 1)), "k": (10.0, lambda r: 10 ** r.uniform(-3, 5))}

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["k"] <= 0:
            raise ValueError(f"hparam k is {hparams['k']!r}; it is a steepness, give a number above 0")
        if hparams["tau"] == 1:
            logger.warning("SANDMask with tau 1, DomainBed's default, masks every gradient: nothing is learned")
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        values = super().update(minibatches, unlabeled)
        self.update_count += 1
        return values

    def gradient_mask(self, gradients: Tensor) -> Tensor:
        excess = agreement(gradients) - self.hparams["tau"]
        return (self.hparams["k"] * excess / gradients.var(0)).tanh().clamp_min(0).nan_to_num(0)

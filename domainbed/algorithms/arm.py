"""Adaptive risk minimisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import Minibatches, batch_size, concatenate, register
from domainbed.algorithms.erm import ERM


def _batch_size(dataset: Any) -> tuple[int, Any]:
    """Default and range of the rows of a minibatch, which are its support: 8 large images, as DomainBed."""
    return batch_size(dataset) if dataset.small else (8, lambda r: 8)


@register
class ARM(ERM):
    """Adapts to the images that come together: ``network([x, mean of context_net over the images around x])``.

    The context is one more channel of the image. The images around x are its support: minibatches, and what
    ``predict`` is given, are cut into as many rows as ``batch_size`` has, or taken whole if that does not come out
    even. So predictions depend on the images that are predicted together, which should be of one domain.

    Source: Marvin Zhang, Henrik Marklund, Nikita Dhawan, Abhishek Gupta, Sergey Levine and Chelsea Finn, Adaptive Risk
        Minimization: Learning to Adapt to Domain Shift, NeurIPS 2021, https://arxiv.org/abs/2007.02931, ARM-CML.
    Differs: from DomainBed: the context network is trained, as in the source; there the optimizer does not know it.
        No support spans two minibatches; there those of other sizes than ``batch_size`` share one. As there, the
        context has a single channel. By ``group`` a support has one class, so that the context tells the label in
        training and nothing afterwards: take another partition.

    Hparams:
        batch_size: rows of a minibatch and of a support.
    """

    HPARAMS = {"batch_size": _batch_size}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        if len(input_shape) != 3:
            raise ValueError(f"ARM adds a channel to images (C, H, W); the input's shape is {tuple(input_shape)}")
        channels, *size = input_shape
        super().__init__((channels + 1, *size), num_classes, num_domains, hparams)
        self.context_net = networks.ContextNet(input_shape)
        self.optimizer.add_param_group({"params": list(self.context_net.parameters())})

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        supports = [size for x, _ in minibatches for size in self._supports(len(x))]
        x, y = concatenate(minibatches)
        loss = F.cross_entropy(self._logits(x, supports), y)
        self.step(loss)
        return {"loss": loss.item()}

    def predict(self, x: Tensor) -> Tensor:
        return self._logits(x, self._supports(len(x)))

    def _supports(self, rows: int) -> list[int]:
        """The sizes of the supports that so many rows are cut into."""
        size = self.hparams["batch_size"]
        return [rows] if rows % size else [size] * (rows // size)

    def _logits(self, x: Tensor, supports: list[int]) -> Tensor:
        """Logits (B, K) of images x (B, C, H, W), supports of these sizes one after the other."""
        contexts = [part.mean(0, keepdim=True).expand_as(part) for part in self.context_net(x).split(supports)]
        return self.network(torch.cat([x, torch.cat(contexts)], dim=1))

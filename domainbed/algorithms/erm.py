"""Empirical risk minimisation, and the base of methods that add an annealed penalty to it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, concatenate, descend, make_optimizer, register


@register
class ERM(Algorithm):
    """Empirical risk: the mean cross-entropy over all images of a step, whichever minibatch they are in.

    New methods start here. Attributes: ``featurizer`` (x -> (B, n_outputs)), ``classifier`` (-> logits (B, K)),
    ``network`` (one after the other) and ``optimizer`` (over ``network``).

    Source: Vladimir Vapnik, Statistical Learning Theory, 1998; as a baseline: Ishaan Gulrajani and David Lopez-Paz,
        In Search of Lost Domain Generalization, ICLR 2021, https://arxiv.org/abs/2007.01434.
    """

    HPARAMS = {}

    optimizer: torch.optim.Optimizer

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer of the network, without a past."""
        return make_optimizer(self.network.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams)

    def step(self, loss: Tensor) -> None:
        """Takes one optimizer step down the gradient of a scalar loss."""
        descend(loss, self.optimizer)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        self.step(loss)
        return {"loss": loss.item()}

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)


class AnnealedERM(ERM):
    """ERM with a penalty whose weight is 1 for some updates and ``*_lambda`` from then on.

    At the switch the optimizer starts afresh, because its running moments belong to another loss.
    """

    HPARAMS = {}

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("update_count", torch.tensor([0]))

    def penalty_weight(self, name: str) -> float:
        """The weight in this update; call it before ``step``.

        Args:
            name: prefix of the two hparams ``{name}_lambda`` and ``{name}_penalty_anneal_iters`` (updates).
        """
        updates, switch = int(self.update_count), self.hparams[f"{name}_penalty_anneal_iters"]
        if updates == switch:
            self.optimizer = self.new_optimizer()
        return self.hparams[f"{name}_lambda"] if updates >= switch else 1.0

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        self.update_count += 1

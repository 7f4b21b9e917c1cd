"""Meta-learning for domain generalization."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed.algorithms.base import Minibatches, make_optimizer, register
from domainbed.algorithms.erm import ERM
from domainbed.lib.misc import Batch, split_meta_train_test


@register
class MLDG(ERM):
    """Asks that a step on one minibatch also help on another: ``F(w) + mldg_beta * G(w')``, w' one step down F from w.

    Each update divides the E minibatches at random into meta-train and meta-test ones. For every pair of one of each,
    a clone of the network takes a step of a new optimizer on the meta-train risk F. The gradient of F before that
    step and that of the meta-test risk G after it, each divided by E, are added up for one step of the network.

    Source: Da Li, Yongxin Yang, Yi-Zhe Song and Timothy M. Hospedales, Learning to Generalize: Meta-Learning for
        Domain Generalization, AAAI 2018, https://arxiv.org/abs/1710.03463, Algorithm 1.
    Differs: as DomainBed, of first order (the gradient of G is taken by w', not through the step that led there), the
        clone steps with the run's optimizer and learning rate, one step per pair in place of one for all meta-train
        domains, and the division is by E, not by the number of pairs. At most E - 1 minibatches are for meta-test,
        where DomainBed learns nothing if all are. The network's batch statistics follow the clones' forward passes,
        where DomainBed's stay what they were before training. Weights without a gradient (frozen ones) get no weight
        decay; DomainBed gives them a zero gradient, which decays them.

    Hparams:
        mldg_beta: weight of the meta-test risk.
        n_meta_test: meta-test minibatches of an update, at least 1.
    """

    HPARAMS = {
        "mldg_beta": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "n_meta_test": (2, lambda r: int(r.choice([1, 2]))),
    }
    MIN_PARTS = 2

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["n_meta_test"] < 1:
            raise ValueError(f"hparam n_meta_test is {hparams['n_meta_test']}; give 1 or more minibatches to meta-test")
        self.num_meta_test = hparams["n_meta_test"]

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        share, beta = 1 / len(minibatches), self.hparams["mldg_beta"]
        losses = []
        self.optimizer.zero_grad()
        for train, test in split_meta_train_test(minibatches, self.num_meta_test):
            clone = copy.deepcopy(self.network)
            optimizer = make_optimizer(
                clone.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams
            )
            losses.append(self._add_gradient(clone, train, share))
            optimizer.step()
            losses.append(self._add_gradient(clone, test, share * beta))
            for own, seen in zip(self.network.buffers(), clone.buffers(), strict=True):
                own.copy_(seen)
        self.optimizer.step()
        return {"loss": torch.stack(losses).sum().item()}

    def _add_gradient(self, clone: nn.Module, minibatch: Batch, weight: float) -> Tensor:
        """Adds the gradient of a clone's risk, times the weight, to the network's; returns the risk times the weight.

        The clone's own gradient is that of the risk alone.
        """
        x, y = minibatch
        risk = F.cross_entropy(clone(x), y)
        clone.zero_grad()
        risk.backward()
        for own, parameter in zip(self.network.parameters(), clone.parameters(), strict=True):
            if parameter.grad is not None:
                gradient = weight * parameter.grad
                own.grad = gradient if own.grad is None else own.grad + gradient
        return weight * risk.detach()

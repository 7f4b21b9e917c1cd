"""Features on which no nearby classifier transfers badly."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, concatenate, descend, make_optimizer, register
from domainbed.lib.misc import proj

PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0}


@register
class Transfer(Algorithm):
    """Asks that the risks of the minibatches stay close under every classifier near the trained one.

    The gap of a classifier h is ``t_lambda * (max_e risk_e(h) - min_e risk_e(h))``. An update takes a step on the risk
    of all images; then a step of the featurizer down the gap of the adversary that the last update left; then the
    adversary starts at the classifier and takes ``d_steps_per_g`` steps up its gap, after each of which it is moved
    back to within distance delta of the classifier. The reported ``gap`` is the one before the last of these steps.

    Source: Guojun Zhang, Han Zhao, Yaoliang Yu and Pascal Poupart, Quantifying and Improving Transferability in Domain
        Generalization, NeurIPS 2021, https://arxiv.org/abs/2106.03632, Algorithm 1.
    Differs: as DomainBed, one step on the risk and one on the gap per update. With gda DomainBed's optimizer covers
        the adversary alone, so that featurizer and classifier never learn (in all its random draws); here it covers
        the two, and reads weight_decay. With t_lambda 0 there is no step on the gap at all (Adam would move on by its
        moments), thus ERM.

    Hparams:
        t_lambda: weight of the gap.
        delta: the farthest that the adversary's weights may be from the classifier's, at least 0.
        d_steps_per_g: steps of the adversary in an update, at least 1; each takes a forward pass of all images.
        gda: gradient descent and ascent: plain SGD trains featurizer and classifier too (needs a larger lr).
        lr_d: learning rate of the adversary, which is trained by plain SGD.
        weight_decay_d, beta1: not read, as in DomainBed.
    """

    HPARAMS = {
        "t_lambda": (1.0, lambda r: 10 ** r.uniform(-2, 1)),
        "delta": (2.0, lambda r: r.uniform(0.1, 3.0)),
        "d_steps_per_g": (10, lambda r: int(r.choice([1, 2, 5]))),
        "weight_decay_d": (0.0, lambda r: 10 ** r.uniform(-6, -2)),
        "gda": (False, lambda r: True),
        "beta1": (0.5, lambda r: r.choice([0.0, 0.5])),
        "lr_d": (1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)),
    }
    MIN_PARTS = 2
    CONTROL = {"t_lambda": 0.0}

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        for name, least in (("d_steps_per_g", 1), ("delta", 0)):
            if not hparams[name] >= least:
                raise ValueError(f"hparam {name} is {hparams[name]}; give {least} or more")
        self.register_buffer("update_count", torch.tensor([0]))  # stays 0, as in DomainBed's files
        self.featurizer = networks.Featurizer(input_shape, hparams)
        shape = (self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.classifier, self.adv_classifier = networks.Classifier(*shape), networks.Classifier(*shape)
        self.adv_classifier.load_state_dict(self.classifier.state_dict())
        self.optimizer = make_optimizer(
            [*self.featurizer.parameters(), *self.classifier.parameters()],
            hparams["lr"],
            hparams["weight_decay"],
            PLAIN_SGD if hparams["gda"] else hparams,
        )
        self.adv_opt = make_optimizer(self.adv_classifier.parameters(), hparams["lr_d"], 0.0, PLAIN_SGD)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        descend(loss, self.optimizer)
        return {"loss": loss.item(), "gap": self._lower_gap(minibatches) if self.hparams["t_lambda"] else 0.0}

    def _lower_gap(self, minibatches: Minibatches) -> float:
        """The featurizer's step and the adversary's; returns the gap before the last of these."""
        labels = [y for _, y in minibatches]
        descend(self._gap([self.featurizer(x) for x, _ in minibatches], labels), self.optimizer)
        self.adv_classifier.load_state_dict(self.classifier.state_dict())
        for _ in range(self.hparams["d_steps_per_g"]):
            with torch.no_grad():  # anew in each step, since batch statistics follow and dropout draws
                features = [self.featurizer(x) for x, _ in minibatches]
            gap = self._gap(features, labels)
            descend(-gap, self.adv_opt)
            proj(self.hparams["delta"], self.adv_classifier, self.classifier)
        return gap.item()

    def _gap(self, features: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """The adversary's scalar gap on each minibatch's features (B, D); at least float32 also under autocast."""
        with torch.autocast(features[0].device.type, enabled=False):
            dtype = next(self.adv_classifier.parameters()).dtype
            risks = [
                F.cross_entropy(self.adv_classifier(f.to(dtype)), y) for f, y in zip(features, labels, strict=True)
            ]
        risk = torch.stack(risks)
        return self.hparams["t_lambda"] * (risk.max(0).values - risk.min(0).values)

    def predict(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))

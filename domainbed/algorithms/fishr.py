"""Matching the variances of gradients over the minibatches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, concatenate, descend, make_optimizer, register
from domainbed.lib.misc import MovingAverage, l2_between_dicts


@register
class Fishr(Algorithm):
    """Asks that the classifier's gradients vary alike: ``risk + lambda * mean_e |v_e - mean_e v_e|^2``.

    ``v_e`` is the variance, for each weight of the classifier, of the gradients of minibatch e's single images,
    averaged over the updates; ``|.|^2`` is the mean over the weights. The penalty reaches classifier and featurizer.

    Source: Alexandre Rame, Corentin Dancette and Matthieu Cord, Fishr: Invariant Gradient Variances for
        Out-of-Distribution Generalization, ICML 2022, https://arxiv.org/abs/2109.02934, Algorithm 1.
    Differs: the nll weighs images, not minibatches, equally. As DomainBed, variances are divided by B, and their
        averages start at zero and are divided by 1 - ema, so that the newest variance always weighs 1 (in the steady
        state they are 1 / (1 - ema) times the variance); the weight is 0 before annealing ends. The gradients come from
        torch.func; DomainBed's from BackPACK, with whose newer releases it crashes.

    Hparams:
        lambda: weight of the penalty after annealing.
        penalty_anneal_iters: updates with weight 0; then the optimizer starts afresh.
        ema: weight of the past in the moving averages of the variances, in [0, 1).
    """

    HPARAMS = {
        "lambda": (1000.0, lambda r: 10 ** r.uniform(1, 4)),
        "penalty_anneal_iters": (1500, lambda r: int(r.uniform(0, 5000))),
        "ema": (0.95, lambda r: r.uniform(0.90, 0.99)),
    }
    CONTROL = {"lambda": 0.0, "penalty_anneal_iters": 0}
    MIN_PARTS = 2

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 <= hparams["ema"] < 1:
            raise ValueError(f"hparam ema is {hparams['ema']!r}; it weighs the past, give a number in [0, 1)")
        self.num_domains = num_domains
        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.register_buffer("update_count", torch.tensor([0]))
        self.ema_per_domain = [MovingAverage(hparams["ema"]) for _ in range(num_domains)]
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.network.parameters(), self.hparams["lr"], self.hparams["weight_decay"], self.hparams)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features = self.featurizer(x)
        nll = F.cross_entropy(self.classifier(features), y)
        penalty = self._penalty(features, y, [len(labels) for _, labels in minibatches])
        loss = nll + self._penalty_weight() * penalty
        descend(loss, self.optimizer)
        self.update_count += 1
        return {"loss": loss.item(), "nll": nll.item(), "penalty": penalty.item()}

    def _penalty_weight(self) -> float:
        """The weight in this update; where it changes, the optimizer starts afresh."""
        updates, switch = int(self.update_count), self.hparams["penalty_anneal_iters"]
        if updates == switch:
            self.optimizer = self._new_optimizer()
        return self.hparams["lambda"] if updates >= switch else 0.0

    def _penalty(self, features: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
        """Scalar: how far the minibatches' averaged variances are from their mean."""
        parts = zip(self.ema_per_domain, features.split(sizes), y.split(sizes), strict=True)
        variances = [average.update(self._gradient_variances(part, labels)) for average, part, labels in parts]
        mean = {name: torch.stack([v[name] for v in variances]).mean(0) for name in variances[0]}
        return torch.stack([l2_between_dicts(variance, mean) for variance in variances]).mean()

    def _gradient_variances(self, features: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Variance of each weight's gradient over the images, features (B, D), y (B,), by the weight's name.

        In float32 also under autocast: differences of squares.
        """
        weights: dict[str, Tensor] = dict(self.classifier.named_parameters())
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(iter(weights.values())).dtype)
            gradients = vmap(grad(self._risk_of_one), (None, 0, 0))(weights, features, y)
        return {name: gradient.var(0, correction=0) for name, gradient in gradients.items()}

    def _risk_of_one(self, weights: dict[str, Tensor], features: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of one image, features (D,), y ()."""
        return F.cross_entropy(functional_call(self.classifier, weights, (features[None],)), y[None])

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

"""Marginal transfer learning."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import Algorithm, Minibatches, descend, make_optimizer, register


@register
class MTL(Algorithm):
    """Classifies an image by its features and by its domain's: ``classifier([f(x), m])``, m the mean of f.

    Of a training minibatch e, m is ``mtl_ema * (mean of its features) + (1 - mtl_ema) * m_e``, where m_e is what it was
    in the update before; the gradient goes through the mean. Of unseen images m is the mean of those that are predicted
    together, so they should be of one domain, and many. The loss is the sum over the minibatches of their risks.

    Source: Gilles Blanchard, Aniket Anand Deshmukh, Urun Dogan, Gyemin Lee and Clayton Scott, Domain Generalization by
        Marginal Transfer Learning, JMLR 2021, https://arxiv.org/abs/1711.07910.
    Differs: as DomainBed, mean features of a network stand for the source's kernel mean embedding. From DomainBed: the
        classifier sees m; there it sees normal noise drawn in its place, so predictions are random and say nothing of
        the domain. A classifier trained there loads, but its weights for m know only noise. By ``group`` m tells the
        label in training and nothing afterwards: take another partition.

    Hparams:
        mtl_ema: weight of the newest mean in m, in [0, 1]; 1 keeps no memory.
    """

    HPARAMS = {"mtl_ema": (0.99, lambda r: r.choice([0.5, 0.9, 0.99, 1.0]))}

    embeddings: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 <= hparams["mtl_ema"] <= 1:
            raise ValueError(f"hparam mtl_ema is {hparams['mtl_ema']}; it is a weight, give a number in [0, 1]")
        self.featurizer = networks.Featurizer(input_shape, hparams)
        width = self.featurizer.n_outputs
        self.classifier = networks.Classifier(2 * width, num_classes, hparams["nonlinear_classifier"])
        parameters = [*self.featurizer.parameters(), *self.classifier.parameters()]
        self.optimizer = make_optimizer(parameters, hparams["lr"], hparams["weight_decay"], hparams)
        self.register_buffer("embeddings", torch.zeros(num_domains, width))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        risks = [F.cross_entropy(self.predict(x, env), y) for env, (x, y) in enumerate(minibatches)]
        loss = torch.stack(risks).sum()
        descend(loss, self.optimizer)
        return {"loss": loss.item()}

    def predict(self, x: Tensor, env: int | None = None) -> Tensor:
        """Logits (B, K) of images x (B, C, H, W) of one domain; ``env`` is its number if it is of training."""
        features = self.featurizer(x)
        embedding = self._embedding(features, env)
        return self.classifier(torch.cat([features, embedding.expand_as(features)], dim=1))

    def _embedding(self, features: Tensor, env: int | None) -> Tensor:
        """m (D,) of features (B, D); in training mode it becomes the domain's memory."""
        mean = features.mean(0)
        if env is None:
            return mean
        ema = self.hparams["mtl_ema"]
        embedding = ema * mean + (1 - ema) * self.embeddings[env]
        if self.training:
            self.embeddings[env] = embedding.detach()
        return embedding

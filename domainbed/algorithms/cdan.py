"""Conditional adversarial adaptation: a discriminator that sees features and predictions multiplied."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import (
    Minibatches,
    Task,
    concatenate,
    descend,
    make_optimizer,
    part_numbers,
    register,
)
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.explained import check_not_negative

LARGEST = 4096  # entries of a product that the discriminator sees as it is
PROJECTED = 1024  # random products that it sees in place of a larger one


class Reversal(torch.autograd.Function):
    """Returns x as it is, and turns the gradient that comes back into ``-coefficient`` times itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.coefficient * gradients[0], None


@register
class CDAN(ERM):
    """ERM whose features, multiplied with its predictions, do not tell a discriminator the minibatch.

    ``L = CE(f(z), y) + mean_e sum_i w_i CE(D(h_i), e) / sum_i w_i`` over the rows i of minibatch e, with features z,
    predictions ``p = softmax(f(z))``, a constant, and ``h = vec(z p^T)``, (D K,). All are trained by the same step;
    the discriminator D descends, the featurizer gets the second term's gradient times ``-cdan_lambda r``, where
    ``r = 2 / (1 + exp(-10 t / T)) - 1`` grows from 0 to 1 with the updates t of the run's T. If T is not known
    (``Task.steps`` is 0, or the class is built without a task) there is no warm-up: r is 1. Where D K is above 4096,
    ``h = (R_z z) * (R_p p) / sqrt(1024)``, (1024,), with fixed random matrices of standard normal entries.
    w is 1, or with ``cdan_entropy`` (CDAN+E) ``w = 1 + exp(-H(p))`` with the entropy H in nats.

    No confounders are needed in training: what is to be told apart is the minibatches' number, that of the environment
    unless another partition is taken. This is not CDANN (Li et al. 2018), whose discriminator sees the features with an
    embedding of the true label.

    Source: Mingsheng Long, Zhangjie Cao, Jianmin Wang and Michael I. Jordan, Conditional Adversarial Domain Adaptation,
        NeurIPS 2018, https://arxiv.org/abs/1705.10667.
    Differs: training parts, any number of them and all labelled, in place of a labelled source and an unlabelled target
        domain; the optimizer is the hparams', in place of SGD with an annealed rate. p is a constant, in w as well.
        No bottleneck layer; only the discriminator learns faster, the new classifier does not. T is the run's
        length, not 10,000. Weights are divided by their sum in each minibatch, as in the published code. A narrower
        discriminator for small images.

    Hparams:
        cdan_lambda: weight of the reversed gradient, not negative.
        cdan_entropy: sure predictions weigh more (CDAN+E).
        cdan_width: units of the discriminator's two hidden layers.
        cdan_dropout: share of them that is dropped.
        cdan_lr_factor: the discriminator's learning rate is this times ``lr``.
    """

    HPARAMS = {
        "cdan_lambda": (1.0, lambda r: 10 ** r.uniform(-2, 2)),
        "cdan_entropy": (False, lambda r: bool(r.choice([False, True]))),
        "cdan_width": lambda dataset: (256 if dataset.small else 1024, lambda r: int(2 ** r.uniform(6, 10))),
        "cdan_dropout": (0.5, lambda r: r.choice([0.0, 0.1, 0.5])),
        "cdan_lr_factor": (10.0, lambda r: 10 ** r.uniform(0, 1)),
    }
    MIN_PARTS = 2
    CONTROL = {"cdan_lambda": 0.0}

    update_count: Tensor
    feature_projection: Tensor | None
    prediction_projection: Tensor | None

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, "cdan_lambda", "cdan_lr_factor")
        self.steps = 0  # T; 0: not known
        self.register_buffer("update_count", torch.tensor([0]))
        width = self.featurizer.n_outputs
        projects = width * num_classes > LARGEST
        for name, size in (("feature_projection", width), ("prediction_projection", num_classes)):
            self.register_buffer(name, torch.randn(PROJECTED, size) if projects else None)
        shape = {"mlp_width": hparams["cdan_width"], "mlp_depth": 3, "mlp_dropout": hparams["cdan_dropout"]}
        self.discriminator = networks.MLP(PROJECTED if projects else width * num_classes, num_domains, shape)
        rate = hparams["cdan_lr_factor"] * hparams["lr"]
        self.disc_opt = make_optimizer(self.discriminator.parameters(), rate, hparams["weight_decay"], hparams)

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "CDAN":
        found: Any = super().from_task(task, hparams)
        found.steps = task.steps
        return found

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features, reversal = self.featurizer(x), self.reversal()
        logits = self.classifier(features)
        risk = F.cross_entropy(logits, y)
        reversed_features = Reversal.apply(features, self.hparams["cdan_lambda"] * reversal)
        disc_loss = self.disc_loss(reversed_features, logits.detach(), part_numbers(minibatches))
        descend(risk + disc_loss, self.optimizer, self.disc_opt)
        self.update_count += 1
        return {"loss": risk.item(), "disc_loss": disc_loss.item(), "reversal": reversal}

    def reversal(self) -> float:
        """r of this update; 0 in the first of a run whose length is known, near 1 in its last."""
        if not self.steps:
            return 1.0
        return 2 / (1 + math.exp(-10 * int(self.update_count) / self.steps)) - 1

    def disc_loss(self, features: Tensor, logits: Tensor, parts: Tensor) -> Tensor:
        """Scalar loss of the discriminator on features (N, D), logits (N, K), constants, of the minibatches parts."""
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        losses = F.cross_entropy(self.discriminator(self.product(features, p)), parts, reduction="none")
        weights = 1 + (p * log_p).sum(1).exp() if self.hparams["cdan_entropy"] else torch.ones_like(losses)
        weights = weights[:, None] * F.one_hot(parts)  # (N, E)
        totals = weights.sum(0)
        present = totals > 0  # a mean of none is no number
        return ((weights * losses[:, None]).sum(0)[present] / totals[present]).mean()

    def product(self, features: Tensor, p: Tensor) -> Tensor:
        """What the discriminator sees, h (N, D K) or (N, 1024), of features (N, D) and predictions p (N, K)."""
        if self.feature_projection is None or self.prediction_projection is None:
            return (features[:, :, None] * p[:, None]).flatten(1)
        projected = F.linear(features, self.feature_projection) * F.linear(p, self.prediction_projection)
        return projected / math.sqrt(PROJECTED)

"""Additive disentanglement of domain features, with remixed features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import (
    Algorithm,
    Minibatches,
    concatenate,
    descend,
    learning_rate,
    make_optimizer,
    part_numbers,
    register,
)
from domainbed.lib.supervised_contrast import SupConLossLambda


def _learning_rate(dataset: Any) -> tuple[float, Callable[[Any], float]]:
    if dataset.optimizer == "sgd":
        return learning_rate(dataset)
    if dataset.small:
        return 3e-3, lambda r: r.choice([5e-4, 1e-3, 2e-3, 3e-3])
    return 3e-5, lambda r: r.choice([2e-5, 3e-5, 4e-5, 5e-5])


@register
class ADRMX(Algorithm):
    """Label features f minus domain features g are to be the same in every domain, and both are used.

    With h = f - g and d = ``d_steps_per_g_step``, of d + 1 updates the others train a discriminator of the domains on
    h, and one trains all else on ``CE(classifier_1(f)) + CE(classifier_2(h)) + dclf_lambda * CE_domain(g) +
    cnt_lambda * (contrast(f) + contrast(h)) + rmxd_lambda * remix - disc_lambda * CE_discriminator(h)``. ``remix`` is
    the mean over the classes of the cross-entropy of ``classifier_1(h_i + g_j)`` for one random pair i, j of the class
    from different domains (0 where it has none). Domains are the minibatches. Predictions are ``classifier_1(f)``.
    The control trains the classifiers of f and h in the same updates.

    Source: Berker Demirel, Erchan Aptoula and Huseyin Ozkan, ADRMX: Additive Disentanglement of Domain Features with
        Remix Loss, 2023, https://arxiv.org/abs/2308.06624.
    Differs: DomainBed takes the i-th and j-th image of the step, of whatever class and domain, where it means those of
        the class; here they are of the class, and of different domains as in the source. DomainBed fails where no
        class has a pair. An update of the discriminator does not differentiate the featurizers.

    Hparams:
        cnt_lambda, dclf_lambda, rmxd_lambda, disc_lambda: weights of the loss above.
        d_steps_per_g_step: updates of the discriminator per update of all else.
        beta1: Adam's first moment decay, of both optimizers (the second is 0.9); SGD does not read it.
        lr: of both optimizers, with defaults and ranges of its own.
        mlp_width, mlp_depth, mlp_dropout: shape of the discriminator.
    """

    HPARAMS = {
        "lr": _learning_rate,
        "cnt_lambda": (1.0, lambda r: 1.0),
        "dclf_lambda": (1.0, lambda r: 1.0),
        "disc_lambda": (0.75, lambda r: 0.75),
        "rmxd_lambda": (1.0, lambda r: 1.0),
        "d_steps_per_g_step": (2, lambda r: 2),
        "beta1": (0.5, lambda r: 0.5),
        "mlp_width": (256, lambda r: 256),
        "mlp_depth": (9, lambda r: int(r.choice([8, 9, 10]))),
        "mlp_dropout": (0.0, lambda r: 0.0),
    }
    MIN_PARTS = 2
    CONTROL = {"cnt_lambda": 0.0, "dclf_lambda": 0.0, "disc_lambda": 0.0, "rmxd_lambda": 0.0}
    UNREAD_HPARAMS = ("weight_decay", "nonlinear_classifier")

    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["d_steps_per_g_step"] < 0:
            raise ValueError(f"hparam d_steps_per_g_step is {hparams['d_steps_per_g_step']}; take 0 or more")
        self.num_classes, self.num_domains = num_classes, num_domains
        self.register_buffer("update_count", torch.tensor([0]))
        self.scl_int, self.scl_final = SupConLossLambda(), SupConLossLambda()
        self.featurizer_label = networks.Featurizer(input_shape, hparams)
        self.featurizer_domain = networks.Featurizer(input_shape, hparams)
        width = self.featurizer_label.n_outputs
        self.discriminator = networks.MLP(width, num_domains, hparams)
        self.classifier_label_1 = networks.Classifier(width, num_classes, is_nonlinear=True)
        self.classifier_label_2 = networks.Classifier(width, num_classes, is_nonlinear=True)
        self.classifier_domain = networks.Classifier(width, num_domains, is_nonlinear=True)
        self.network = nn.Sequential(self.featurizer_label, self.classifier_label_1)
        self.disc_opt = self._optimizer(self.discriminator)
        classifiers = (self.classifier_label_1, self.classifier_label_2, self.classifier_domain)
        self.opt = self._optimizer(self.featurizer_label, self.featurizer_domain, *classifiers)

    def _optimizer(self, *modules: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return make_optimizer(parameters, self.hparams["lr"], 0.0, self.hparams, betas=(self.hparams["beta1"], 0.9))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        self.update_count += 1
        x, y = concatenate(minibatches)
        parts = part_numbers(minibatches)
        disc_steps = self.hparams["d_steps_per_g_step"]
        if int(self.update_count) % (1 + disc_steps) < disc_steps:
            with torch.no_grad():
                invariant = self.featurizer_label(x) - self.featurizer_domain(x)
            disc_loss = F.cross_entropy(self.discriminator(invariant), parts)
            descend(disc_loss, self.disc_opt)
            return {"loss_disc": disc_loss.item()}
        losses = self._losses(x, y, parts)
        weight = {name: self.hparams[f"{name}_lambda"] for name in ("cnt", "dclf", "rmxd", "disc")}
        total = losses["loss_clf_int"] + losses["loss_clf_fin"] + weight["dclf"] * losses["loss_dmn"]
        total = total + weight["cnt"] * (losses["loss_cnt_int"] + losses["loss_cnt_final"])
        total = total + weight["rmxd"] * losses["loss_remixed"] - weight["disc"] * losses["loss_disc"]
        descend(total, self.opt)
        return {"loss_total": total.item()} | {name: loss.item() for name, loss in losses.items()}

    def _losses(self, x: Tensor, y: Tensor, parts: Tensor) -> dict[str, Tensor]:
        """The terms of the loss, unweighted, of images x with labels y from the minibatches parts (N,)."""
        label, domain = self.featurizer_label(x), self.featurizer_domain(x)
        invariant = label - domain
        return {
            "loss_cnt_int": self.scl_int(label, y, parts),
            "loss_cnt_final": self.scl_final(invariant, y, parts),
            "loss_clf_int": F.cross_entropy(self.classifier_label_1(label), y),
            "loss_clf_fin": F.cross_entropy(self.classifier_label_2(invariant), y),
            "loss_dmn": F.cross_entropy(self.classifier_domain(domain), parts),
            "loss_disc": F.cross_entropy(self.discriminator(invariant), parts),
            "loss_remixed": self._remix_loss(invariant, domain, y, parts),
        }

    def _remix_loss(self, invariant: Tensor, domain: Tensor, y: Tensor, parts: Tensor) -> Tensor:
        pairs = _pairs_across(y.cpu(), parts.cpu(), self.num_classes).to(y.device)
        if not len(pairs):
            return invariant.new_zeros(())
        first, second = pairs.T
        logits = self.classifier_label_1(invariant[first] + domain[second])
        return F.cross_entropy(logits, y[first], reduction="sum") / self.num_classes

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)


def _pairs_across(y: Tensor, parts: Tensor, num_classes: int) -> Tensor:
    """For each class that two minibatches have, one random pair of its images from different ones; (P, 2) int64."""
    pairs = []
    for k in range(num_classes):
        rows = (y == k).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows))]
        elsewhere = rows[parts[rows] != parts[rows[:1]]]
        if len(elsewhere):
            pairs.append(torch.stack([rows[0], elsewhere[0]]))
    return torch.stack(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)

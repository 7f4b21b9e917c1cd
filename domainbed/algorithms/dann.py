"""Domain-adversarial training, unconditional and conditional on the class."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

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
    weight_decay,
)


class AbstractDANN(Algorithm):
    """A discriminator learns to tell the minibatches apart by their features, the featurizer to prevent it.

    With d = ``d_steps_per_g_step``, of d + 1 updates one trains featurizer and classifier on
    ``risk - lambda * disc_loss`` and the others train the discriminator on
    ``disc_loss = cross-entropy of the minibatch's number + grad_penalty * mean_i |d CE_i / d features_i|^2``.
    The control (lambda 0) trains featurizer and classifier in the same updates, thus d + 1 times less often than ERM.

    Args:
        conditional: the discriminator sees the features plus a learned embedding of the label.
        class_balance: the present classes weigh equally in the discriminator's cross-entropy.

    Hparams:
        lambda: weight of the discriminator's loss for the featurizer.
        grad_penalty: weight of the discriminator's squared gradient.
        d_steps_per_g_step: discriminator updates per update of the featurizer.
        beta1: Adam's first moment decay, of both optimizers (the second is 0.9); SGD does not read it.
        lr_g, weight_decay_g: of featurizer and classifier (``lr`` and ``weight_decay`` are not read).
        lr_d, weight_decay_d: of the discriminator and the embeddings.
        mlp_width, mlp_depth, mlp_dropout: shape of the discriminator.
    """

    HPARAMS = {
        "lambda": (1.0, lambda r: 10 ** r.uniform(-2, 2)),
        "weight_decay_d": (0.0, lambda r: 10 ** r.uniform(-6, -2)),
        "d_steps_per_g_step": (1, lambda r: int(2 ** r.uniform(0, 3))),
        "grad_penalty": (0.0, lambda r: 10 ** r.uniform(-2, 1)),
        "beta1": (0.5, lambda r: r.choice([0.0, 0.5])),
        "mlp_width": (256, lambda r: int(2 ** r.uniform(6, 10))),
        "mlp_depth": (3, lambda r: int(r.choice([3, 4, 5]))),
        "mlp_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
        "lr_g": learning_rate,
        "lr_d": learning_rate,
        "weight_decay_g": weight_decay,
    }
    MIN_PARTS = 2
    CONTROL = {"lambda": 0.0}
    UNREAD_HPARAMS = ("lr", "weight_decay")

    update_count: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        conditional: bool,
        class_balance: bool,
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.conditional, self.class_balance = conditional, class_balance
        self.register_buffer("update_count", torch.tensor([0]))
        self.featurizer = networks.Featurizer(input_shape, hparams)
        width = self.featurizer.n_outputs
        self.classifier = networks.Classifier(width, num_classes, hparams["nonlinear_classifier"])
        self.discriminator = networks.MLP(width, num_domains, hparams)
        self.class_embeddings = nn.Embedding(num_classes, width)
        self.disc_opt = self._optimizer("d", self.discriminator, self.class_embeddings)
        self.gen_opt = self._optimizer("g", self.featurizer, self.classifier)

    def _optimizer(self, role: str, *modules: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(
            [parameter for module in modules for parameter in module.parameters()],
            self.hparams[f"lr_{role}"],
            self.hparams[f"weight_decay_{role}"],
            self.hparams,
            betas=(self.hparams["beta1"], 0.9),
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        self.update_count += 1
        x, y = concatenate(minibatches)
        parts = part_numbers(minibatches)
        disc_steps = self.hparams["d_steps_per_g_step"]
        if int(self.update_count) % (1 + disc_steps) < disc_steps:
            with torch.no_grad():  # the discriminator's step leaves the featurizer alone
                features = self.featurizer(x)
            loss = self._disc_loss(features.detach().requires_grad_(), y, parts)  # its penalty differentiates by them
            descend(loss, self.disc_opt)
            return {"disc_loss": loss.item()}
        features = self.featurizer(x)
        risk = F.cross_entropy(self.classifier(features), y)
        loss = risk - self.hparams["lambda"] * self._disc_loss(features, y, parts)
        descend(loss, self.gen_opt)
        return {"gen_loss": loss.item()}

    def _disc_loss(self, features: Tensor, y: Tensor, parts: Tensor) -> Tensor:
        """Scalar loss of the discriminator on features (N, D) with labels y (N,) from the minibatches parts (N,)."""
        seen = features + self.class_embeddings(y) if self.conditional else features
        losses = F.cross_entropy(self.discriminator(seen), parts, reduction="none")
        loss = (losses / self._class_sizes(y)).sum() if self.class_balance else losses.mean()
        weight = self.hparams["grad_penalty"]
        if weight == 0:
            return loss
        (gradient,) = autograd.grad(losses.sum(), seen, create_graph=True)
        return loss + weight * gradient.square().sum(1).mean()

    @staticmethod
    def _class_sizes(y: Tensor) -> Tensor:
        """(N,) how often each label occurs, times the largest label + 1, which is DomainBed's count of classes."""
        counts = F.one_hot(y).sum(0)
        return counts[y] * len(counts)

    def predict(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))


@register
class DANN(AbstractDANN):
    """Features from which a discriminator can't tell the minibatches apart; see AbstractDANN for loss and hparams.

    Source: Yaroslav Ganin, Evgeniya Ustinova, Hana Ajakan, Pascal Germain, Hugo Larochelle, Francois Laviolette,
        Mario Marchand and Victor Lempitsky, Domain-Adversarial Training of Neural Networks, JMLR 2016,
        https://arxiv.org/abs/1505.07818.
    Differs: as DomainBed, alternating updates in place of a gradient reversal layer, and a gradient penalty.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, conditional=False, class_balance=False)


@register
class CDANN(AbstractDANN):
    """Features from which, given the class, a discriminator can't tell the minibatches apart; see AbstractDANN.

    Source: Ya Li, Xinmei Tian, Mingming Gong, Yajing Liu, Tongliang Liu, Kun Zhang and Dacheng Tao, Deep Domain
        Generalization via Conditional Invariant Adversarial Networks, ECCV 2018,
        https://openaccess.thecvf.com/content_ECCV_2018/html/Ya_Li_Deep_Domain_Generalization_ECCV_2018_paper.html.
    Differs: as DomainBed, one discriminator that also sees an embedding of the true label, its loss balanced over the
        classes, in place of the source's discriminator per class. This is not CDAN (Long et al. 2018), whose
        discriminator sees the product of features and predicted probabilities.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, conditional=True, class_balance=True)

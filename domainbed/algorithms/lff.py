"""Learning from failure: what a deliberately biased network finds hard counts most."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import networks
from domainbed.algorithms.base import Minibatches, concatenate, descend, make_optimizer, register
from domainbed.algorithms.erm import ERM

DECAY = 0.7


class LossAverages:
    """Each image's running average of the losses that some networks have on it, by environment e and position i there.

    ``average <- decay average + (1 - decay) loss``; it starts with the image's first loss.

    Args:
        num_networks: R.
        decay: in [0, 1).

    Attributes:
        values: (R, E, N); 0 for images that were not seen.
        labels: (E, N) int64; -1 for images that were not seen.
    """

    def __init__(self, num_networks: int, decay: float):
        self.decay = decay
        self.values = torch.zeros(num_networks, 0, 0)
        self.labels = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, losses: Tensor, y: Tensor, e: Tensor, i: Tensor) -> Tensor:
        """Takes in a step's losses (R, B) of images with labels y (B,), at e and i (B,); returns their averages (R, B).

        An image that the step has more than once is taken in once, with the mean of its losses.
        """
        self._grow(losses, int(e.max()) + 1, int(i.max()) + 1)
        same = (e[:, None] == e) & (i[:, None] == i)  # (B, B)
        means = (losses[:, None] * same).sum(-1) / same.sum(-1)
        old = self.values[:, e, i]
        averages = torch.where(self.labels[e, i] < 0, means, self.decay * old + (1 - self.decay) * means)
        self.values[:, e, i], self.labels[e, i] = averages, y
        return averages

    def _grow(self, losses: Tensor, num_environments: int, num_images: int) -> None:
        """Makes room, where the losses are and in their precision."""
        known_environments, known_images = self.labels.shape
        more = (0, max(num_images - known_images, 0), 0, max(num_environments - known_environments, 0))
        self.values = F.pad(self.values.to(losses), more)
        self.labels = F.pad(self.labels.to(losses.device), more, value=-1)

    def largest(self, num_classes: int) -> Tensor:
        """(R, K): the largest average of each class's images so far; 0 where there is none."""
        slot = (self.labels.flatten() + 1).expand(len(self.values), -1)  # 0: not seen
        largest = self.values.new_zeros(len(self.values), num_classes + 1)
        return largest.scatter_reduce(1, slot, self.values.flatten(1), "amax")[:, 1:]


@register
class LfF(ERM):
    """``mean_i W_i CE(f(x_i), y_i)``, weighted by how much harder than f a biased network b finds image i.

    ``W = L_b / (L_b + L_f + 1e-8)``. b, a second network, minimises the generalised cross-entropy ``(1 - p_y^q) / q``
    of its probability p_y of the label, whose gradient is ``p_y^q`` times that of the cross-entropy: it learns from
    what it already gets right. L_b and L_f are the two networks' cross-entropies of the image, each a running average
    with decay .7 over the steps that had the image, divided by the largest average of its class; constants for the
    gradient. Only f predicts. The averages are in snapshots and not in model files.

    Annotations: none in training; validation confounders for selection only.

    Source: Junhyun Nam, Hyuntak Cha, Sungsoo Ahn, Jaeho Lee and Jinwoo Shin, Learning from Failure: Training Debiased
        Classifier from Biased Classifier, NeurIPS 2020, https://arxiv.org/abs/2007.02561, Algorithm 1; running averages
        and their division as in the code published with it.
    Differs: that code multiplies the biased network's gradient by q once more, here it is that of the paper's formula.
        An image drawn twice in one step has one loss, the mean. ``lff_ema`` false is SubpopBench's variant (Yang et al.
        2023, https://arxiv.org/abs/2302.12254). Optimizer, steps and learning rate, of both networks, are DomainBed's.

    Hparams:
        lff_q: q in (0, 1]; towards 0 the biased network minimises the cross-entropy.
        lff_ema: weigh by the divided running averages, for which minibatches must tell which images they hold; if
            not, by the step's own losses as they are.
    """

    HPARAMS = {
        "lff_q": (0.7, lambda r: r.uniform(0.05, 0.95)),
        "lff_ema": (True, lambda r: True),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 < hparams["lff_q"] <= 1:
            raise ValueError(f"lff_q {hparams['lff_q']}: give the power of the probability, above 0 and at most 1")
        featurizer = networks.Featurizer(input_shape, hparams)
        classifier = networks.Classifier(featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.biased_network = nn.Sequential(featurizer, classifier)
        parameters = self.biased_network.parameters()
        self.biased_optimizer = make_optimizer(parameters, hparams["lr"], hparams["weight_decay"], hparams)
        self.num_classes = num_classes
        self.averages = LossAverages(2, DECAY)

    def step(self, loss: Tensor) -> None:
        """Takes one step of both networks' optimizers down the gradient of a scalar loss."""
        descend(loss, self.optimizer, self.biased_optimizer)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        identities = _identities(minibatches) if self.hparams["lff_ema"] else None
        losses = F.cross_entropy(self.predict(x), y, reduction="none")
        biased_losses = F.cross_entropy(self.biased_network(x), y, reduction="none")
        weights = self._weights(torch.stack([biased_losses, losses]).detach(), y, identities)
        loss = (weights * losses).mean()
        biased_loss = generalised_cross_entropy(biased_losses, self.hparams["lff_q"]).mean()
        self.step(loss + biased_loss)
        return {"loss": loss.item(), "biased_loss": biased_loss.item(), "mean_weight": weights.mean().item()}

    def _weights(self, losses: Tensor, y: Tensor, identities: tuple[Tensor, Tensor] | None) -> Tensor:
        """W (B,), of the biased and the other network's losses (2, B)."""
        if identities is not None:
            averages = self.averages.add(losses, y, *identities)
            largest = self.averages.largest(self.num_classes)[:, y]
            losses = averages / largest.clamp_min(torch.finfo(largest.dtype).tiny)  # a class may have no loss left
        return losses[0] / (losses.sum(0) + 1e-8)


def generalised_cross_entropy(cross_entropy: Tensor, q: float) -> Tensor:
    """``(1 - p^q) / q`` of the probabilities p whose cross-entropy ``-log p`` is given; exact for small q, too."""
    return -torch.expm1(-q * cross_entropy) / q


def _identities(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    """Environments e and positions i, (sum of B,) each, of all images of a step."""
    known: list[Any] = list(minibatches)
    if not all(hasattr(minibatch, "e") and hasattr(minibatch, "i") for minibatch in known):
        raise ValueError(
            "minibatches (x, y) came without their images' environments and positions, by which lff_ema averages their "
            "losses; set the hparam lff_ema to false, or draw them with the package's own loaders, whose minibatches "
            "carry `.e` and `.i`"
        )
    return torch.cat([minibatch.e for minibatch in known]), torch.cat([minibatch.i for minibatch in known])

"""ERM on balanced data: groups or labels sampled alike, cut to one size, or weighted in the loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, Task, concatenate, confounders, register
from domainbed.algorithms.erm import ERM


class Rebalanced(ERM):
    """ERM on a partition that balances what it trains on; nothing else is changed.

    Source: Badr Youbi Idrissi, Martin Arjovsky, Mohammad Pezeshki and David Lopez-Paz, Simple data balancing achieves
        competitive worst-group-accuracy, CLeaR 2022, https://arxiv.org/abs/2110.14503.
    """

    HPARAMS = {}


@register
class RWG(Rebalanced):
    """Every group equally often: an image of group g is drawn with a probability proportional to ``1 / n_g``.

    The same as ``ERM:group``. Needs training confounders, as many as there are (the images of a label that have none
    are a group of their own); validation's only for selection.

    Differs: each step holds equally many images of each group, where the source draws every image on its own.
    """

    HPARAMS = {}
    PARTITION = "group"


@register
class RWY(Rebalanced):
    """Every label equally often: an image of label y is drawn with a probability proportional to ``1 / n_y``.

    The same as ``ERM:label``. Needs no training confounders; validation's only for selection.

    Differs: each step holds equally many images of each label, where the source draws every image on its own.
    """

    HPARAMS = {}
    PARTITION = "label"


@register
class SUBG(Rebalanced):
    """Trains on a random subset, drawn once per seed, with as many images of each group as the smallest group has.

    Needs training confounders, as many as there are (the images of a label that have none are a group of their own);
    validation's only for selection. A small budget leaves few images of a group, hence few of all; a warning says so.

    Differs: the images of the subset are drawn with replacement, where the source passes through them in epochs.
    """

    HPARAMS = {}
    PARTITION = "group_subset"


@register
class SUBY(Rebalanced):
    """Trains on a random subset, drawn once per seed, with as many images of each label as the rarest label has.

    Needs no training confounders; validation's only for selection.

    Differs: the images of the subset are drawn with replacement, where the source passes through them in epochs.
    """

    HPARAMS = {}
    PARTITION = "label_subset"


class GroupWeighted(ERM):
    """A method whose risks are weighted by group: ``v_g = n_g^-p / mean over g' of n_g'^-p``.

    The mean is over the G groups that occur in training, so that their v sum to G. The images of a label whose
    confounder is not annotated are a group of their own.

    Hparams:
        reweight_power: p >= 0; 1 balances, .5 is by square roots, 0 weighs all alike.
    """

    HPARAMS = {"reweight_power": (1.0, lambda r: r.choice([0.5, 1.0]))}
    PARTITION = "random"
    NEEDS_CONFOUNDERS = True
    TAKES_HIDDEN = True
    CONTROL = {"reweight_power": 0.0}

    weights: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        num_domains: int,
        hparams: dict[str, Any],
        group_counts: Sequence[int] = (),
        hidden_counts: Sequence[int] = (),
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not sum(group_counts) + sum(hidden_counts):
            raise ValueError(
                f"{type(self).__name__} needs the number of training images of each group; take a dataset that knows "
                "its confounder and build with from_task, whose task has group_counts"
            )
        groups = torch.tensor(group_counts, dtype=torch.float64).view(num_classes, -1)
        hidden = torch.tensor(hidden_counts or [0] * num_classes, dtype=torch.float64).view(num_classes, 1)
        counts = torch.cat([groups, hidden], dim=1)  # (K, V + 1): column -1 is of confounder -1, not annotated
        self.register_buffer("weights", balancing_weights(counts, hparams["reweight_power"]), persistent=False)

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "GroupWeighted":
        counts = task.group_counts, task.hidden_counts
        return cls(task.input_shape, task.num_classes, task.num_domains, hparams, *counts)

    def weighted_risk(self, logits: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """``mean_i v_{g_i} loss_i`` of logits (B, K), labels and confounders (B,), -1 where not annotated."""
        risk = F.cross_entropy(logits, y, reduction="none")  # (B,)
        return (self.weights[y, c].to(risk.dtype) * risk).mean()


@register
class ReWeight(GroupWeighted):
    """Natural sampling, weighted loss: ``mean_i v_{g_i} loss_i``, with the weights of GroupWeighted.

    Needs training confounders, as many as there are; validation's only for selection. On a partition by group it would
    balance twice.

    Source: Nathalie Japkowicz, The Class Imbalance Problem: Significance and Strategies, IC-AI 2000; with these
        weights over groups as ReWeight and SqrtReWeight: Yuzhe Yang, Haoran Zhang, Dina Katabi and Marzyeh Ghassemi,
        Change is Hard: A Closer Look at Subpopulation Shift, ICML 2023, https://arxiv.org/abs/2302.12254.
    Differs: groups that are not annotated have a weight, too.
    """

    HPARAMS = {}

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        loss = self.weighted_risk(self.predict(x), y, confounders(minibatches))
        self.step(loss)
        return {"loss": loss.item()}


def balancing_weights(counts: Tensor, power: float) -> Tensor:
    """Loss weights ``n^-power``, divided by their mean over the groups that are not empty; 0 for empty ones.

    Args:
        counts: (G,) float64, images of each group, not all 0.

    Raises:
        ValueError: the power is negative or not finite.
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"hparam reweight_power is {power}: give a number of at least 0; 1 balances, 0 is ERM")
    weights = torch.where(counts > 0, counts.clamp_min(1) ** -power, 0.0)
    return weights / weights[counts > 0].mean()

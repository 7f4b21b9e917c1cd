"""Classifier re-training: features as the natural mix of images teaches them, a new classifier on balanced ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from domainbed import networks
from domainbed.algorithms.base import Minibatches, concatenate, confounders, make_optimizer, register
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.rebalancing import GroupWeighted
from domainbed.stages import Stage

if TYPE_CHECKING:
    from domainbed.samples import StageData


@register
class CRT(ERM):
    """ERM on the natural mix of images, then a new classifier on its frozen features, drawn by the run's partition.

    The second stage minimises ``mean l(w . phi(x) + b, y)`` over w and b alone, from new initial values; phi and its
    batch-norm statistics stay as the first stage left them. By group (the default) each group has the same weight:
    images that are not annotated count by label, so that without any annotation this is the source's class balance.
    Where no confounder is known at all take ``--partition label``; ``random`` retrains on the natural mix. Training
    confounders may be annotated for some images or for none; those of validation images serve selection.

    Source: Bingyi Kang, Saining Xie, Marcus Rohrbach, Zhicheng Yan, Albert Gordo, Jiashi Feng and Yannis Kalantidis,
        Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020,
        https://arxiv.org/abs/1910.09217 (cRT); by group: Yuzhe Yang, Haoran Zhang, Dina Katabi and Marzyeh
        Ghassemi, Change is Hard: A Closer Look at Subpopulation Shift, ICML 2023, https://arxiv.org/abs/2302.12254.
    Differs: groups in place of the first source's classes. The features of the second stage are computed once, of
        images that are not augmented, in evaluation mode.

    Hparams:
        crt_first_share: share of the run's updates that the first stage has.
    """

    HPARAMS = {"crt_first_share": (0.5, lambda r: r.uniform(0.2, 0.8))}
    PARTITION = "group"
    STAGES = (Stage("features", "crt_first_share", "random"), Stage("classifier", of_features=True))

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self._num_classes = num_classes
        self._is_frozen = False  # whether minibatches hold features

    def begin_stage(self, stage: str, data: "StageData") -> NDArray[np.float64] | None:
        """Puts the classifier into a state as when newly built, with an optimizer of its own."""
        is_nonlinear = self.hparams["nonlinear_classifier"]
        fresh = networks.Classifier(self.featurizer.n_outputs, self._num_classes, is_nonlinear)
        self.classifier.load_state_dict(fresh.state_dict())
        rates = self.hparams["lr"], self.hparams["weight_decay"]
        self.optimizer = make_optimizer(self.classifier.parameters(), *rates, self.hparams)
        self.zero_grad()  # the featurizer's would be kept for nothing
        self._is_frozen = True
        return None

    def stage_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.featurizer(x)
        return features

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if not self._is_frozen:
            return super().update(minibatches, unlabeled)
        loss = self.classifier_risk(minibatches)
        self.step(loss)
        return {"loss": loss.item()}

    def classifier_risk(self, minibatches: Minibatches) -> Tensor:
        """The scalar that the second stage minimises; minibatches hold features (B, D)."""
        features, y = concatenate(minibatches)
        return F.cross_entropy(self.classifier(features), y)


@register
class ReWeightCRT(GroupWeighted, CRT):
    """CRT on the natural mix in both stages: the second one balances groups by ``mean_i v_{g_i} l_i`` instead.

    The weights are those of GroupWeighted, so that without any annotation classes are balanced.
    Training confounders may be annotated for some images or for none; those of validation images serve selection. On
    a partition by group it would balance twice.

    Source: as of CRT; with weights in place of sampling: Yang et al. 2023.
    Differs: as CRT does; groups that are not annotated have a weight, too.
    """

    HPARAMS = {}
    PARTITION = "random"

    def classifier_risk(self, minibatches: Minibatches) -> Tensor:
        features, y = concatenate(minibatches)
        return self.weighted_risk(self.classifier(features), y, confounders(minibatches))

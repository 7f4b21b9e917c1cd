"""Matching the features of confounder values among images of one label: maximum mean discrepancy and CORAL."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, confounders, register
from domainbed.algorithms.mmd import AbstractMMD


class AbstractGivenLabel(AbstractMMD):
    """``risk + mmd_gamma * mean over (y, c, c') of the distance of the features of groups (y, c) and (y, c')``.

    The mean is over the labels y and the pairs c < c' of confounder values that a step holds, whichever minibatches
    their images are in; without a pair it is 0. Where confounder and label are correlated, matching P(z | c) itself
    would take the label out of the features z; P(z | c, y) can be the same for all c without that. The risk is ERM's,
    the mean over all images of the step, which is AbstractMMD's where minibatches are equally large.

    Training confounders: some are enough. Images without are left out of the penalty, not of the risk. Validation
    confounders: for selection only. Values returned: ``loss`` (the risk alone), ``penalty``, ``pairs`` (their number).

    Source: Maggie Makar, Ben Packer, Dan Moldovan, Davis Blalock, Yoni Halpern and Alexander D'Amour, Causally
        Motivated Shortcut Removal Using Auxiliary Labels, AISTATS 2022, https://arxiv.org/abs/2105.06422; given the
        label: Victor Veitch, Alexander D'Amour, Steve Yadlowsky and Jacob Eisenstein, Counterfactual Invariance to
        Spurious Correlations, NeurIPS 2021, https://arxiv.org/abs/2106.00545; when which of them is right: Jivat Neet
        Kaur, Emre Kiciman and Amit Sharma, Modeling the Data-Generating Process is Necessary for Out-of-Distribution
        Generalization, ICLR 2023, https://arxiv.org/abs/2206.07837.
    Differs: the distances are those of ``MMD`` and ``CORAL``, on features; Veitch et al. compare the predictions, and
        Makar et al. compare features over all labels at once, reweighted so that label and confounder are independent,
        which conditioning on the label stands in for. Any number of labels and confounder values.

    Hparams:
        mmd_gamma: weight of the penalty.
    """

    HPARAMS = {}
    PARTITION = "group"
    NEEDS_CONFOUNDERS = True
    TAKES_HIDDEN = True
    MIN_PARTS = 1

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        features = self.featurizer(x)
        risk = F.cross_entropy(self.classifier(features), y)
        distances = self.distances(features, y, confounders(minibatches))
        penalty = torch.stack(distances).mean() if distances else torch.zeros_like(risk)
        self.step(risk + self.hparams["mmd_gamma"] * penalty)
        return {"loss": risk.item(), "penalty": penalty.item(), "pairs": float(len(distances))}

    def distances(self, features: Tensor, y: Tensor, c: Tensor) -> list[Tensor]:
        """Of each label's pairs of confounder values, for features (N, D), labels and confounders (N,), -1: unknown.

        A covariance takes two images: for CORAL a group of one is left out.
        """
        groups = torch.where(c < 0, -1, y * (c.max() + 1) + c)
        found = []
        for label in y[c >= 0].unique():
            cells = [features[groups == group] for group in groups[(y == label) & (c >= 0)].unique()]
            enough = [cell for cell in cells if self.gaussian or len(cell) > 1]
            found += [self.mmd(one, other) for one, other in combinations(enough, 2)]
        return found


@register
class MMD_GivenLabel(AbstractGivenLabel):
    """Features whose distribution given the label is the same for all confounder values, under MMD's kernels.

    Sources, hparams and what it needs: ``AbstractGivenLabel``; the distance: ``MMD``.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=True)


@register
class CORAL_GivenLabel(AbstractGivenLabel):
    """Features whose mean and covariance given the label are the same for all confounder values.

    Groups of which a step holds a single image are left out of the penalty, since they have no covariance.
    Sources, hparams and what it needs: ``AbstractGivenLabel``; the distance: ``CORAL``.
    """

    HPARAMS = {}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=False)

"""Deep feature reweighting: ERM's features, and a last layer that learns every group alike."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from domainbed import logistic_regression
from domainbed.algorithms.base import Minibatches, register
from domainbed.algorithms.erm import ERM
from domainbed.logistic_regression import Linear
from domainbed.partitions import Examples
from domainbed.stages import Stage

if TYPE_CHECKING:
    from domainbed.samples import Sample, StageData

logger = logging.getLogger(__name__)


@register
class DFR(ERM):
    """ERM, then a new last layer: the mean of ``argmin_w ||w||_1 + C * sum_i loss(w z_i)`` over group-balanced subsets.

    All updates but the last are ERM's, by natural sampling. Before the last one the classifier is replaced: z are the
    standardised penultimate features of validation images; C is chosen on one half of them by the accuracy in the worst
    group after a fit to the other half, group-balanced; then the weights of ``dfr_averages`` fits, each to a fresh
    random subset with equally many images of each group, are averaged. The last update itself trains nothing.

    Annotations: none in training. It **trains on the validation images** whose confounder is annotated, and on no
    others; a label of which none is annotated takes all its images as one group, so that without annotations the groups
    are the labels. Its validation score is therefore measured on images that it has trained on: it is too good, above
    all with few images, and not to be compared with the validation scores of other methods.

    Source: Polina Kirichenko, Pavel Izmailov and Andrew Gordon Wilson, Last Layer Re-Training is Sufficient for
        Robustness to Spurious Correlations, ICLR 2023, https://arxiv.org/abs/2204.02937.
    Differs: features are standardised by all images of the split that the layer learns from, annotated or not (source:
        by the training images); C is tuned on halves of each group (source: halves of all images, which may lack a
        small group); more than two classes, which the source has not, are fitted each against all others; the
        intercept is penalised, as by the source's solver.

    Hparams:
        dfr_averages: number of fits that are averaged; 0 leaves ERM's last layer in place.
        dfr_c: C, the weight of the losses against the penalty; 0: tuned among 1, .7, .3, .1, .07, .03 and .01; where a
            group has one image, and tuning is impossible, that is 1.
    """

    HPARAMS = {"dfr_averages": (20, lambda r: 20), "dfr_c": (0.0, lambda r: 0.0)}
    CONTROL = {"dfr_averages": 0}
    PARTITION = "random"
    STAGES = (Stage("features"), Stage("last layer"))

    classifier: nn.Linear

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        _check_hparams(type(self).__name__, hparams)
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.found: dict[str, float] = {}  # once the last layer is replaced

    def sample(self, data: "StageData") -> "Sample":
        """The images that the last layer learns from.

        Raises:
            ValueError: there are none.
        """
        if not len(data.validation):
            raise ValueError(
                f"{type(self).__name__} learns its last layer from validation images, and there are none; give "
                "--holdout_fraction above 0, or take DFR_Training"
            )
        return data.validation

    def check_stages(self, data: "StageData") -> None:
        if self.hparams["dfr_averages"]:
            logistic_regression.check_classes(self.sample(data).examples.y, self.classifier.out_features)

    def begin_stage(self, stage: str, data: "StageData") -> None:
        if self.hparams["dfr_averages"]:
            self.found = self._replace_last_layer(self.sample(data))
        else:
            self.found = {"dfr_c": 0.0, "dfr_images_per_group": 0, "dfr_groups": 0}

    def _replace_last_layer(self, sample: "Sample") -> dict[str, float]:
        """Returns what was found on the way."""
        from sklearn.preprocessing import StandardScaler

        examples, k = sample.examples, self.classifier.out_features
        groups = known_groups(examples)
        used = groups >= 0
        features = self._features(sample)
        scaler = StandardScaler().fit(features)
        z, y, groups = scaler.transform(features[used]), examples.y[used], groups[used]
        # The draws start from torch's generator, whose state snapshots keep and whose seed is the run's.
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        c = self.hparams["dfr_c"] or logistic_regression.tuned_c(z, y, groups, k, rng)
        linear = logistic_regression.averaged(z, y, groups, k, c, self.hparams["dfr_averages"], rng)
        self._set(logistic_regression.folded(linear, scaler.mean_, scaler.scale_))
        counts = np.unique(groups, return_counts=True)[1]
        return {"dfr_c": float(c), "dfr_images_per_group": int(counts.min()), "dfr_groups": len(counts)}

    def _features(self, sample: "Sample") -> NDArray[np.float64]:
        features = sample.map(self.featurizer).double().numpy()
        if not np.isfinite(features).all():
            raise ValueError("the features are not finite, and no last layer can be fitted; train with a smaller lr")
        return features

    def _set(self, linear: Linear) -> None:
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(linear.weight))
            self.classifier.bias.copy_(torch.from_numpy(linear.bias))

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        return dict(self.found) or super().update(minibatches, unlabeled)


@register
class DFR_Training(DFR):
    """DFR whose last layer learns from the annotated training images; all else is as it is there.

    Annotations: of training images, as many as there are; without any the groups are the labels. Validation images are
    for selection only, and no score is measured on images that it has trained on.

    Differs: features as everywhere here of images that are not augmented; no search over weights of the classes; C is
        tuned on halves of the training images, where the source judges on validation images: where the features fit
        all of them, every weak penalty is as good, and C is 1; dfr_c gives another.

    Hparams:
        dfr_averages: number of fits that are averaged; 0 leaves ERM's last layer in place.
    """

    HPARAMS = {"dfr_averages": (10, lambda r: 10)}

    def sample(self, data: "StageData") -> "Sample":
        return data.training


def known_groups(examples: Examples) -> NDArray[np.int64]:
    """Groups (N,) to learn from: those of annotated images; one per label of which none is annotated; -1: of no use."""
    lacking = np.setdiff1d(examples.y, examples.y[examples.g >= 0])
    if len(lacking):
        logger.warning(
            "no confounder is annotated in the images of label %s; all of a label's images count as one group",
            ", ".join(map(str, lacking)),
        )
    beyond = examples.g.max() + 1
    return np.where(np.isin(examples.y, lacking), beyond + examples.y, examples.g)


def _check_hparams(name: str, hparams: dict[str, Any]) -> None:
    if hparams["nonlinear_classifier"]:
        raise ValueError(f"hparam nonlinear_classifier is true; {name} fits a linear last layer, set it to false")
    if not (isinstance(hparams["dfr_averages"], int) and hparams["dfr_averages"] >= 0):
        raise ValueError(
            f"hparam dfr_averages is {hparams['dfr_averages']!r}; give a number of fits, or 0 to keep ERM's last layer"
        )
    if not 0 <= hparams["dfr_c"] < np.inf:
        raise ValueError(f"hparam dfr_c is {hparams['dfr_c']!r}; give a weight above 0, or 0 to have it tuned")

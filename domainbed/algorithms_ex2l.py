"""eX2L: keep a label network's eyes off what a confounder network looks at; one row per similarity.

ALIGN, the second method that this package is about, stands in ``algorithms/align.py`` and can be had from here too.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from domainbed import similarities
from domainbed.algorithms.align import ALIGN, ALIGN_GivenMask, ALIGN_GrayMask, ALIGN_NoGuidance  # noqa: F401
from domainbed.algorithms.base import Minibatches, concatenate, confounders, register
from domainbed.algorithms.explained import check_not_negative
from domainbed.algorithms.two_networks import TwoNetworks, accuracy, annotated, risk, watched


class EX2L(TwoNetworks):
    """Two classifiers, and a price on looking at the same pixels; a row names the similarity s.

    ``L = CE(f(x), y) + lambda_1 CE(g(x), c) + lambda_2 mean_i s(H^Y_i, H^C_i)``

    f is the label network (K logits), g the confounder network (V logits), both with a featurizer of their own.
    H^Y_i (h, w) is Grad-CAM of logit y_i of f on image i, H^C_i that of logit c_i of g: with the maps A (C, h, w)
    of the featurizer's ``map_layer`` and Z = h w pixels, ``H = ReLU(sum_k w_k A_k)``,
    ``w_k = (1 / Z) sum_p d logit / d A_kp``. One forward of each network, one backward of the sum, one step of each
    network's optimizer. Only f predicts. Where the annotation budget hides c, an image counts for the risk of f alone:
    the other two terms are means over the annotated images of a step, 0 without any. docs/ex2l.md has every reading of
    the paper that the hparams choose among. Training confounders are needed, of some images at least; validation
    confounders only for selection.

    Source: Medina, Minoza, Ibanez 2026, "eXplaining to Learn (eX2L): Regularization Using Contrastive Visual
    Explanation Pairs for Distribution Shifts", https://arxiv.org/abs/2605.06368, equations 2 to 4.

    Differs (docs/ex2l.md has the reasons at length):
        The paper calls the heatmap detached, with which lambda_2 would have no effect at all. Here the weights w
        are constants and the maps A are live: no second derivatives, yet a penalty that trains both networks.
        Heatmaps are put on a common scale before they are compared, for s must not fall by scaling one of them.
        Images with an all-zero heatmap are left out of the mean: where a network looks is not defined for them.
        lambda_2 is .3 and drawn from 10^U(-2, 1), not 10^U(-1, 2): at 1 most of our first runs collapsed.
        Adam in place of SGD, since the learning rates of the paper are those of DomainBed, tuned for Adam.

    Hparams:
        lambda_1: weight of the confounder network's risk.
        lambda_2: weight of the similarity.
        lambda_2_ramp: updates in which that weight grows from 0, linearly; 0: it is constant.
        similarity_gradient: through whose heatmap: "both", "label" or "confounder".
        map_normalisation: "own" (the similarity's), or one of ``similarities.NORMALISATIONS``.
        map_gradient and the others of ``TwoNetworks``.
    """

    PARTITION = "group"
    TAKES_HIDDEN = True
    CONTROL = {"map_gradient": "none"}
    SIMILARITY: ClassVar[str]
    update_count: Tensor
    HPARAMS = {
        "lambda_1": (1.0, lambda r: 10 ** r.uniform(-1, 2)),
        "lambda_2": (0.3, lambda r: 10 ** r.uniform(-2, 1)),
        "lambda_2_ramp": (0, lambda r: 0),
        "similarity_gradient": ("both", lambda r: "both"),
        "map_normalisation": ("own", lambda r: "own"),
    }
    CHOICES = {
        **TwoNetworks.CHOICES,
        "similarity_gradient": ("both", "label", "confounder"),
        "map_normalisation": ("own", *similarities.NORMALISATIONS),
    }

    def __init__(self, *task: Any, **options: Any):
        super().__init__(*task, **options)
        self.similarity = similarities.REGISTRY[self.SIMILARITY]
        chosen = self.hparams["map_normalisation"]
        self.normalisation = self.similarity.normalisation if chosen == "own" else chosen
        self.similarity.check(self.normalisation, self.hparams["map_relu"])
        check_not_negative(self.hparams, "lambda_1", "lambda_2", "lambda_2_ramp")
        self.register_buffer("update_count", torch.zeros((), dtype=torch.int64))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        c = confounders(minibatches)
        (label_logits, label_maps), (confounder_logits, confounder_maps) = self.explain(x, y, c)
        known = annotated(c)
        c, confounder_logits = c[known], confounder_logits[known]
        label_loss, confounder_loss = risk(label_logits, y), risk(confounder_logits, c)
        similarity, values = self.mean_similarity(label_maps[known], confounder_maps[known])
        loss = label_loss + self.hparams["lambda_1"] * confounder_loss + self.similarity_weight() * similarity
        self.step(loss)
        self.update_count += 1
        return {
            "loss": loss.item(),
            "label_loss": label_loss.item(),
            "confounder_loss": confounder_loss.item(),
            "confounder_acc": accuracy(confounder_logits, c),
            **values,
        }

    def similarity_weight(self) -> float:
        """The weight of the similarity in this update."""
        ramp = self.hparams["lambda_2_ramp"]
        grown = min(1.0, (self.update_count.item() + 1) / ramp) if ramp else 1.0
        return float(grown * self.hparams["lambda_2"])

    def mean_similarity(self, label_maps: Tensor, confounder_maps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean of s over the images with two live heatmaps (0 if there are none), and what to watch of the maps."""
        values = watched(label_maps, confounder_maps)
        if not len(label_maps):
            return label_maps.sum(), {"similarity": 0.0, **values}
        if self.hparams["similarity_gradient"] == "label":
            confounder_maps = confounder_maps.detach()
        elif self.hparams["similarity_gradient"] == "confounder":
            label_maps = label_maps.detach()
        alive = similarities.is_live(label_maps) & similarities.is_live(confounder_maps)  # (B,)
        scores = self.similarity(label_maps, confounder_maps, self.normalisation)
        mean = (scores * alive).sum() / alive.sum().clamp_min(1)
        return mean, {"similarity": mean.item(), **values}


@register
class EX2L_MAE(EX2L):
    """eX2L with ``s = -mean_p |H^Y_p - H^C_p|``, maps divided by their maximum.

    Source: eX2L, equation 19; the paper's best row on Spawrious M2M-Hard.
    """

    SIMILARITY = "mae"
    HPARAMS = {}


@register
class EX2L_MSE(EX2L):
    """eX2L with ``s = -mean_p (H^Y_p - H^C_p)^2``, maps divided by their maximum.

    Source: eX2L, equation 20.
    """

    SIMILARITY = "mse"
    HPARAMS = {}


@register
class EX2L_RMSE(EX2L):
    """eX2L with the root of the mean squared difference, negative, maps divided by their maximum.

    Source: eX2L, equation 21.
    """

    SIMILARITY = "rmse"
    HPARAMS = {}


@register
class EX2L_SoftIoU(EX2L):
    """eX2L with the soft intersection over union of the maps, divided by their maximum.

    Source: eX2L, equation 22.
    """

    SIMILARITY = "soft_iou"
    HPARAMS = {}


@register
class EX2L_KL(EX2L):
    """eX2L with the negative divergence of the label map from the confounder map, as distributions over pixels.

    Source: eX2L, equation 23.
    """

    SIMILARITY = "kl"
    HPARAMS = {}


@register
class EX2L_JSDivergence(EX2L):
    """eX2L with the negative Jensen-Shannon divergence of the maps as distributions over pixels.

    Source: eX2L, equation 24.
    """

    SIMILARITY = "js_divergence"
    HPARAMS = {}


@register
class EX2L_JSDistance(EX2L):
    """eX2L with the negative Jensen-Shannon distance of the maps as distributions over pixels.

    Source: eX2L, equations 24 and 25.
    """

    SIMILARITY = "js_distance"
    HPARAMS = {}


@register
class EX2L_Cosine(EX2L):
    """eX2L with the cosine of the angle between the two maps.

    Source: eX2L, equation 26.
    """

    SIMILARITY = "cosine"
    HPARAMS = {}


@register
class EX2L_NCC(EX2L):
    """eX2L with the correlation of the two maps over their pixels.

    Source: eX2L, equation 27.
    """

    SIMILARITY = "ncc"
    HPARAMS = {}


@register
class EX2L_SSIM(EX2L):
    """eX2L with the structural similarity of the whole maps, divided by their maximum.

    Source: eX2L, equations 28 to 33.
    """

    SIMILARITY = "ssim"
    HPARAMS = {}


@register
class EX2L_SoftDice(EX2L):
    """eX2L with ``s = 2 sum_p H^Y_p H^C_p / sum_p (H^Y_p + H^C_p)``, maps divided by their maximum.

    Source: eX2L, equation 34.
    """

    SIMILARITY = "soft_dice"
    HPARAMS = {}

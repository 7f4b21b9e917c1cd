"""CARE: heatmaps that are high inside given masks and low outside."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import register
from domainbed.algorithms.given_masks import GivenMasksERM, mean_over

LEAST_AREA = 1e-4  # of a map's pixel: a mask, or what it leaves, below that is rounding


def mean_inside(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean (B,) of maps (B, h, w), weighted by masks (B, h, w); 0 where a mask is empty."""
    return (maps * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(LEAST_AREA)


@register
class CARE(GivenMasksERM):
    """ERM, then heatmaps pushed up inside the mask, to a mean that is enough, and down outside.

    ``L = mean_i CE_i + lambda mean_i (out_i - min(in_i, tau))`` after the first updates, the second mean over images
    with a mask. in and out are the means of M~ inside and outside the mask, M~ the Grad-CAM of the label on the scale
    [0, 1], both signs kept.

    Source: Zhuang, Cai, Zhang, Zheng and Wang 2023, Class Attention to Regions of Lesion for Imbalanced Medical Image
        Recognition, https://arxiv.org/abs/2307.10036; first at MIDL 2019, PMLR 102:588-597. Formula, normalisation
        and numbers are those of the authors' published code.
    Differs: the given mask stands where the source has the lesion's bounding box, and a mask's soft edge counts in
        part on both sides. All classes are guided; there only rare ones have boxes. The comparison is made at the map's
        size, not with the map enlarged to the image's. Pixels outside weigh the same (the code could let their weight
        grow with the distance from the box, but does not by default). There L is (1 - a) mean CE + a times the *sum*
        over the annotated images with a = .01, which at the source's batch of 96, all annotated, is lambda = .97 here.
        There the second phase begins with a new optimizer; learning rate and steps are DomainBed's here.

    Hparams:
        care_lambda: weight of the second term; 0: plain ERM throughout (range: ours).
        care_tau: tau, a mean inside the mask that is enough; a higher one is not rewarded (range: ours).
        care_warmup: updates of plain ERM (default and range: ours).
        map_relu, map_normalisation: false and "minmax_live", which are the source's.
        map_gradient, map_layer, map_method: of ``ExplainedERM``.
    """

    PREFIX = "care"
    HPARAMS = {
        "care_lambda": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "care_tau": (0.5, lambda r: r.uniform(0.3, 0.9)),
        "care_warmup": (200, lambda r: int(10 ** r.uniform(1.5, 3))),
    }
    CONTROL = {"care_lambda": 0.0}

    def guide(
        self, logits: Tensor, y: Tensor, heatmaps: Tensor, mask: Tensor, comparable: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        maps = self.normalised(heatmaps)
        inside, outside = mean_inside(maps, mask), mean_inside(maps, 1 - mask)  # (B,) each
        attention = mean_over(outside - inside.clamp(max=self.hparams["care_tau"]), comparable)
        means = {"map_inside": mean_over(inside, comparable), "map_outside": mean_over(outside, comparable)}
        return F.cross_entropy(logits, y), attention, {name: mean.item() for name, mean in means.items()}

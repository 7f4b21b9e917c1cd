"""GRADIA: heatmaps that follow given masks, most where the label is right for a wrong reason."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import register
from domainbed.algorithms.given_masks import GivenMasksERM, energy_inside, mean_over
from domainbed.lib.misc import predicted_labels
from domainbed.similarities import EPS


def soft_target(mask: Tensor) -> Tensor:
    """Masks (B, h, w) after a 3 x 3 Gaussian, divided by their maximum; one of zeros stays one.

    The kernel is the outer product of (1, 2, 1) / 4 with itself, and the image goes on mirrored about its outermost
    pixels: OpenCV's for this size.
    """
    padded = F.pad(mask[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    return blurred / blurred.amax(dim=(1, 2), keepdim=True).clamp_min(EPS)


@register
class GRADIA(GivenMasksERM):
    """ERM, then heatmaps pulled to the masks, most where the label is right for a wrong reason.

    ``L = mean_i p_i CE_i + lambda mean_{i: a_i > 0} a_i mean_p |M~_ip - M_ip|`` after the first updates. M~ is the
    Grad-CAM of the label on the scale [0, 1], both signs kept; M the mask at its size, slightly blurred, divided by its
    maximum. The constants (p_i, a_i) depend on whether the map is reasonable and the prediction right::

                      wrong     right
        unreasonable  1, 1      .4, 1.6
        reasonable    .8, .2    1, 0

    Images without a mask have (1, 0). A map is reasonable if at least ``gradia_reasonable`` of its positive part lies
    in M. A half means that most of what speaks for the label does; on DigitsO2O it is midway between a map that equals
    the mask, .72 on average, and one that is the same everywhere, .27.

    Source: Gao, Sun, Zhao and Hong 2022, Aligning Eyes between Humans and Deep Neural Network through Interactive
        Attention Alignment, PACM HCI 6 (CSCW2), https://arxiv.org/abs/2202.02838, with the numbers and the
        normalisations of the authors' published code.
    Differs: there people look at each map once, between the phases, and say which are reasonable; here the rule above
        does, with the maps and predictions of each update. There the second phase trains on the validation images too,
        has an optimizer of its own, and passes each image through the network a second time, alone, for its map; here
        one run goes on with its optimizer and its images, and maps come from the pass that gives the loss. Areas are
        averaged exactly only where the map's size divides the mask's. Learning rate and steps are DomainBed's.

    Hparams:
        gradia_lambda: weight of the second term; 0: plain ERM throughout (range: ours).
        gradia_warmup: updates of plain ERM (default and range: ours).
        gradia_reasonable: least share inside the mask of a reasonable map (default and range: ours).
        map_relu, map_normalisation: false and "minmax_live", which are the source's.
        map_gradient, map_layer, map_method: of ``ExplainedERM``.
    """

    PREFIX = "gradia"
    WEIGHTS = (((1.0, 1.0), (0.4, 1.6)), ((0.8, 0.2), (1.0, 0.0)))  # by reasonable and right: (risk, attention)
    HPARAMS = {
        "gradia_lambda": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "gradia_warmup": (200, lambda r: int(10 ** r.uniform(1.5, 3))),
        "gradia_reasonable": (0.5, lambda r: r.uniform(0.3, 0.8)),
    }
    CONTROL = {"gradia_lambda": 0.0}

    def guide(
        self, logits: Tensor, y: Tensor, heatmaps: Tensor, mask: Tensor, comparable: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        target = soft_target(mask)
        reasonable = energy_inside(heatmaps, target) >= self.hparams["gradia_reasonable"]
        right = predicted_labels(logits) == y
        table = torch.tensor(self.WEIGHTS, device=heatmaps.device)
        on_risk, on_attention = table[reasonable.long(), right.long()].unbind(1)  # (B,) each
        on_risk = torch.where(comparable, on_risk, 1.0)
        on_attention = torch.where(comparable, on_attention, 0.0)
        distance = (self.normalised(heatmaps) - target).abs().mean(dim=(1, 2))  # (B,)
        risk = (on_risk * F.cross_entropy(logits, y, reduction="none")).mean()
        attention = mean_over(on_attention * distance, on_attention > 0)
        return risk, attention, {"reasonable": mean_over(reasonable, comparable).item()}

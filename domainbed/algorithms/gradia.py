"""Heatmaps that follow given masks: what such methods share, and GRADIA."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Algorithm, Minibatches, Task, concatenate, masks, register
from domainbed.algorithms.explained import ExplainedERM, check_not_negative, report_warmup
from domainbed.lib.misc import predicted_labels
from domainbed.masking import at_size
from domainbed.similarities import EPS

FLATNESS = 1e-6  # a map whose values differ by less than this fraction of the largest one looks nowhere


def energy_inside(heatmaps: Tensor, mask: Tensor) -> Tensor:
    """Share (B,) of what is positive in heatmaps (B, h, w) that lies inside masks (B, h, w); 0 if nothing is.

    Source: the energy-based pointing game of Score-CAM, Wang et al. 2020, https://arxiv.org/abs/1910.01279.
    """
    positive = heatmaps.detach().relu()
    return (positive * mask).sum(dim=(1, 2)) / positive.sum(dim=(1, 2)).clamp_min(EPS)


def is_flat(heatmaps: Tensor) -> Tensor:
    """Which heatmaps (B, h, w) have the same value everywhere, up to rounding: (B,) bool."""
    low, high = heatmaps.detach().flatten(1).aminmax(dim=1)
    return high - low <= FLATNESS * torch.maximum(low.abs(), high.abs()).clamp_min(EPS)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the values (B,) that are chosen (B,); 0 if none is."""
    return (values * chosen).sum() / chosen.sum().clamp_min(1)


class GivenMasksERM(ExplainedERM):
    """ERM for some updates; then heatmaps, on the scale [0, 1], are compared with given masks (1: should matter).

    A subclass says how, in ``guide``, and gives ``PREFIX``: its hparams are ``{PREFIX}_lambda`` (0: ERM throughout)
    and ``{PREFIX}_warmup`` (updates). An image whose mask is empty counts as one without annotation, as in the sources
    of these methods: its heatmap is not compared. Nor is a flat one, whose scale could be anything.
    """

    NEEDS_MASKS = True
    PREFIX: ClassVar[str]
    HPARAMS = {}
    update_count: Tensor

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, f"{self.PREFIX}_lambda", f"{self.PREFIX}_warmup")
        self.register_buffer("update_count", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> Algorithm:
        report_warmup(cls.__name__, hparams[f"{cls.PREFIX}_warmup"], task.steps)
        return super().from_task(task, hparams)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        given = masks(minibatches)
        logits, heatmaps = self.explained(x, y)
        mask = at_size(given, heatmaps.shape[1:])
        comparable = (mask.amax(dim=(1, 2)) > 0) & ~is_flat(heatmaps)  # (B,)
        risk, attention, values = self.guide(logits, y, heatmaps, mask, comparable)
        weight = self.attention_weight()
        loss = risk + weight * attention if weight else F.cross_entropy(logits, y)
        self.step(loss)
        self.update_count += 1
        return {
            "loss": loss.item(),
            "attention_loss": attention.item(),
            "energy_in_mask": mean_over(energy_inside(heatmaps, mask), comparable).item(),
            "comparable_maps": comparable.float().mean().item(),
            **values,
        }

    def attention_weight(self) -> float:
        """The weight of the comparison in this update."""
        warm = int(self.update_count) >= self.hparams[f"{self.PREFIX}_warmup"]
        return float(self.hparams[f"{self.PREFIX}_lambda"]) if warm else 0.0

    def guide(
        self, logits: Tensor, y: Tensor, heatmaps: Tensor, mask: Tensor, comparable: Tensor
    ) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        """Risk and attention loss (scalars), and what to watch.

        Args:
            logits: (B, K).
            y: (B,).
            heatmaps: (B, h, w), of y, not yet normalised.
            mask: (B, h, w) in [0, 1].
            comparable: (B,) bool, which images have a mask and a heatmap that say something.
        """
        raise NotImplementedError


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

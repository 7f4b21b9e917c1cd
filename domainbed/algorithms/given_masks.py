"""ERM whose heatmaps are compared with given masks, after a warm-up: what such methods share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.algorithms.base import Algorithm, Minibatches, Task, concatenate, masks
from domainbed.algorithms.explained import ExplainedERM, check_not_negative, report_warmup
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

"""Selective augmentation: mixing within a label across confounders, or within a confounder across labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from domainbed.algorithms.base import Minibatches, concatenate, confounders, register
from domainbed.algorithms.erm import ERM
from domainbed.algorithms.explained import check_choices, check_not_negative
from domainbed.algorithms.mixup import mixed

MIXES = ("mixup", "cutmix")


@register
class LISA(ERM):
    """Trains on mixtures of an image with one that shares its label or its confounder, and not both.

    ``mean_i l_i CE(f(x~_i), y_i) + (1 - l_i) CE(f(x~_i), y_j)``, ``x~_i = l_i x_i + (1 - l_i) x_j``,
    ``l_i ~ Beta(alpha, alpha)`` for each image. With probability ``lisa_p_sel`` a step mixes within a label (``y_j =
    y_i``, ``c_j != c_i``), else within a confounder (``c_j = c_i``, ``y_j != y_i``). j is drawn uniformly among the
    eligible images of the step, in all minibatches; an image for which there is none stays as it is. With CutMix x~_i
    is x_i with a box of x_j, and ``1 - l_i`` its share of the pixels. All draws are of numpy's global generator.

    Annotations: training confounders, as far as there are any: "not annotated" counts as one more confounder value.
    Thus without annotations nothing is mixed within a label, and all that differ in it otherwise. Validation
    confounders for selection only.

    Source: Huaxiu Yao, Yu Wang, Sai Li, Linjun Zhang, Weixin Liang, James Zou and Chelsea Finn, Improving
        Out-of-Distribution Robustness via Selective Augmentation, ICML 2022, https://arxiv.org/abs/2201.00299; the box:
        Sangdoo Yun et al., CutMix, ICCV 2019, https://arxiv.org/abs/1905.04899.
    Differs: the published code draws the two sides of a mixture from one loader for each group; here both are of one
        step, which the ``group`` partition balances. Images that are not annotated take part. Adam, steps and learning
        rate are DomainBed's, ranges SubpopBench's (Yang et al. 2023, https://arxiv.org/abs/2302.12254).

    Hparams:
        lisa_p_sel: probability of mixing within a label, in [0, 1].
        lisa_alpha: of the Beta distribution, not negative; 0: nothing is mixed, as in ERM on this partition.
        lisa_mix: "mixup", or "cutmix", for images only.
    """

    NEEDS_CONFOUNDERS = True
    TAKES_HIDDEN = True
    PARTITION = "group"
    HPARAMS = {
        "lisa_p_sel": (0.5, lambda r: r.uniform(0, 1)),
        "lisa_alpha": (2.0, lambda r: 10 ** r.uniform(-1, 1)),
        "lisa_mix": ("mixup", lambda r: r.choice(["mixup", "cutmix"])),
    }
    CONTROL = {"lisa_alpha": 0.0}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not 0 <= hparams["lisa_p_sel"] <= 1:
            raise ValueError(f"lisa_p_sel {hparams['lisa_p_sel']}: give a probability, from 0 to 1")
        check_not_negative(hparams, "lisa_alpha")
        check_choices(hparams, {"lisa_mix": MIXES})
        if hparams["lisa_mix"] == "cutmix" and len(input_shape) != 3:
            raise ValueError(f"lisa_mix cutmix needs images (C, H, W), got inputs {tuple(input_shape)}; take mixup")

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.hparams["lisa_alpha"] == 0:
            return super().update(minibatches, unlabeled)
        x, y = concatenate(minibatches)
        c = confounders(minibatches)
        within_label = np.random.random() < self.hparams["lisa_p_sel"]
        shared, other = (y, c) if within_label else (c, y)
        partner, found = partners((shared[:, None] == shared) & (other[:, None] != other))
        images, share = self._mixed(x, x[partner], found)
        logits = self.predict(images)
        own, others = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[partner]))
        loss = mixed(share, own, others).mean()
        self.step(loss)
        return {"loss": loss.item(), "mixed": found.float().mean().item()}

    def _mixed(self, x: Tensor, x2: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtures of images x and x2 (B, ...) where a partner was found (B,), and the share (B,) of x in them."""
        alpha = self.hparams["lisa_alpha"]
        share = np.random.beta(alpha, alpha, size=len(x))
        if self.hparams["lisa_mix"] == "cutmix":
            height, width = x.shape[-2:]
            box = boxes(share, height, width, x.device) & found[:, None, None]
            return torch.where(box[:, None], x2, x), 1 - box.to(x.dtype).mean((1, 2))
        shares = torch.where(found, torch.from_numpy(share).to(x), 1)
        return mixed(shares, x, x2), shares


def partners(eligible: Tensor) -> tuple[Tensor, Tensor]:
    """For each row one of the columns that are True, uniformly drawn; itself where there is none.

    Args:
        eligible: (B, B) bool.

    Returns:
        The columns (B,) int64, and whether there is one (B,) bool.
    """
    counts = eligible.sum(1)
    draws = torch.from_numpy(np.random.random(len(eligible))).to(eligible.device)
    wanted = (draws * counts).long()  # the how manieth of the row's columns
    columns = (eligible.cumsum(1) <= wanted[:, None]).sum(1)
    found = counts > 0
    return torch.where(found, columns, torch.arange(len(eligible), device=eligible.device)), found


def boxes(share: NDArray[np.float64], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """CutMix's boxes (B, height, width), True inside: of area ``1 - share``, clipped where they leave the image.

    A box has the sides ``sqrt(1 - share)`` of the image's, rounded to pixels, and a centre that is uniform in it.

    Args:
        share: (B,) float64 in [0, 1], what is left of the image.
    """
    sides = np.sqrt(1 - share)
    rows, columns = (_intervals(sides * size, size).to(device) for size in (height, width))
    return rows[:, :, None] & columns[:, None, :]


def _intervals(lengths: NDArray[np.float64], size: int) -> Tensor:
    """(B, size) bool: the pixels within half the length (B,) of a centre drawn in [0, size)."""
    lengths = np.rint(lengths)
    starts = np.rint(np.random.random(len(lengths)) * size - lengths / 2)
    pixels = np.arange(size)
    return torch.from_numpy((pixels >= starts[:, None]) & (pixels < (starts + lengths)[:, None]))

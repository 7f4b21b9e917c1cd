"""ALIGN: a masker learns what the classifier needs to see, and the classifier to look where the mask is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed.algorithms.base import Minibatches, Task, concatenate, descend, make_optimizer, masks, register
from domainbed.algorithms.dre import DRE
from domainbed.algorithms.explained import check_not_negative, map_layer, report_warmup
from domainbed.feature_maps import capture, evaluating
from domainbed.maskers import ConvMasker, MapMasker, total_variation
from domainbed.masking import FILLS, at_size, fill, keep
from domainbed.similarities import normalise

EPS = 1e-3  # least value of a heatmap and of its complement in a cross-entropy


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients of its weights, for the time being."""
    learning = [weight for weight in network.parameters() if weight.requires_grad]
    try:
        for weight in learning:
            weight.requires_grad_(False)
        with evaluating(network):
            yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


def alignment(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean binary cross-entropy, nats, of heatmaps (B, h, w) in [0, 1] as predictions of masks (B, h, w) in [0, 1].

    Heatmaps are moved to [EPS, 1 - EPS] linearly; a clamp would have no gradient at 0 and 1, where many values are.
    """
    with torch.autocast(maps.device.type, enabled=False):
        return F.binary_cross_entropy(EPS + (1 - 2 * EPS) * maps.float(), mask.float())


class MaskGuided(DRE):
    """DRE whose heatmaps follow masks once the classifier is warm; whose masks is the subclass's to say.

    ``CE(f(x), y) + lambda_3 BCE(H, M) + lambda_4 R``: H (h, w) is the heatmap of the label on the scale [0, 1], M the
    mask, a constant, R the regulariser of ``DRE``. In the warm-up lambda_3 counts as 0.

    Hparams:
        lambda_3, lambda_4: weights of the alignment and of the regulariser.
        warmup_steps: updates without alignment.
        warmup_frac: these as a fraction of the run's updates; 0: warmup_steps counts.
        align_at: compare heatmap and mask at the size of the "maps" (the mask averaged over areas) or of the "image".
        map_relu, map_normalisation: of the heatmaps, as are the others of ``DRE``.
    """

    HPARAMS = {
        "lambda_3": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "lambda_4": (1.0, lambda r: 10 ** r.uniform(-1, 0.5)),
        "warmup_steps": (200, lambda r: int(10 ** r.uniform(1.5, 3))),
        "warmup_frac": (0.0, lambda r: 0.0),
        "align_at": ("maps", lambda r: "maps"),
    }
    CONTROL = {"lambda_3": 0.0}
    CHOICES = {**DRE.CHOICES, "align_at": ("maps", "image")}

    update_count: Tensor

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any], steps: int = 0
    ):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_not_negative(hparams, "lambda_3", "lambda_4", "warmup_steps", "warmup_frac")
        if hparams["warmup_frac"] > 1:
            raise ValueError(f"warmup_frac {hparams['warmup_frac']}: give a fraction of the run, from 0 to 1")
        fraction = hparams["warmup_frac"] if steps else 0
        self.warmup = round(fraction * steps) if fraction else hparams["warmup_steps"]
        self.register_buffer("update_count", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_task(cls, task: Task, hparams: dict[str, Any]) -> "MaskGuided":
        found = cls(task.input_shape, task.num_classes, task.num_domains, hparams, task.steps)
        report_warmup(cls.__name__, found.warmup, task.steps)
        return found

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        x, y = concatenate(minibatches)
        warm = int(self.update_count) >= self.warmup
        values = self.learn_masks(x, y) if warm else {}
        values |= self.update_classifier(x, y, self.target_masks(x, minibatches) if warm else None)
        self.update_count += 1
        return values

    def learn_masks(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """What comes before the classifier's step; where masks are not learned, nothing."""
        return {}

    def target_masks(self, x: Tensor, minibatches: Minibatches) -> Tensor:
        """The masks (B, H, W) in [0, 1] of the images x (B, C, H, W) of the minibatches, without graph."""
        raise NotImplementedError

    def update_classifier(self, x: Tensor, y: Tensor, target: Tensor | None) -> dict[str, float]:
        """One step of the classifier, whose heatmaps follow the target masks (B, H, W) if there are any."""
        logits, heatmaps = self.explained(x, y)
        maps, risk = self.normalised(heatmaps), F.cross_entropy(logits, y)
        regulariser, values = self.regulariser(x, y, maps) if self.hparams["lambda_4"] else (0.0, {})
        loss = risk + self.hparams["lambda_4"] * regulariser
        if target is not None:
            aligned = self.alignment(maps, target)
            values["alignment"] = aligned.item()
            if self.hparams["lambda_3"]:
                loss = loss + self.hparams["lambda_3"] * aligned
        self.step(loss)
        return {"loss": loss.item(), "risk": risk.item(), **values}

    def alignment(self, maps: Tensor, target: Tensor) -> Tensor:
        """``alignment`` of heatmaps (B, h, w) with masks (B, H, W), at the size that the hparam names."""
        if self.hparams["align_at"] == "maps":
            return alignment(maps, at_size(target, maps.shape[1:]))
        return alignment(F.interpolate(maps[:, None], size=target.shape[1:], mode="bilinear")[:, 0], target)


@register
class ALIGN(MaskGuided):
    """A masker M and a classifier f trained in turn; f's heatmaps follow the masks, which M learns from f alone.

    Masker: ``mean (f_y(x M) - f_y(x (1 - M)) - 1)^2 + lambda_1 mean M + lambda_2 TV(M)``, f fixed; f_y is the
    probability of the label, TV the total variation, and what a mask hides shows a fill.
    Classifier: ``CE(f(x), y) + lambda_3 BCE(H, M) + lambda_4 R``, M fixed, as in ``MaskGuided``. First the classifier
    is trained alone, then each update takes a step of the masker and one of the classifier. Only f predicts, on the
    whole image. Without lambda_3 the classifier is DRE's, as in the paper's ablation (but for its random draws,
    which the masker's first weights shift).

    Source: Hong, Chen, Chen, Lin, Chen and Liao 2025, From Attribution to Action: Jointly ALIGNing Predictions and
        Explanations, https://arxiv.org/abs/2511.06944.
    Differs: the paper leaves masker, weights, regulariser and alternation open; docs/explanation_guided.md lists our
        readings. Its warm-up of 200 epochs, several times DomainBed's whole budget, is 200 updates here.

    Hparams (the masker's defaults: proposals; for small images, chosen on DigitsO2O, docs/findings.md):
        lambda_1, lambda_2: weights of the mask's area and of its total variation.
        lambda_3 and the others of ``MaskGuided``.
        masker: "conv", a network of its own (``ConvMasker``), or "features", on the classifier's feature maps.
        mask_start: about what masks are before they are learned, in (0, 1).
        masker_lr: of the masker's Adam.
        masker_steps: steps of the masker in each update.
        mask_fill: what a masked pixel shows, one of ``masking.FILLS``; the mean colour is that of all images so far.
    """

    HPARAMS = {
        "lambda_1": lambda dataset: (0.6 if dataset.small else 0.1, lambda r: 10 ** r.uniform(-2, 0)),
        "lambda_2": lambda dataset: (0.5 if dataset.small else 0.1, lambda r: 10 ** r.uniform(-2, 0)),
        "masker": ("conv", lambda r: "conv"),
        "mask_start": lambda dataset: (0.12 if dataset.small else 0.5, lambda r: r.uniform(0.1, 0.9)),
        "masker_lr": lambda dataset: (3e-3 if dataset.small else 1e-3, lambda r: 10 ** r.uniform(-4, -2.5)),
        "masker_steps": (1, lambda r: 1),
        "mask_fill": ("mean", lambda r: "mean"),
    }
    CHOICES = {**MaskGuided.CHOICES, "masker": ("conv", "features"), "mask_fill": FILLS}

    mean_colour: Tensor

    def __init__(self, *task: Any, **options: Any):
        super().__init__(*task, **options)
        check_not_negative(self.hparams, "lambda_1", "lambda_2", "masker_lr")
        if self.hparams["masker_steps"] < 1:
            raise ValueError(f"masker_steps {self.hparams['masker_steps']}: must be at least 1")
        input_shape, start = task[0] if task else options["input_shape"], self.hparams["mask_start"]
        if not 0 < start < 1:
            raise ValueError(f"mask_start {start}: must be above 0 and below 1")
        self.masker: nn.Module = ConvMasker(input_shape, start)
        if self.hparams["masker"] == "features":
            self.masker = MapMasker(self._feature_maps(torch.zeros(2, *input_shape)).shape[1], start)
        self.masker_optimizer = make_optimizer(self.masker.parameters(), self.hparams["masker_lr"], 0.0, {})
        self.register_buffer("mean_colour", torch.zeros(input_shape[0]))

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        colour = torch.stack([x.mean(dim=(0, 2, 3)) for x, _ in minibatches]).mean(dim=0)
        self.mean_colour += (colour - self.mean_colour) / (self.update_count + 1)
        return super().update(minibatches, unlabeled)

    def learn_masks(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The masker's steps, with the classifier as it is."""
        values: dict[str, float] = {}
        for _ in range(self.hparams["masker_steps"]):
            with frozen(self.network):
                loss, values = self.masker_loss(x, y)
            descend(loss, self.masker_optimizer)
        return values

    def masker_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The masker's loss and its three terms, for images (B, C, H, W) with labels (B,)."""
        found = self.mask(x)
        hidden = fill(x, self.hparams["mask_fill"], self.mean_colour)
        logits = self.predict(torch.cat([keep(x, found, hidden), keep(x, 1 - found, hidden)]))
        with_it, without = logits.float().softmax(dim=1).gather(1, torch.cat([y, y])[:, None]).view(2, -1)
        distance, area, variation = (with_it - without - 1).square().mean(), found.mean(), total_variation(found)
        loss = distance + self.hparams["lambda_1"] * area + self.hparams["lambda_2"] * variation
        return loss, {"mask_distance": distance.item(), "mask_area": area.item(), "mask_variation": variation.item()}

    def mask(self, x: Tensor) -> Tensor:
        """The learned masks (B, H, W) in [0, 1] of images (B, C, H, W)."""
        if self.hparams["masker"] == "conv":
            return self.masker(x)
        small = self.masker(self._feature_maps(x))
        return F.interpolate(small[:, None], size=x.shape[2:], mode="bilinear")[:, 0]

    def _feature_maps(self, x: Tensor) -> Tensor:
        layer = map_layer(self.featurizer, self.hparams)
        with torch.no_grad(), evaluating(self.featurizer), capture(layer) as seen:
            self.featurizer(x)
        return seen.maps

    def target_masks(self, x: Tensor, minibatches: Minibatches) -> Tensor:
        with torch.no_grad():
            return self.mask(x)


@register
class ALIGN_NoGuidance(ALIGN):
    """ALIGN whose masker learns as ever, while the classifier takes no notice of it.

    Source: ALIGN, the ablation "w/o EG"; its printed numbers are DRE's.
    """

    HPARAMS = {"lambda_3": (0.0, lambda r: 0.0)}
    CONTROL = {}


@register
class ALIGN_GrayMask(MaskGuided):
    """ALIGN with the image's grey levels as mask, from 0 at the darkest pixel to 1 at the brightest.

    Source: ALIGN, the ablation "m-Gray".
    Differs: how grey levels become a mask is not said there.
    """

    HPARAMS = {}

    def mask(self, x: Tensor) -> Tensor:
        """The grey levels (B, H, W) in [0, 1] of images (B, C, H, W), by the mean of the channels."""
        return normalise(x.mean(dim=1), "minmax")

    def target_masks(self, x: Tensor, minibatches: Minibatches) -> Tensor:
        return self.mask(x)


@register
class ALIGN_GivenMask(MaskGuided):
    """ALIGN with given masks: the dataset's own, or files of the user's such as a segmentation model's.

    Source: ALIGN, the ablation "m-SAM".
    """

    HPARAMS = {}
    NEEDS_MASKS = True

    def target_masks(self, x: Tensor, minibatches: Minibatches) -> Tensor:
        return masks(minibatches)

"""How good a heatmap is: what the network says of the pixels that it names, and whether they are the right ones.

Faithfulness asks the network again, about images of which a part gives way to a fill (``masking.fill``): if a heatmap
names what the network used, the pixels it ranks first are enough for the class (sufficiency, insertion), and the class
is lost without them (comprehensiveness, deletion). Localisation compares with a true mask and asks no network.
All are numbers of single images, (B,) float32, without gradients; ``METRICS`` says which way each is better, and
``name`` writes that, and the fill, into the name under which it is recorded.

Order of pixels. Heatmaps (B, h, w) are upsampled bilinearly to the image, and their pixels shown from the largest value
to the smallest, negative ones last. Ties, of which a map behind a ReLU is full, follow one fixed random heatmap of the
same size, upsampled likewise: pixels of which a map says nothing come as blobs as large as its own, and a dead or
constant map scores what a map drawn at random would. Row by row would favour what stands at the top; pixel by pixel, a
dead map would speckle the image, which few networks stand, and be called comprehensive.

A dead map (all zero) gets: by order, what a random map would; soft sufficiency p(x) - p(fill) and soft
comprehensiveness 0, since it shows the fill alone; in the pointing game the mask's share of the image; energy in the
mask 0; IoU 0.

Letters: n = H * W pixels of an image, p the softmax probability of the class that its heatmap explains.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.feature_maps import target_logit
from domainbed.masking import keep

BINS = (1, 5, 10, 20, 50)  # percent of the pixels
STEPS = 28  # of 8 rows of pixels at 224 x 224
LEVELS = 2**16  # of an upsampled heatmap up to its maximum, so that rounding does not tell equal pixels apart
SEED = 217  # of the random heatmap that ties follow; of 1,500 the one least partial to centre, border or a half
HALF = 0.5  # above it a mask, or a heatmap divided by its maximum, counts as set


class Shown:
    """The probability of each image's class while only a part of the image is shown; asked once for each part.

    Args:
        predict: images -> logits (B, K), in evaluation mode; K = 1 is as in ``target_logit``.
        x: images (B, C, H, W).
        heatmaps: (B, h, w) of any size and scale.
        target: (B,) int64, the class that they explain.
        filled: what stands where nothing is shown (``masking.fill``): (B, C, H, W), or what broadcasts to it.
        steps: of the insertion and deletion curves, of at least one pixel each.
        batch_size: images in one forward pass, at most.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        x: Tensor,
        heatmaps: Tensor,
        target: Tensor,
        filled: Tensor,
        steps: int = STEPS,
        batch_size: int = 64,
    ):
        if x.ndim != 4 or heatmaps.ndim != 3 or len(heatmaps) != len(x) or target.shape != x.shape[:1]:
            raise ValueError(
                f"images {tuple(x.shape)}, heatmaps {tuple(heatmaps.shape)} and target {tuple(target.shape)} do not "
                "fit; give (B, C, H, W), (B, h, w) and (B,)"
            )
        self._predict, self._x, self._target, self._batch_size = predict, x, target, batch_size
        self._filled = filled.expand_as(x)
        self._soft_masks = normalised(heatmaps, x.shape[2:])
        self._ranks = ranks(heatmaps, x.shape[2:])
        self._known: dict[tuple[int, int], Tensor] = {}
        self.pixels = x.shape[2:].numel()
        self.steps = min(steps, self.pixels)

    def between(self, low: int, high: int) -> Tensor:
        """p of the pixels from the low-th to before the high-th alone, (B,)."""
        part = (low, high) if low < high else (0, 0)
        if part not in self._known:
            self._known[part] = self._ask((self._ranks >= low) & (self._ranks < high))
        return self._known[part]

    def whole(self) -> Tensor:
        """p(x), (B,)."""
        return self.between(0, self.pixels)

    def first(self, count: int) -> Tensor:
        """p of the ``count`` first pixels alone, (B,); of none of them it is p of the fill."""
        return self.between(0, count)

    def without_first(self, count: int) -> Tensor:
        """p of the image without its ``count`` first pixels, (B,)."""
        return self.between(count, self.pixels)

    def soft(self) -> Tensor:
        """p of the image seen through its heatmap, divided by its maximum, as a soft mask, (B,)."""
        return self._ask(self._soft_masks)

    def without_soft(self) -> Tensor:
        """p of the image seen through one minus that mask, (B,)."""
        return self._ask(1 - self._soft_masks)

    @torch.no_grad()
    def _ask(self, masks: Tensor) -> Tensor:
        parts = (part.split(self._batch_size) for part in (self._x, masks.to(self._x), self._filled, self._target))
        return torch.cat(
            [probability(self._predict(keep(x, mask, filled)), t) for x, mask, filled, t in zip(*parts, strict=True)]
        )


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax probability (B,) float32 of each image's target class; arguments as of ``target_logit``."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return target_logit(logits, target).sigmoid()
    return target_logit(logits.softmax(dim=1), target)


@torch.no_grad()
def enlarged(heatmaps: Tensor, size: torch.Size) -> Tensor:
    """Heatmaps (B, h, w) at the image's size (H, W), divided by their largest absolute value, float32.

    Where that takes interpolation, values are rounded to a fixed grid before and after it, or a flat part of a map
    would get a pattern.
    """
    heatmaps = heatmaps.float()
    scale = heatmaps.abs().amax(dim=(1, 2), keepdim=True)
    heatmaps = heatmaps / torch.where(scale > 0, scale, 1)
    if heatmaps.shape[1:] == size:
        return heatmaps
    on_grid = (heatmaps * LEVELS).round()
    return F.interpolate(on_grid[:, None], size=tuple(size), mode="bilinear")[:, 0].round() / LEVELS


def normalised(heatmaps: Tensor, size: torch.Size) -> Tensor:
    """Heatmaps as soft masks (B, H, W) in [0, 1]: without negative values, divided by their maximum; 0 if dead."""
    positive = enlarged(heatmaps, size).relu()
    most = positive.amax(dim=(1, 2), keepdim=True)
    return positive / torch.where(most > 0, most, 1)


def ranks(heatmaps: Tensor, size: torch.Size) -> Tensor:
    """The place of each pixel in the order in which it is shown, (B, H, W) int64 in [0, n); see the module.

    Where the random heatmap that ties follow is flat too (in its corners), a fixed permutation of the pixels decides.
    """
    generator = torch.Generator().manual_seed(SEED)
    chance = enlarged(torch.rand(1, *heatmaps.shape[1:], generator=generator), size).flatten()
    mixed = torch.randperm(size.numel(), generator=generator)
    ties = mixed[chance[mixed].argsort(descending=True, stable=True)].to(heatmaps.device)
    values = enlarged(heatmaps, size).flatten(1)[:, ties]
    order = ties[values.argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(size.numel(), device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(-1, *size)


def sufficiency(shown: Shown) -> Tensor:
    """``p(x) - p(first k % alone)``, averaged over k in BINS; in [-1, 1], lower is better.

    Source: DeYoung et al. 2020, ERASER, section 4 (AOPC), https://arxiv.org/abs/1911.03429.
    Differs: pixels for tokens, and a fill for those that ERASER cuts out; k % of n is rounded up.
    """
    return shown.whole() - torch.stack([shown.first(count) for count in _counts(shown)]).mean(0)


def comprehensiveness(shown: Shown) -> Tensor:
    """``p(x) - p(x without its first k %)``, averaged over k in BINS; in [-1, 1], higher is better.

    Source and differences: ``sufficiency``.
    """
    return shown.whole() - torch.stack([shown.without_first(count) for count in _counts(shown)]).mean(0)


def _counts(shown: Shown) -> list[int]:
    return [-(-percent * shown.pixels // 100) for percent in BINS]


def soft_sufficiency(shown: Shown) -> Tensor:
    """``p(x) - p(x H + fill (1 - H))``, H the heatmap divided by its maximum; in [-1, 1], lower is better.

    A map that covers everything gets 0 for nothing: compare it only between maps that cover about as much.
    """
    return shown.whole() - shown.soft()


def soft_comprehensiveness(shown: Shown) -> Tensor:
    """``p(x) - p(x (1 - H) + fill H)``, H as in ``soft_sufficiency``, whose warning holds; higher is better."""
    return shown.whole() - shown.without_soft()


def insertion_auc(shown: Shown) -> Tensor:
    """Area under p of the first pixels alone, from none to all in equal steps, over their share; higher is better.

    In [0, 1], by trapezoids.

    Source: Petsiuk et al. 2018, RISE, https://arxiv.org/abs/1806.07421; blur and 28 steps after Li et al. 2023, DRE,
    https://arxiv.org/abs/2303.16390.
    Differs: DRE orders pixels by the heatmap of the true class, here it is that of the class whose p is shown.
    """
    return _area(shown, shown.first)


def deletion_auc(shown: Shown) -> Tensor:
    """Area under p of the image without its first pixels; lower is better. The rest is as in ``insertion_auc``."""
    return _area(shown, shown.without_first)


def _area(shown: Shown, curve: Callable[[int], Tensor]) -> Tensor:
    counts = torch.linspace(0, shown.pixels, shown.steps + 1, dtype=torch.float64).round().long()
    values = torch.stack([curve(count) for count in counts.tolist()])
    shares = (counts / shown.pixels).to(values)
    return torch.trapezoid(values, shares[:, None], dim=0)


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether a heatmap's largest value stands inside the mask; of several largest ones, the share that does.

    Source: Zhang et al. 2018, Excitation backprop, https://arxiv.org/abs/1608.00507.
    Differs: no tolerance around the mask.
    """
    values = enlarged(heatmaps, masks.shape[1:])
    most = values == values.amax(dim=(1, 2), keepdim=True)
    return _share(most, masks > HALF)


def energy_in_mask(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of a heatmap's positive values that stands inside the (soft) mask; in [0, 1], of a dead map 0.

    Source: Wang et al. 2020, Score-CAM (energy-based pointing game), https://arxiv.org/abs/1910.01279.
    """
    return _share(enlarged(heatmaps, masks.shape[1:]).relu(), masks)


def mask_iou(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of a heatmap above half of its maximum and the mask above .5; of a dead map 0."""
    return learned_mask_iou(normalised(heatmaps, masks.shape[1:]), masks)


@torch.no_grad()
def learned_mask_iou(learned: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of learned masks (B, h, w) in [0, 1] and true ones (B, H, W), both above .5.

    0 where both are empty.
    """
    if learned.shape[1:] != masks.shape[1:]:
        learned = F.interpolate(learned.float()[:, None], size=tuple(masks.shape[1:]), mode="bilinear")[:, 0]
    a, b = learned > HALF, masks > HALF
    return (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp_min(1)


def _share(values: Tensor, masks: Tensor) -> Tensor:
    """``sum values mask / sum values``, 0 where all values are."""
    values = values.float()
    total = values.sum(dim=(1, 2))
    return (values * masks.float()).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)


FAITHFULNESS: Mapping[str, Callable[[Shown], Tensor]] = {
    f.__name__: f
    for f in (
        sufficiency,
        comprehensiveness,
        soft_sufficiency,
        soft_comprehensiveness,
        insertion_auc,
        deletion_auc,
    )
}
LOCALISATION: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (pointing_game, energy_in_mask, mask_iou)
}
METRICS = {
    "sufficiency": "lower",
    "comprehensiveness": "higher",
    "soft_sufficiency": "lower",
    "soft_comprehensiveness": "higher",
    "insertion_auc": "higher",
    "deletion_auc": "lower",
    "pointing_game": "higher",
    "energy_in_mask": "higher",
    "mask_iou": "higher",
    "learned_mask_iou": "higher",
    "map_overlap": "lower",
    "dead_maps": "lower",
}


def name(metric: str, fill: str = "") -> str:
    """The name under which a metric is recorded: ``sufficiency_blur_lower``, ``mask_iou_higher``."""
    return "_".join(part for part in (metric, fill, METRICS[metric]) if part)


def faithfulness(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    heatmaps: Tensor,
    target: Tensor,
    filled: Tensor,
    steps: int = STEPS,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Every metric of FAITHFULNESS, (B,) by its name; arguments as of ``Shown``, forward passes shared.

    With 28 steps it costs 66 forward passes of each image at 224 pixels, and never more than 68.
    """
    shown = Shown(predict, x, heatmaps, target, filled, steps, batch_size)
    return {metric: compute(shown) for metric, compute in FAITHFULNESS.items()}


def localisation(heatmaps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Every metric of LOCALISATION, (B,) by its name.

    Args:
        heatmaps: (B, h, w) of any size and scale.
        masks: (B, H, W) in [0, 1], true.

    Raises:
        ValueError: shapes that do not fit.
    """
    if heatmaps.ndim != 3 or masks.ndim != 3 or len(heatmaps) != len(masks):
        raise ValueError(
            f"heatmaps {tuple(heatmaps.shape)} and masks {tuple(masks.shape)} do not fit; give (B, h, w) and (B, H, W)"
        )
    return {metric: compute(heatmaps, masks) for metric, compute in LOCALISATION.items()}

"""How alike two heatmaps are: two maps -> one score per image, larger when they agree more.

eX2L minimises these scores, so every one is finite, and has finite gradients, for any pair of maps: equal, disjoint,
constant, all zero, tiny or huge. Adding one is a function of two normalised maps, flattened::

    @similarity(normalisation="max")
    def mse(a, b):
        '''Negative mean squared error: formula, range, source.'''
        return -(a - b).square().mean(1)

and a row that trains with it names it (``SIMILARITY = "mse"``) in a class beside those of ``algorithms_ex2l``.

Letters: a, b the normalised maps of label and confounder, n = H * W their pixels, p and q the same as distributions.
Ranges are those with the normalisation that a similarity is registered with.
Source of all: Medina, Minoza, Ibanez 2026, eX2L, https://arxiv.org/abs/2605.06368, appendix B.5.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.registry import Registry

EPS = 1e-8  # in denominators and under logarithms
ROOT_EPS = 1e-12  # least argument of a square root, whose slope at 0 is infinite
VARIANCE_EPS = 1e-6  # beside a variance of maps in [0, 1], which is about .05
FLOOR = 1e-3  # added to each pixel of a distribution before a Kullback-Leibler divergence
NORMALISATIONS = ("max", "max_live", "minmax", "minmax_live", "l1", "none")
NO_DISTRIBUTION = ("max", "max_live", "minmax", "minmax_live", "none")


def normalise(maps: Tensor, how: str) -> Tensor:
    """Maps on a common scale, in float32; an all-zero map stays all zero.

    Args:
        maps: (B, H, W).
        how: "max" divides by the image's largest absolute value, taken as a constant for the gradient: through it, a
            penalty would also move all pixels at once by way of the largest one. "max_live" does have that gradient.
            "minmax" takes the smallest value to 0 and the largest to 1, both constants; "minmax_live" with their
            gradient. "l1" divides by the image's sum (differentiated), so that non-negative maps are a distribution
            over pixels. "none" leaves the scale.

    Raises:
        ValueError: ``how`` is none of these.
    """
    maps = maps.float()
    if how == "none":
        return maps
    if how == "l1":
        return maps / maps.sum(dim=(1, 2), keepdim=True).clamp_min(EPS)
    if how == "max_live":
        return maps / maps.abs().amax(dim=(1, 2), keepdim=True).clamp_min(EPS)
    constant = maps if how == "minmax_live" else maps.detach()
    if how == "max":
        return maps / constant.abs().amax(dim=(1, 2), keepdim=True).clamp_min(EPS)
    if how in ("minmax", "minmax_live"):
        least, most = constant.amin(dim=(1, 2), keepdim=True), constant.amax(dim=(1, 2), keepdim=True)
        return (maps - least) / (most - least).clamp_min(EPS)
    raise ValueError(f"unknown normalisation of heatmaps: {how!r}; take one of {', '.join(NORMALISATIONS)}")


class Similarity:
    """A score of two heatmaps.

    Attributes:
        score: the same of two normalised maps, both (B, n).
        normalisation: what it takes the maps to unless told otherwise.
        signed: whether it means something for maps that also have negative values.
        unfit: normalisations with which it means nothing.
    """

    __name__: str

    def __init__(
        self, score: Callable[[Tensor, Tensor], Tensor], normalisation: str, signed: bool, unfit: Sequence[str]
    ):
        self.score, self.normalisation, self.signed, self.unfit = score, normalisation, signed, unfit
        functools.update_wrapper(self, score)

    def check(self, normalisation: str, relu: bool) -> None:
        """Raises ValueError where it means nothing on maps so normalised, or, without a ReLU, on maps of both signs."""
        if normalisation in self.unfit:
            raise ValueError(
                f"map_normalisation {normalisation}: {self.__name__} means nothing on such maps; "
                f"take own ({self.normalisation})"
            )
        if not relu and (not self.signed or normalisation == "l1"):
            other = ", or set map_normalisation to max" if self.signed else ""
            raise ValueError(
                f"map_relu false: {self.__name__} compares maps without negative values; keep the ReLU{other}"
            )

    def __call__(self, label_maps: Tensor, confounder_maps: Tensor, normalisation: str | None = None) -> Tensor:
        """Scores (B,), float32 also under autocast, of two heatmaps (B, H, W) of any float type.

        Raises:
            ValueError: maps of different or wrong shapes, or an unknown normalisation.
        """
        shape = tuple(label_maps.shape)
        if shape != tuple(confounder_maps.shape) or len(shape) != 3 or shape[1] * shape[2] < 2:
            raise ValueError(
                f"heatmaps of shapes {shape} and {tuple(confounder_maps.shape)} can't be compared; "
                "both must be (B, H, W) with the same B, H, W and more than one pixel"
            )
        how = normalisation or self.normalisation
        a, b = (normalise(maps, how).flatten(1) for maps in (label_maps, confounder_maps))
        return self.score(a, b)


REGISTRY: Registry[Similarity] = Registry("similarity")


def similarity(
    normalisation: str, signed: bool = False, unfit: Sequence[str] = ()
) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Similarity]:
    """Registers a score of two normalised maps, both (B, n), as a ``Similarity`` of heatmaps."""
    return lambda score: REGISTRY.register(Similarity(score, normalisation, signed, unfit))


@similarity(normalisation="max", signed=True)
def mae(a: Tensor, b: Tensor) -> Tensor:
    """Negative mean absolute error: ``-sum |a - b| / n``; in [-1, 0].

    Least where one map is all ones and the other a single pixel, not at any disjoint pair: a large weight can
    reach that corner. On unnormalised maps it has no lower bound.

    Source: eX2L, equation 19.
    """
    return -(a - b).abs().mean(1)


@similarity(normalisation="max", signed=True)
def mse(a: Tensor, b: Tensor) -> Tensor:
    """Negative mean squared error: ``-sum (a - b)^2 / n``; in [-1, 0].

    Its gradient vanishes as the maps approach each other, where that of the absolute error does not.

    Source: eX2L, equation 20.
    """
    return -(a - b).square().mean(1)


@similarity(normalisation="max", signed=True)
def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Negative root of the mean squared error: ``-sqrt(sum (a - b)^2 / n)``; in [-1, 0].

    Source: eX2L, equation 21.
    """
    return -(a - b).square().mean(1).clamp_min(ROOT_EPS).sqrt()


@similarity(normalisation="max_live", unfit=("none",))
def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union: ``sum a b / sum (a + b - a b)``; in [0, 1], 0 if disjoint.

    A map scores 1 with itself only if its values are 0 and 1. The maximum is differentiated: taken as a constant, it
    leaves a gradient that shrinks both maps at every step, until they are dead (docs/findings.md).

    Source: eX2L, equation 22, after Rahman and Wang 2016, doi 10.1007/978-3-319-50835-1_22.
    """
    both = (a * b).sum(1)
    return both / (a.sum(1) + b.sum(1) - both + EPS)


def _floored(p: Tensor) -> Tensor:
    """Distributions without a zero: FLOOR is added to each pixel."""
    return (p + FLOOR) / (p + FLOOR).sum(1, keepdim=True)


@similarity(normalisation="l1", unfit=NO_DISTRIBUTION)
def kl(p: Tensor, q: Tensor) -> Tensor:
    """Negative Kullback-Leibler divergence of the label map p from the confounder map q: ``-sum q log(q / p)``.

    In nats, in [-log((1 + FLOOR) / FLOOR), 0] = [-6.91, 0]; not symmetric: the confounder map is the reference. Both
    distributions get FLOOR at each pixel first. Without it the divergence of disjoint maps is infinite, and with a
    floor that only bounds it (1e-8) its gradient is in the millions.

    Source: eX2L, equation 23.
    """
    p, q = _floored(p), _floored(q)
    return -(q * (q.log() - p.log())).sum(1)


@similarity(normalisation="l1", unfit=NO_DISTRIBUTION)
def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Negative Jensen-Shannon divergence: ``-(KL(p | m) + KL(q | m)) / 2``, ``m = (p + q) / 2``, in nats.

    In [-ln 2, 0], the lower end if disjoint.

    Source: eX2L, equation 24.
    """
    log_m = ((p + q) / 2 + EPS).log()
    return -(p * ((p + EPS).log() - log_m) + q * ((q + EPS).log() - log_m)).sum(1) / 2


@similarity(normalisation="l1", unfit=NO_DISTRIBUTION)
def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Negative Jensen-Shannon distance: ``-sqrt(JS(p, q))`` with the divergence in nats.

    In [-sqrt(ln 2), 0], the lower end if disjoint. The divergence of equal maps is 0, where a root has an infinite
    slope, and rounding can leave it just below; hence the clamp.

    Source: eX2L, equation 25.
    """
    return -(-js_divergence.score(p, q)).clamp_min(ROOT_EPS).sqrt()


@similarity(normalisation="l1", signed=True)
def cosine(p: Tensor, q: Tensor) -> Tensor:
    """Cosine similarity: ``<p, q> / (|p| |q|)``; in [0, 1] for non-negative maps, 0 if disjoint.

    Source: eX2L, equation 26.
    """
    return F.cosine_similarity(p, q, dim=1, eps=EPS)


@similarity(normalisation="max", signed=True)
def ncc(a: Tensor, b: Tensor) -> Tensor:
    """Normalised cross-correlation at zero lag, Pearson's coefficient: ``s_ab / sqrt(s_a^2 s_b^2)``; in [-1, 1].

    VARIANCE_EPS is added to both variances, so that a constant map scores 0 with any other. Least for maps that are
    each other's negative, so it asks for more than disjoint maps; indifferent to an offset of a map.

    Source: eX2L, equation 27.
    """
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    variances = (a.square().mean(1) + VARIANCE_EPS) * (b.square().mean(1) + VARIANCE_EPS)
    return (a * b).mean(1) / variances.sqrt()


@similarity(normalisation="max", signed=True, unfit=("l1", "none"))
def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the whole maps: luminance times contrast times structure; in [-1, 1].

    ``(2 mu_a mu_b + C1) (2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1) (s_a^2 + s_b^2 + C2))`` with means, variances and
    the covariance (over n - 1) of all pixels, since the maps are smaller than the usual 11 x 11 window;
    ``C1 = .01^2``, ``C2 = .03^2`` for values in [0, 1]. It is the paper's three factors with C3 = C2 / 2, which
    cancel to two and need no square root of a variance. Least for maps that are each other's negative, so it asks
    for more than disjoint maps.

    Source: eX2L, equations 28 to 33, after Wang, Bovik, Sheikh, Simoncelli 2004, doi 10.1109/TIP.2003.819861.
    """
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = a.mean(1), b.mean(1)
    covariance = ((a - mean_a[:, None]) * (b - mean_b[:, None])).sum(1) / (a.shape[1] - 1)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (torch.var(a, dim=1) + torch.var(b, dim=1) + c2)


@similarity(normalisation="max_live")
def soft_dice(a: Tensor, b: Tensor) -> Tensor:
    """Soft Dice coefficient: ``2 sum a b / (sum a + sum b)``; in [0, 1], 0 if disjoint.

    The product is not squared below, so a map scores 1 with itself only if its values are 0 and 1. The maximum is
    differentiated, as for ``soft_iou``.

    Source: eX2L, equation 34, after Milletari, Navab, Ahmadi 2016, V-Net, https://arxiv.org/abs/1606.04797.
    """
    return 2 * (a * b).sum(1) / (a.sum(1) + b.sum(1) + EPS)


def is_live(maps: Tensor) -> Tensor:
    """Which heatmaps (B, H, W) are not all zero (above EPS, below which nothing is normalised): (B,) bool."""
    return maps.detach().abs().amax(dim=(1, 2)) > EPS


@torch.no_grad()
def describe(label_maps: Tensor, confounder_maps: Tensor) -> dict[str, float]:
    """What tells how two networks look, whatever the similarity, from their heatmaps (B, H, W).

    Returns:
        ``dead_maps``, the fraction of images with an all-zero map, and ``dead_label_maps``, ``dead_confounder_maps``
        by network. Over the images without: ``map_overlap``, the mean soft intersection over union of the two maps, and
        ``label_coverage``, ``confounder_coverage``, the mean of a map divided by its maximum. Negative values count as
        zero in these.
    """
    live, live_c = is_live(label_maps), is_live(confounder_maps)
    both = live & live_c
    a, b = (normalise(maps.relu(), "max") for maps in (label_maps, confounder_maps))

    def mean(values: Tensor) -> Tensor:
        return (values * both).sum() / both.sum().clamp_min(1)

    found = {
        "dead_maps": 1 - both.float().mean(),
        "dead_label_maps": 1 - live.float().mean(),
        "dead_confounder_maps": 1 - live_c.float().mean(),
        "map_overlap": mean(soft_iou(a, b, "none")),
        "label_coverage": mean(a.mean(dim=(1, 2))),
        "confounder_coverage": mean(b.mean(dim=(1, 2))),
    }
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))  # one wait for a GPU, not six

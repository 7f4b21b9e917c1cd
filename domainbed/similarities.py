"""How alike two heatmaps are: two maps -> one score per image, larger when they agree more.

eX2L minimises these scores, so every one is finite, and has finite gradients, for any pair of non-negative maps:
equal, disjoint, constant, all zero, tiny or huge. Adding one is a function of two normalised maps, flattened::

    @similarity(normalisation="max")
    def mse(a, b):
        '''Negative mean squared error: formula, range, source.'''
        return -(a - b).square().mean(1)

Letters: a, b the normalised maps of label and confounder, n = H * W their pixels, p and q the same as distributions.
Source of all: Medina, Minoza, Ibanez 2026, eX2L, https://arxiv.org/abs/2605.06368, appendix B.5.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed.registry import Registry

Similarity: TypeAlias = Callable[..., Tensor]

REGISTRY: Registry[Similarity] = Registry("similarity")

EPS = 1e-8  # in denominators and under logarithms
ROOT_EPS = 1e-12  # least argument of a square root, whose slope at 0 is infinite


def normalise(maps: Tensor, how: str) -> Tensor:
    """Maps on a common scale, in float32; an all-zero map stays all zero.

    Args:
        maps: (B, H, W), non-negative.
        how: "max" divides by the image's maximum, so that values lie in [0, 1]; "l1" divides by the image's sum, so
            that they are a distribution over pixels. The maximum is a constant for the gradient: through it, a
            penalty would also move all pixels at once by way of the largest one.

    Raises:
        ValueError: ``how`` is neither.
    """
    maps = maps.float()
    if how == "max":
        return maps / maps.detach().amax(dim=(1, 2), keepdim=True).clamp_min(EPS)
    if how == "l1":
        return maps / maps.sum(dim=(1, 2), keepdim=True).clamp_min(EPS)
    raise ValueError(f"unknown normalisation of heatmaps: {how!r}; take 'max' or 'l1'")


def similarity(normalisation: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Similarity]:
    """Registers a score of two normalised maps, both (B, n), as a similarity of heatmaps.

    The registered function takes ``(label_maps, confounder_maps)``, both (B, H, W), non-negative and of any float
    type, and returns float32 scores (B,); ``normalisation=`` replaces the default named here. It raises ValueError
    for maps of different or wrong shapes.
    """

    def decorate(score: Callable[[Tensor, Tensor], Tensor]) -> Similarity:
        @functools.wraps(score)
        def compare(label_maps: Tensor, confounder_maps: Tensor, normalisation: str = normalisation) -> Tensor:
            _check(label_maps, confounder_maps)
            a, b = (normalise(maps, normalisation).flatten(1) for maps in (label_maps, confounder_maps))
            return score(a, b)

        return REGISTRY.register(compare)

    return decorate


def _check(label_maps: Tensor, confounder_maps: Tensor) -> None:
    shape = tuple(label_maps.shape)
    if shape != tuple(confounder_maps.shape) or len(shape) != 3 or shape[1] * shape[2] < 2:
        raise ValueError(
            f"heatmaps of shapes {shape} and {tuple(confounder_maps.shape)} can't be compared; "
            "both must be (B, H, W) with the same B, H, W and more than one pixel"
        )


@similarity(normalisation="max")
def mae(a: Tensor, b: Tensor) -> Tensor:
    """Negative mean absolute error: ``-sum |a - b| / n``; in [-1, 0].

    Least where one map is all ones and the other a single pixel, not at any disjoint pair: a large weight can
    reach that corner. On unnormalised maps it has no lower bound.

    Source: eX2L, equation 19.
    """
    return -(a - b).abs().mean(1)


@similarity(normalisation="l1")
def cosine(p: Tensor, q: Tensor) -> Tensor:
    """Cosine similarity: ``<p, q> / (|p| |q|)``; in [0, 1] for non-negative maps, 0 if disjoint.

    Source: eX2L, equation 26.
    """
    return F.cosine_similarity(p, q, dim=1, eps=EPS)


@similarity(normalisation="max")
def soft_dice(a: Tensor, b: Tensor) -> Tensor:
    """Soft Dice coefficient: ``2 sum a b / (sum a + sum b)``; in [0, 1], 0 if disjoint.

    The product is not squared below, so a map scores 1 with itself only if its values are 0 and 1.

    Source: eX2L, equation 34, after Milletari, Navab, Ahmadi 2016, V-Net, https://arxiv.org/abs/1606.04797.
    """
    return 2 * (a * b).sum(1) / (a.sum(1) + b.sum(1) + EPS)


@similarity(normalisation="l1")
def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Negative Jensen-Shannon distance: ``-sqrt((KL(p | m) + KL(q | m)) / 2)``, ``m = (p + q) / 2``, in nats.

    In [-sqrt(ln 2), 0], the lower end if disjoint. The divergence of equal maps is 0, where a root has an infinite
    slope, and rounding can leave it just below; hence the clamp.

    Source: eX2L, equations 24 and 25.
    """
    log_m = ((p + q) / 2 + EPS).log()
    divergence = (p * ((p + EPS).log() - log_m) + q * ((q + EPS).log() - log_m)).sum(1) / 2
    return -divergence.clamp_min(ROOT_EPS).sqrt()


@similarity(normalisation="max")
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

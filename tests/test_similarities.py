"""Every similarity against scipy, scikit-image or numpy, and against numbers worked out by hand."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial import distance
from scipy.stats import entropy, pearsonr
from skimage.metrics import mean_squared_error, structural_similarity
from torch import Tensor

from domainbed import similarities
from domainbed.similarities import FLOOR, NORMALISATIONS, REGISTRY, Similarity, normalise, similarity

Array = NDArray[np.float64]

LN2 = math.log(2)
RANGES = {
    "mae": (-1, 0),
    "mse": (-1, 0),
    "rmse": (-1, 0),
    "soft_iou": (0, 1),
    "kl": (-math.log((1 + FLOOR) / FLOOR), 0),
    "js_divergence": (-LN2, 0),
    "js_distance": (-math.sqrt(LN2), 0),
    "cosine": (0, 1),
    "ncc": (-1, 1),
    "ssim": (-1, 1),
    "soft_dice": (0, 1),
}
NAMES = tuple(RANGES)
SYMMETRIC = [name for name in NAMES if name != "kl"]
DISTRIBUTIONS = ("kl", "js_divergence", "js_distance", "cosine")  # take "l1" unless told otherwise; the others "max"
SIGNED = ("mae", "mse", "rmse", "cosine", "ncc", "ssim")
# Not bounded where maps keep their scale: squares of huge values are infinite in float32, and errors stay finite.
KEEPS_HUGE = ("mae", "kl", "js_divergence", "js_distance", "cosine")


def _soft_iou(a: Array, b: Array) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / sum(x + y - x * y for x, y in zip(a, b, strict=True)))


def _ssim(a: Array, b: Array) -> float:
    """A window that covers the whole map makes scikit-image's local statistics global."""
    side = math.isqrt(len(a))
    a, b = a.reshape(side, side), b.reshape(side, side)
    return float(structural_similarity(a, b, win_size=side, data_range=1.0, use_sample_covariance=True))


# Of two normalised, flattened maps (label, confounder) in float64.
REFERENCES: dict[str, Callable[[Array, Array], float]] = {
    "mae": lambda a, b: -distance.cityblock(a, b) / len(a),
    "mse": lambda a, b: -mean_squared_error(a, b),
    "rmse": lambda a, b: -distance.euclidean(a, b) / math.sqrt(len(a)),
    "soft_iou": _soft_iou,
    "kl": lambda p, q: -entropy(q + FLOOR, p + FLOOR),  # scipy divides both by their sums
    "js_divergence": lambda p, q: -(distance.jensenshannon(p, q) ** 2),
    "js_distance": lambda p, q: -distance.jensenshannon(p, q),
    "cosine": lambda p, q: 1 - distance.cosine(p, q),
    "ncc": lambda a, b: pearsonr(a, b).statistic,
    "ssim": _ssim,
    "soft_dice": lambda a, b: 2 * np.vdot(a, b) / (a.sum() + b.sum()),
}
SCALES: dict[str, Callable[[Array], Array]] = {
    "max": lambda a: a / np.abs(a).max(),
    "max_live": lambda a: a / np.abs(a).max(),
    "minmax": lambda a: (a - a.min()) / np.ptp(a),
    "minmax_live": lambda a: (a - a.min()) / np.ptp(a),
    "l1": lambda a: a / a.sum(),
    "none": lambda a: a,
}


def reference(name: str, label: Tensor, confounder: Tensor, how: str) -> list[float]:
    pairs = zip(label.double().flatten(1).numpy(), confounder.double().flatten(1).numpy(), strict=True)
    return [float(REFERENCES[name](SCALES[how](a), SCALES[how](b))) for a, b in pairs]


def random_maps(seed: int, batch: int = 6, size: int = 7) -> Tensor:
    """Maps with the zeros that a ReLU leaves."""
    return signed_maps(seed, batch, size).add(0.3).relu()


def signed_maps(seed: int, batch: int = 6, size: int = 7) -> Tensor:
    return torch.randn(batch, size, size, generator=torch.Generator().manual_seed(seed))


def half(side: str) -> Tensor:
    """A 4 x 4 map that is 1 on one half and 0 on the other."""
    maps = torch.zeros(1, 4, 4)
    maps[:, :, :2] = side == "left"
    maps[:, :, 2:] = side == "right"
    return maps


def single_pixel(size: int) -> Tensor:
    maps = torch.zeros(1, size, size)
    maps[0, 1, 2] = 1
    return maps


def pairs_of(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Label and confounder maps that a careless formula breaks on."""
    some, other, zero = random_maps(0), random_maps(1), torch.zeros(6, 7, 7)
    left, right = (half(side).repeat(6, 1, 1) for side in ("left", "right"))
    yield from {
        "identical": [(some, some), (left, left)],
        "nearly identical": [(some, some * (1 + scale * other)) for scale in (1e-3, 1e-5, 1e-7)],
        "disjoint": [(left, right), (single_pixel(7), other[:1] * (1 - single_pixel(7)))],
        "zero": [(zero, zero), (zero, some), (some, zero)],
        "constant": [(zero + 1, zero + 3), (zero + 1, some), (some, zero + 3), (zero + 1, zero)],
        "one pixel": [(single_pixel(7), zero[:1] + 1), (some, torch.eye(49)[:6].view(6, 7, 7))],
        "tiny": [(t * some, t * other) for t in (1e-8, 1e-12, 1e-30)] + [(1e-12 * some, other)],
        "huge": [(t * some, t * other) for t in (1e6, 1e30)] + [(some, 1e30 * other), (1e30 * some, 1e-30 * other)],
    }[name]


PAIRS = ("identical", "nearly identical", "disjoint", "zero", "constant", "one pixel", "tiny", "huge")


def with_gradients(score: Callable[..., Tensor], label: Tensor, confounder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = label.clone().requires_grad_(), confounder.clone().requires_grad_()
    scores = score(a, b)
    return scores, *torch.autograd.grad(scores.sum(), (a, b))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ssim"])
def test_a_step_along_its_gradient_never_shrinks_a_map(name: str) -> None:
    """``sum_p H_p ds/dH_p`` above 0 would make maps die, although the score is blind to their scale."""
    label, confounder = random_maps(0), random_maps(1)
    _, gradient, other = with_gradients(REGISTRY[name], label, confounder)
    along = torch.stack([(label * gradient).sum((1, 2)), (confounder * other).sum((1, 2))])
    assert (along < 1e-5).all()
    grows = name in ("mae", "mse", "rmse")
    assert (along < -1e-3).all() if grows else (along.abs() < 1e-5).all()


@pytest.mark.parametrize("name", ["soft_iou", "soft_dice"])
def test_with_a_constant_maximum_products_shrink_maps(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    _, gradient, _ = with_gradients(lambda a, b: REGISTRY[name](a, b, "max"), label, confounder)
    assert ((label * gradient).sum((1, 2)) > 1e-3).all()


def test_all_eleven_are_registered() -> None:
    assert tuple(REGISTRY) == NAMES
    assert {name: REGISTRY[name].normalisation for name in NAMES} == {
        name: "l1" if name in DISTRIBUTIONS else "max_live" if name in ("soft_iou", "soft_dice") else "max"
        for name in NAMES
    }
    assert tuple(name for name in NAMES if REGISTRY[name].signed) == SIGNED


@pytest.mark.parametrize("size", [4, 7, 9])
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name: str, size: int) -> None:
    if name == "ssim" and size == 4:
        size = 5  # scikit-image takes odd windows only
    label, confounder = random_maps(0, size=size), random_maps(1, size=size)
    expected = reference(name, label, confounder, REGISTRY[name].normalisation)
    np.testing.assert_allclose(REGISTRY[name](label, confounder).numpy(), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("js")])
def test_equals_reference_with_another_normalisation(name: str, how: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    expected = reference(name, label, confounder, how)
    # Beside distributions over 49 pixels, whose variance is about 5e-4, that of ncc's epsilon shows.
    tolerance = {"rtol": 5e-3, "atol": 0} if (name, how) == ("ncc", "l1") else {"rtol": 2e-4, "atol": 2e-6}
    np.testing.assert_allclose(REGISTRY[name](label, confounder, how).numpy(), expected, **tolerance)


@pytest.mark.parametrize("how", ["max", "max_live", "none"])
@pytest.mark.parametrize("name", SIGNED)
def test_maps_with_both_signs(name: str, how: str) -> None:
    label, confounder = signed_maps(0), signed_maps(1)
    expected = reference(name, label, confounder, how)
    np.testing.assert_allclose(REGISTRY[name](label, confounder, how).numpy(), expected, rtol=2e-4, atol=2e-6)


class ByHand(NamedTuple):
    """Scores of 4 x 4 maps (16 pixels); of the zero map against ones."""

    same: float  # left half with itself
    disjoint: float  # left half against right half
    half: float  # left half against all ones
    pixel: float  # one pixel against all ones
    zero: float  # no pixel against all ones


# A floored distribution over half of 16 pixels has (1/8 + F) / T or F / T at a pixel, T = 1 + 16 F; that over all has
# (1/16 + F) / T = 1/16. The mean of the half (1/8) and all (1/16) is 3/32 or 1/32, that of a pixel and all 17/32 or
# 1/32. Variances over n - 1 = 15: of a half 16/4/15 = 4/15, of a pixel (15 + 225)/256/15 = 1/16; covariance of the two
# halves -4/15. Over n: 1/4 and 15/256. A constant has neither.
TOTAL, C1, C2 = 1 + 16 * FLOOR, 1e-4, 9e-4
HIGH = 0.125 + FLOOR
BY_HAND = {
    "mae": ByHand(0, -1, -1 / 2, -15 / 16, -1),
    "mse": ByHand(0, -1, -1 / 2, -15 / 16, -1),
    "rmse": ByHand(0, -1, -math.sqrt(1 / 2), -math.sqrt(15 / 16), -1),
    "soft_iou": ByHand(1, 0, 8 / 16, 1 / (1 + 16 - 1), 0),
    "kl": ByHand(
        0,
        -8 * (HIGH - FLOOR) / TOTAL * math.log(HIGH / FLOOR),
        -0.5 * math.log(TOTAL / 16 / HIGH) - 0.5 * math.log(TOTAL / 16 / FLOOR),
        -1 / 16 * math.log(TOTAL / 16 / (1 + FLOOR)) - 15 / 16 * math.log(TOTAL / 16 / FLOOR),
        0,  # a zero map is floored to the uniform distribution
    ),
    "js_divergence": ByHand(
        0,
        -LN2,
        -(math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * LN2) / 2,
        -(math.log(32 / 17) + math.log(2 / 17) / 16 + 15 / 16 * LN2) / 2,
        -LN2 / 2,  # only the half that the ones contribute
    ),
    "cosine": ByHand(1, 0, 8 / math.sqrt(8 * 16), 1 / math.sqrt(16), 0),
    "ncc": ByHand(1, -1, 0, 0, 0),
    "ssim": ByHand(
        1,
        (-8 / 15 + C2) / (8 / 15 + C2),
        (1 + C1) / (1.25 + C1) * C2 / (4 / 15 + C2),
        (2 / 16 + C1) / (1 + 1 / 256 + C1) * C2 / (1 / 16 + C2),
        C1 / (1 + C1),
    ),
    "soft_dice": ByHand(1, 0, 16 / 24, 2 / 17, 0),
}
BY_HAND["js_distance"] = ByHand(*(-math.sqrt(-value) for value in BY_HAND["js_divergence"]))


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name: str) -> None:
    score, ones = REGISTRY[name], torch.ones(1, 4, 4)
    found = ByHand(
        score(half("left"), half("left")).item(),
        score(half("left"), half("right")).item(),
        score(half("left"), ones).item(),
        score(single_pixel(4), ones).item(),
        score(torch.zeros(1, 4, 4), ones).item(),
    )
    assert found == pytest.approx(BY_HAND[name], abs=5e-6)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_in_range(name: str, pair: str) -> None:
    low, high = RANGES[name]
    for label, confounder in pairs_of(pair):
        scores = REGISTRY[name](label, confounder)
        assert scores.shape == label.shape[:1]
        assert low - 1e-5 <= scores.min()
        assert scores.max() <= high + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_finite_with_finite_gradients(name: str, pair: str, dtype: torch.dtype) -> None:
    for (label, confounder), how, autocast in itertools.product(pairs_of(pair), NORMALISATIONS, (False, True)):
        if how == "none" and pair == "huge" and name not in KEEPS_HUGE:
            continue
        maps = (m.clamp(max=torch.finfo(dtype).max).to(dtype) for m in (label, confounder))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores, *gradients = with_gradients(lambda a, b, how=how: REGISTRY[name](a, b, how), *maps)
        assert scores.isfinite().all(), how
        # A gradient by 1e-8 or so, the least divisor, need not fit into float16, but must not be 0 / 0.
        assert all(g.isfinite().all() or (dtype == torch.float16 and not g.isnan().any()) for g in gradients), how


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_computes_in_float32_also_under_autocast(name: str, dtype: torch.dtype) -> None:
    label, confounder = random_maps(0).to(dtype), random_maps(1).to(dtype)
    found = with_gradients(REGISTRY[name], label, confounder)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[0], REGISTRY[name](label.float(), confounder.float()), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(with_gradients(REGISTRY[name], label, confounder), found, rtol=0, atol=0)


def test_raw_maps_that_are_huge_are_beyond_squares() -> None:
    label, confounder = 1e30 * random_maps(0), 1e30 * random_maps(1)
    unbounded = [name for name in NAMES if not REGISTRY[name](label, confounder, "none").isfinite().all()]
    assert unbounded == [name for name in NAMES if name not in KEEPS_HUGE]


@pytest.mark.parametrize("how", ["l1", "max_live", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name: str, how: str) -> None:
    label, confounder = (random_maps(seed, batch=2, size=4).double() + 0.2 for seed in (0, 1))
    inputs = (label.requires_grad_(), confounder.requires_grad_())
    # The step is large because values are rounded to float32.
    assert torch.autograd.gradcheck(lambda a, b: REGISTRY[name](a, b, how), inputs, eps=2e-3, atol=2e-3, rtol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_formula_in_float64(name: str) -> None:
    a, b = (random_maps(seed, batch=3).double().flatten(1) + 0.01 for seed in (0, 1))
    inputs = tuple((maps / maps.sum(1, keepdim=True)).requires_grad_() for maps in (a, b))
    assert torch.autograd.gradcheck(REGISTRY[name].score, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_lowers_the_score(name: str) -> None:
    label, confounder = random_maps(0).add(0.1), random_maps(1).add(0.1)
    scores, *gradients = with_gradients(REGISTRY[name], label, confounder)
    steps = [1e-2 * gradient / gradient.abs().amax(dim=(1, 2), keepdim=True) for gradient in gradients]
    assert (REGISTRY[name](label - steps[0], confounder) < scores).all()
    assert (REGISTRY[name](label, confounder - steps[1]) < scores).all()


@pytest.mark.parametrize(
    ("name", "fades"),
    [("mae", 1), ("rmse", 1), ("js_distance", 1), ("mse", 0.01), ("kl", 0.01), ("js_divergence", 0.01),
     ("cosine", 0.01), ("ssim", 0.01)],
)  # fmt: skip
def test_gradient_as_the_maps_come_together(name: str, fades: float) -> None:
    """That of a norm keeps its size, and parts maps that agree; that of a smooth maximum vanishes with the distance."""
    label, towards = random_maps(0).double().flatten(1) + 0.5, signed_maps(1).double().flatten(1)
    scale = SCALES[REGISTRY[name].normalisation]

    def size(at: float) -> float:
        a, b = (torch.from_numpy(scale(maps.numpy())) for maps in (label, label * (1 + at * towards)))
        return with_gradients(REGISTRY[name].score, a, b)[1].norm().item()

    assert size(1e-4) / size(1e-2) == pytest.approx(fades, rel=0.1)


@pytest.mark.parametrize("name", ["soft_iou", "soft_dice"])
def test_overlap_of_a_map_with_itself_is_below_one_unless_it_is_zero_or_one(name: str) -> None:
    # By hand: half ones, half .5: IoU (8 + 2) / (8 + 8 * .75), Dice 2 (8 + 2) / (2 * 12).
    maps = half("left") + 0.5 * half("right")
    expected = {"soft_iou": 10 / 14, "soft_dice": 20 / 24}[name]
    assert REGISTRY[name](maps, maps).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    torch.testing.assert_close(REGISTRY[name](label, confounder), REGISTRY[name](confounder, label))


def test_divergence_has_the_confounder_map_for_reference() -> None:
    """A label map that leaves out what the confounder map shows costs more than one that adds to it."""
    # By hand: with F per pixel, KL(q | p) counts the pixels of q; see BY_HAND for (half, ones), and the reverse is
    # 8 HIGH / T log(16 HIGH / T) + 8 F / T log(16 F / T).
    kl, ones = REGISTRY["kl"], torch.ones(1, 4, 4)
    reverse = 8 * HIGH / TOTAL * math.log(16 * HIGH / TOTAL) + 8 * FLOOR / TOTAL * math.log(16 * FLOOR / TOTAL)
    assert kl(ones, half("left")).item() == pytest.approx(-reverse, abs=1e-6)
    assert kl(half("left"), ones).item() == pytest.approx(BY_HAND["kl"].half, abs=1e-6)
    assert BY_HAND["kl"].half < 2 * -reverse < 0


@pytest.mark.parametrize("how", ["max", "max_live", "minmax", "l1"])
@pytest.mark.parametrize("name", NAMES)
def test_invariant_to_scale(name: str, how: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    scaled = REGISTRY[name](1e3 * label, 1e-3 * confounder, how)
    torch.testing.assert_close(scaled, REGISTRY[name](label, confounder, how), rtol=1e-4, atol=1e-5)


def test_raw_maps_can_buy_any_error_by_scale() -> None:
    label, confounder = random_maps(0), random_maps(1)
    for name in ("mae", "mse", "rmse"):
        assert (REGISTRY[name](1e3 * label, confounder, "none") < 100 * REGISTRY[name](label, confounder, "none")).all()
    torch.testing.assert_close(
        REGISTRY["cosine"](1e3 * label, confounder, "none"), REGISTRY["cosine"](label, confounder)
    )


@pytest.mark.parametrize("name", NAMES)
def test_invariant_to_a_common_permutation_of_pixels_and_follows_one_of_images(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    scores = REGISTRY[name](label, confounder)
    pixels, images = torch.randperm(49), torch.randperm(6)
    shuffled = (maps.flatten(1)[:, pixels].view(6, 7, 7) for maps in (label, confounder))
    torch.testing.assert_close(REGISTRY[name](*shuffled), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(REGISTRY[name](label[images], confounder[images]), scores[images])


def test_ncc_ignores_an_offset() -> None:
    label, confounder = signed_maps(0), signed_maps(1)
    ncc = REGISTRY["ncc"]
    torch.testing.assert_close(ncc(label + 2, confounder, "none"), ncc(label, confounder, "none"), rtol=1e-4, atol=1e-5)


# Weighted sums have gradients by hand: with w the weights and h the maps, "max" gives w / max h, "minmax"
# w / (max h - min h), "l1" w / S - sum(w h) / S^2 with S the sum, "max_live" that of "max" less sum(w h) / (max h)^2 at
# the largest pixel, "minmax_live" that of "minmax" less s at the largest pixel, less sum(w) / (max h - min h) - s at
# the smallest, with s = sum(w (h - min h)) / (max h - min h)^2. Here w h sums to 1*4 + 2*1 + 3*3 + 4*.5 = 17.
@pytest.mark.parametrize(
    ("how", "values", "gradient"),
    [
        ("none", [4, 1, 3, 0.5], [1, 2, 3, 4]),
        ("max", [1, 0.25, 0.75, 0.125], [1 / 4, 2 / 4, 3 / 4, 4 / 4]),
        ("max_live", [1, 0.25, 0.75, 0.125], [1 / 4 - 17 / 16, 2 / 4, 3 / 4, 4 / 4]),
        ("minmax", [1, 0.5 / 3.5, 2.5 / 3.5, 0], [1 / 3.5, 2 / 3.5, 3 / 3.5, 4 / 3.5]),
        (
            "minmax_live",
            [1, 0.5 / 3.5, 2.5 / 3.5, 0],
            [1 / 3.5 - 12 / 3.5**2, 2 / 3.5, 3 / 3.5, 4 / 3.5 - 10 / 3.5 + 12 / 3.5**2],
        ),
        ("l1", [4 / 8.5, 1 / 8.5, 3 / 8.5, 0.5 / 8.5], [w / 8.5 - 17 / 8.5**2 for w in (1, 2, 3, 4)]),
    ],
)
def test_normalisations_and_their_gradients(how: str, values: list[float], gradient: list[float]) -> None:
    maps = torch.tensor([[[4.0, 1.0], [3.0, 0.5]]], requires_grad=True)
    found = normalise(maps, how)
    assert found.flatten().tolist() == pytest.approx(values)
    (slopes,) = torch.autograd.grad((found.flatten() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), maps)
    assert slopes.flatten().tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_zero_maps_stay_zero_and_constant_maps_finite(how: str) -> None:
    assert normalise(torch.zeros(2, 3, 3), how).abs().max() == 0
    constant = normalise(torch.full((1, 3, 3), 5.0), how)
    expected = {"max": 1, "max_live": 1, "minmax": 0, "minmax_live": 0, "l1": 1 / 9, "none": 5}[how]
    torch.testing.assert_close(constant, torch.full((1, 3, 3), float(expected)))


def test_largest_value_of_signed_maps_is_by_size() -> None:
    maps = torch.tensor([[[-4.0, 1.0], [2.0, 0.0]]])
    assert normalise(maps, "max").flatten().tolist() == [-1, 0.25, 0.5, 0]


def test_a_new_one_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarities, "REGISTRY", type(REGISTRY)("similarity"))

    @similarity(normalisation="max")
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Mean product."""
        return (a * b).mean(1)

    assert isinstance(product, Similarity)
    assert (product.__name__, product.__doc__) == ("product", "Mean product.")
    assert similarities.REGISTRY["product"](half("left"), torch.ones(1, 4, 4)).tolist() == [0.5]


@pytest.mark.parametrize("name", NAMES)
def test_docs_state_formula_range_and_equation(name: str) -> None:
    text = str(REGISTRY[name].__doc__)
    assert "``" in text
    assert "in [" in text.lower()
    assert "Source: eX2L, equation" in text


def test_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"'min_max'.*max, max_live, minmax, minmax_live, l1, none"):
        normalise(torch.ones(1, 2, 2), "min_max")
    with pytest.raises(ValueError, match=r"\(2, 7, 7\) and \(2, 6, 7\)"):
        REGISTRY["mae"](torch.ones(2, 7, 7), torch.ones(2, 6, 7))
    with pytest.raises(ValueError, match="more than one pixel"):
        REGISTRY["mae"](torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        REGISTRY["mae"](torch.ones(2, 49), torch.ones(2, 49))
    with pytest.raises(NotImplementedError, match="soft_dize"):
        REGISTRY["soft_dize"]

"""Every similarity against scipy, scikit-image or numpy, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from skimage.metrics import structural_similarity

from domainbed import similarities
from domainbed.similarities import REGISTRY, normalise, similarity

NAMES = ("mae", "cosine", "soft_dice", "js_distance", "ssim")
RANGES = {
    "mae": (-1, 0),
    "cosine": (0, 1),
    "soft_dice": (0, 1),
    "js_distance": (-math.sqrt(math.log(2)), 0),
    "ssim": (-1, 1),
}


def reference(name: str, label: np.ndarray, confounder: np.ndarray) -> float:
    """One image in float64, by libraries where there is one."""
    a, b = label / label.max(), confounder / confounder.max()
    if name == "mae":
        return float(-np.mean(np.abs(a - b)))
    if name == "cosine":
        return float(1 - distance.cosine(label.ravel(), confounder.ravel()))
    if name == "soft_dice":
        return float(2 * np.vdot(a, b) / (a.sum() + b.sum()))
    if name == "js_distance":
        return float(-distance.jensenshannon(label.ravel(), confounder.ravel()))
    # One window that covers the whole 7 x 7 map makes skimage's local statistics global.
    return float(structural_similarity(a, b, win_size=7, data_range=1.0, use_sample_covariance=True))


def random_maps(seed: int, batch: int = 6, size: int = 7) -> torch.Tensor:
    """Maps with the zeros that a ReLU leaves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, size, generator=generator).add(0.3).relu()


def half(side: str) -> torch.Tensor:
    """A 4 x 4 map that is 1 on one half and 0 on the other."""
    maps = torch.zeros(1, 4, 4)
    maps[:, :, :2] = side == "left"
    maps[:, :, 2:] = side == "right"
    return maps


ODD_PAIRS = {
    "identical": (random_maps(0), random_maps(0)),
    "nearly identical": (random_maps(0), random_maps(0) * (1 + 1e-6 * random_maps(1))),
    "disjoint": (half("left"), half("right")),
    "one is zero": (torch.zeros(2, 7, 7), random_maps(0, batch=2)),
    "both are zero": (torch.zeros(2, 7, 7), torch.zeros(2, 7, 7)),
    "both constant": (torch.ones(2, 7, 7), torch.full((2, 7, 7), 3.0)),
    "one constant": (torch.ones(2, 7, 7), random_maps(0, batch=2)),
    "tiny": (1e-12 * random_maps(0), 1e-12 * random_maps(1)),
    "huge": (1e6 * random_maps(0), 1e6 * random_maps(1)),
    "tiny against huge": (1e-12 * random_maps(0), 1e6 * random_maps(1)),
    "one pixel": (torch.eye(49)[:4].view(4, 7, 7), torch.ones(4, 7, 7)),
}


def test_registered_names() -> None:
    assert [name for name in REGISTRY if name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    expected = [reference(name, a, b) for a, b in zip(label.double().numpy(), confounder.double().numpy(), strict=True)]
    np.testing.assert_allclose(REGISTRY[name](label, confounder).numpy(), expected, rtol=1e-4, atol=1e-6)


# By hand. SSIM of two halves that are each other's negative: means 1/2, variances (16/4)/15 = 4/15, covariance -4/15,
# so luminance 1 and (-8/15 + C2) / (8/15 + C2) with C2 = 9e-4.
@pytest.mark.parametrize(
    ("name", "same", "disjoint", "against_ones"),
    [
        ("mae", 0.0, -1.0, -0.5),
        ("cosine", 1.0, 0.0, math.sqrt(0.5)),
        ("soft_dice", 1.0, 0.0, 2 * 8 / (8 + 16)),
        ("js_distance", 0.0, -math.sqrt(math.log(2)), -math.sqrt(0.75 * math.log(4 / 3))),
        ("ssim", 1.0, (-8 / 15 + 9e-4) / (8 / 15 + 9e-4), (1 + 1e-4) / (1.25 + 1e-4) * 9e-4 / (4 / 15 + 9e-4)),
    ],
)
def test_hand_made_halves(name: str, same: float, disjoint: float, against_ones: float) -> None:
    score = REGISTRY[name]
    assert score(half("left"), half("left")).item() == pytest.approx(same, abs=2e-6)
    assert score(half("left"), half("right")).item() == pytest.approx(disjoint, abs=2e-6)
    assert score(half("left"), torch.ones(1, 4, 4)).item() == pytest.approx(against_ones, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mae", -1.0),
        ("cosine", 0.0),
        ("soft_dice", 0.0),
        ("js_distance", -math.sqrt(math.log(2) / 2)),  # only the half of the divergence that the ones contribute
        ("ssim", 1e-4 / (1 + 1e-4)),
    ],
)
def test_zero_map_against_ones(name: str, expected: float) -> None:
    assert REGISTRY[name](torch.zeros(1, 3, 3), torch.ones(1, 3, 3)).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", ODD_PAIRS)
def test_finite_and_in_range_with_finite_gradients(name: str, pair: str) -> None:
    label, confounder = (maps.clone().requires_grad_() for maps in ODD_PAIRS[pair])
    scores = REGISTRY[name](label, confounder)
    low, high = RANGES[name]
    assert scores.shape == label.shape[:1]
    assert torch.isfinite(scores).all()
    assert scores.min() >= low - 1e-5
    assert scores.max() <= high + 1e-5
    for gradient in torch.autograd.grad(scores.sum(), (label, confounder)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_lowers_the_score(name: str) -> None:
    label, confounder = random_maps(0).add(0.1).requires_grad_(), random_maps(1).add(0.1)
    scores = REGISTRY[name](label, confounder)
    (gradient,) = torch.autograd.grad(scores.sum(), label)
    moved = (label - 1e-2 * gradient / gradient.abs().amax(dim=(1, 2), keepdim=True)).detach()
    assert (REGISTRY[name](moved, confounder) < scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_symmetric(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    torch.testing.assert_close(REGISTRY[name](label, confounder), REGISTRY[name](confounder, label))


@pytest.mark.parametrize("name", NAMES)
def test_invariant_to_scale(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    scaled = REGISTRY[name](1e3 * label, 1e-3 * confounder)
    torch.testing.assert_close(scaled, REGISTRY[name](label, confounder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_invariant_to_a_common_permutation_of_pixels_and_follows_one_of_images(name: str) -> None:
    label, confounder = random_maps(0), random_maps(1)
    scores = REGISTRY[name](label, confounder)
    pixels, images = torch.randperm(49), torch.randperm(6)
    shuffled = (maps.flatten(1)[:, pixels].view(6, 7, 7) for maps in (label, confounder))
    torch.testing.assert_close(REGISTRY[name](*shuffled), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(REGISTRY[name](label[images], confounder[images]), scores[images])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    label, confounder = random_maps(0).to(dtype), random_maps(1).to(dtype)
    scores = REGISTRY[name](label, confounder)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, REGISTRY[name](label.float(), confounder.float()), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(REGISTRY[name](label, confounder), scores, rtol=0, atol=0)


def test_maximum_is_a_constant_and_the_sum_is_not() -> None:
    maps = torch.tensor([[[4.0, 1.0], [3.0, 0.0]]], requires_grad=True)
    by_max, by_sum = normalise(maps, "max"), normalise(maps, "l1")
    torch.testing.assert_close(by_max, torch.tensor([[[1.0, 0.25], [0.75, 0.0]]]))
    torch.testing.assert_close(by_sum, torch.tensor([[[0.5, 0.125], [0.375, 0.0]]]))
    (of_max,) = torch.autograd.grad(by_max.sum(), maps)
    (of_sum,) = torch.autograd.grad(by_sum.sum(), maps)
    torch.testing.assert_close(of_max, torch.full_like(maps, 0.25))
    torch.testing.assert_close(of_sum, torch.zeros_like(maps), atol=1e-6, rtol=0)


def test_normalisation_can_be_chosen() -> None:
    label, confounder = random_maps(0), random_maps(1)
    p, q = (maps.flatten(1) / maps.flatten(1).sum(1, keepdim=True) for maps in (label, confounder))
    total_variation = 0.5 * (p - q).abs().sum(1)
    torch.testing.assert_close(REGISTRY["mae"](label, confounder, normalisation="l1"), -2 / 49 * total_variation)


def test_a_new_one_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarities, "REGISTRY", type(REGISTRY)("similarity"))

    @similarity(normalisation="max")
    def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return -(a - b).square().mean(1)

    assert mse.__name__ == "mse"
    assert similarities.REGISTRY["mse"](half("left"), half("right")).tolist() == [-1.0]


def test_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"'min_max'.*'max' or 'l1'"):
        normalise(torch.ones(1, 2, 2), "min_max")
    with pytest.raises(ValueError, match=r"\(2, 7, 7\) and \(2, 6, 7\)"):
        REGISTRY["mae"](torch.ones(2, 7, 7), torch.ones(2, 6, 7))
    with pytest.raises(ValueError, match="more than one pixel"):
        REGISTRY["mae"](torch.ones(2, 1, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        REGISTRY["mae"](torch.ones(2, 49), torch.ones(2, 49))

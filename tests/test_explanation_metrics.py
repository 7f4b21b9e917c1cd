"""Metrics of heatmaps: known answers, a slow re-implementation, captum and Quantus, and what must not matter."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from domainbed import explanation_metrics as metrics
from domainbed.explanation_metrics import (
    BINS,
    FAITHFULNESS,
    LOCALISATION,
    METRICS,
    Shown,
    comprehensiveness,
    deletion_auc,
    energy_in_mask,
    faithfulness,
    insertion_auc,
    learned_mask_iou,
    localisation,
    mask_iou,
    name,
    pointing_game,
    probability,
    ranks,
    soft_comprehensiveness,
    soft_sufficiency,
    sufficiency,
)
from domainbed.masking import FILLS, fill

SIZE = torch.Size((12, 10))
MEAN = torch.tensor([0.4, 0.5, 0.6])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_net(num_logits: int = 3) -> nn.Module:
    """A network with batch norm whose statistics are not those of the images, in evaluation mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, num_logits),
    )
    with torch.no_grad():
        net(torch.rand(16, 3, *SIZE))
        net[5].weight.mul_(8)
    return net.eval()


def make_case(count: int = 9, num_logits: int = 3, cells: tuple[int, int] = (4, 3)) -> tuple[Any, ...]:
    """Network, images, heatmaps behind a ReLU, classes."""
    target = torch.arange(count) % max(num_logits, 2)
    return make_net(num_logits), torch.rand(count, 3, *SIZE), torch.randn(count, *cells).relu(), target


# Known answers


def test_probability_of_several_classes_and_of_one_logit() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    torch.testing.assert_close(probability(logits, torch.tensor([1, 1])), torch.tensor([0.75, 0.2]))
    one = torch.tensor([[math.log(3.0)], [math.log(3.0)]])
    torch.testing.assert_close(probability(one, torch.tensor([1, 0])), torch.tensor([0.75, 0.25]))


def planted(x: Tensor) -> Tensor:
    """Two logits (0, 2 if the pixel in row 2, column 3 is white): p of class 1 is .5 without it."""
    seen = 2 * x[:, 0, 2, 3]
    return torch.stack([torch.zeros_like(seen), seen], dim=1)


P = 1 / (1 + math.exp(-2))


def planted_case(value: float, rest: float = 0.0) -> tuple[Tensor, Tensor]:
    """A white image of 10 x 10, and a heatmap with this value at the planted pixel and another one elsewhere."""
    heatmap = torch.full((1, 10, 10), rest)
    heatmap[0, 2, 3] = value
    return torch.ones(1, 3, 10, 10), heatmap


def shown_planted(value: float, rest: float = 0.0, steps: int = 28) -> Shown:
    x, heatmap = planted_case(value, rest)
    return Shown(planted, x, heatmap, torch.tensor([1]), torch.zeros(1, 3, 1, 1), steps)


@pytest.mark.parametrize("value", [1.0, 0.01])  # the scale is arbitrary
def test_a_planted_pixel_that_the_heatmap_names(value: float) -> None:
    shown = shown_planted(value)
    assert sufficiency(shown).item() == pytest.approx(0, abs=1e-6)
    assert comprehensiveness(shown).item() == pytest.approx(P - 0.5)
    assert soft_sufficiency(shown).item() == pytest.approx(0, abs=1e-6)
    assert soft_comprehensiveness(shown).item() == pytest.approx(P - 0.5)
    # With 10 steps the first one holds the pixel: half a trapezoid, then nothing changes.
    shown = shown_planted(value, steps=10)
    assert insertion_auc(shown).item() == pytest.approx(0.1 * (0.5 + P) / 2 + 0.9 * P)
    assert deletion_auc(shown).item() == pytest.approx(0.1 * (0.5 + P) / 2 + 0.9 * 0.5)


def test_a_planted_pixel_that_the_heatmap_ranks_last() -> None:
    shown = shown_planted(-1.0, steps=1000)  # cut to steps of one pixel
    assert sufficiency(shown).item() == pytest.approx(P - 0.5)
    assert comprehensiveness(shown).item() == pytest.approx(0, abs=1e-6)
    assert soft_sufficiency(shown).item() == pytest.approx(P - 0.5)
    assert soft_comprehensiveness(shown).item() == pytest.approx(0, abs=1e-6)
    assert insertion_auc(shown).item() == pytest.approx(0.99 * 0.5 + 0.01 * (0.5 + P) / 2)
    assert deletion_auc(shown).item() == pytest.approx(0.99 * P + 0.01 * (0.5 + P) / 2)


def test_a_planted_pixel_that_is_named_thirtieth() -> None:
    """Among the first 50 %, not among the first 20 %: one of five bins."""
    heatmap = torch.arange(100.0).flip(0)
    at = 2 * 10 + 3
    heatmap[[at, 29]] = heatmap[[29, at]]
    x = torch.ones(1, 3, 10, 10)
    shown = Shown(planted, x, heatmap.view(1, 10, 10), torch.tensor([1]), torch.zeros_like(x))
    assert sufficiency(shown).item() == pytest.approx(4 / 5 * (P - 0.5))
    assert comprehensiveness(shown).item() == pytest.approx(1 / 5 * (P - 0.5))


def test_a_linear_model_of_one_logit() -> None:
    """z = 8 times the sum of weights and pixels: every probability is a sigmoid of sums over the order."""
    weights = torch.randn(5, 5).double()
    x = torch.rand(2, 1, 5, 5)
    heatmaps = weights.float() * x[:, 0]  # signed, each pixel's own contribution

    def predict(images: Tensor) -> Tensor:
        return 8 * (images[:, 0] * weights).sum(dim=(1, 2), keepdim=True)[:, 0]

    found = faithfulness(predict, x, heatmaps, torch.tensor([1, 1]), torch.zeros(1), steps=25)
    for image in range(2):
        parts = 8 * (x[image, 0] * weights).flatten().sort(descending=True).values
        kept = torch.cat([torch.zeros(1), parts.cumsum(0)]).sigmoid()
        removed = (parts.sum() - torch.cat([torch.zeros(1), parts.cumsum(0)])).sigmoid()
        counts = [math.ceil(k / 100 * 25) for k in BINS]  # 1, 2, 3, 5, 13
        whole = parts.sum().sigmoid()
        assert found["sufficiency"][image].item() == pytest.approx((whole - kept[counts].mean()).item(), abs=1e-6)
        assert found["comprehensiveness"][image].item() == pytest.approx(
            (whole - removed[counts].mean()).item(), abs=1e-6
        )
        assert found["insertion_auc"][image].item() == pytest.approx(
            ((kept[1:] + kept[:-1]).sum() / 50).item(), abs=1e-6
        )
        assert found["deletion_auc"][image].item() == pytest.approx(
            ((removed[1:] + removed[:-1]).sum() / 50).item(), abs=1e-6
        )


def square(count: int = 1) -> Tensor:
    """Masks of 8 x 8 with a square of 3 x 4 set."""
    masks = torch.zeros(count, 8, 8)
    masks[:, 2:5, 1:5] = 1
    return masks


def test_a_heatmap_that_is_the_mask() -> None:
    assert {k: v.item() for k, v in localisation(5 * square(), square()).items()} == {
        "pointing_game": 1,
        "energy_in_mask": 1,
        "mask_iou": 1,
    }
    assert learned_mask_iou(square(), square()).item() == 1


def test_a_heatmap_beside_the_mask() -> None:
    assert all(v.item() == 0 for v in localisation(1 - square(), square()).values())
    assert learned_mask_iou(1 - square(), square()).item() == 0


def test_a_heatmap_that_overlaps_the_mask() -> None:
    heatmap = torch.zeros(1, 8, 8)
    heatmap[0, 2:5, 3:7] = 2  # 6 of its 12 pixels inside
    heatmap[0, 0, 0] = 0.9  # below half of the maximum, outside
    heatmap[0, 7, 7] = -50
    assert pointing_game(heatmap, square()).item() == 0.5
    assert energy_in_mask(heatmap, square()).item() == pytest.approx(12 / 24.9)
    assert mask_iou(heatmap, square()).item() == pytest.approx(6 / 18)
    half = 0.5 * square()
    assert energy_in_mask(heatmap, half).item() == pytest.approx(6 / 24.9)
    assert pointing_game(heatmap, half).item() == 0  # .5 is not above .5


def test_a_learned_mask_is_not_divided_by_its_maximum() -> None:
    assert learned_mask_iou(0.4 * square(), square()).item() == 0
    assert learned_mask_iou(torch.full_like(square(), 0.5), square()).item() == 0  # undecided is not set
    assert mask_iou(0.4 * square(), square()).item() == 1
    small = F.avg_pool2d(square(), 2)  # 4 x 4, enlarged again
    assert 0.5 < learned_mask_iou(small, square()).item() <= 1


def test_an_empty_mask_gives_zeros() -> None:
    assert all(v.item() == 0 for v in localisation(square(), torch.zeros(1, 8, 8)).values())
    assert learned_mask_iou(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)).item() == 0


# Against a slow re-implementation, and packages that define the same


def slow_upsampled(heatmap: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Bilinear between pixel centres, in double precision, pixel by pixel."""

    def at(position: int, large: int, small: int) -> tuple[int, int, float]:
        centre = max((position + 0.5) * small / large - 0.5, 0)
        low = min(int(centre), small - 1)
        return low, min(low + 1, small - 1), centre - low

    result = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            top, bottom, down = at(row, size[0], heatmap.shape[0])
            left, right, across = at(column, size[1], heatmap.shape[1])
            upper = heatmap[top, left] * (1 - across) + heatmap[top, right] * across
            lower = heatmap[bottom, left] * (1 - across) + heatmap[bottom, right] * across
            result[row, column] = upper * (1 - down) + lower * down
    return result


def slow_metrics(
    ask: Callable[[NDArray[Any]], float], x: NDArray[Any], filled: NDArray[Any], heatmap: NDArray[Any], steps: int
) -> dict[str, float]:
    """All metrics of one image (C, H, W), for a heatmap without ties; ask gives p of an image."""
    _, height, width = x.shape
    n = height * width
    full = slow_upsampled(heatmap, (height, width))
    order = sorted(((full[r, c], r, c) for r in range(height) for c in range(width)), reverse=True)

    def seen(count: int, kept: bool) -> float:
        image = (filled if kept else x).copy()
        for _, r, c in order[:count]:
            image[:, r, c] = (x if kept else filled)[:, r, c]
        return ask(image)

    counts = [math.ceil(k * n / 100) for k in BINS]
    grid = [round(step * n / steps) for step in range(steps + 1)]
    soft = np.maximum(full, 0) / full.max()

    def area(kept: bool) -> float:
        values = [seen(count, kept) for count in grid]
        return sum(
            (values[i] + values[i + 1]) / 2 * (grid[i + 1] - grid[i]) / n for i in range(steps)
        )  # fmt: skip

    return {
        "sufficiency": float(np.mean([ask(x) - seen(count, True) for count in counts])),
        "comprehensiveness": float(np.mean([ask(x) - seen(count, False) for count in counts])),
        "soft_sufficiency": ask(x) - ask(x * soft + filled * (1 - soft)),
        "soft_comprehensiveness": ask(x) - ask(x * (1 - soft) + filled * soft),
        "insertion_auc": area(True),
        "deletion_auc": area(False),
    }


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_faithfulness_equals_a_slow_computation(how: str, num_logits: int) -> None:
    net, x, _, target = make_case(3, num_logits)
    heatmaps = torch.randn(3, 12, 10)  # as many pixels as the image, so that there are no ties
    heatmaps[2] = heatmaps[2].abs()
    filled = fill(x, how, MEAN)
    found = faithfulness(net, x, heatmaps, target, filled, steps=7)
    for image in range(3):

        def ask(pixels: NDArray[Any], image: int = image) -> float:
            with torch.no_grad():
                logits = net(torch.from_numpy(pixels).float()[None])[0].double()
            if num_logits == 1:
                p = 1 / (1 + math.exp(-logits.item()))
                return p if target[image] == 1 else 1 - p
            return (logits.exp() / logits.exp().sum())[target[image]].item()

        own = filled.expand_as(x)[image].double().numpy()
        expected = slow_metrics(ask, x[image].double().numpy(), own, heatmaps[image].double().numpy(), 7)
        assert {k: v[image].item() for k, v in found.items()} == pytest.approx(expected, abs=1e-5)


def test_upsampling_equals_a_slow_computation() -> None:
    heatmaps = torch.randn(2, 4, 3)
    found = metrics.enlarged(heatmaps, SIZE)
    for image in range(2):
        own = heatmaps[image].double().numpy()
        expected = slow_upsampled(own / np.abs(own).max(), (12, 10))
        np.testing.assert_allclose(found[image].numpy(), expected, atol=2 / metrics.LEVELS)


def test_localisation_equals_a_slow_computation() -> None:
    heatmaps, masks = torch.randn(6, 4, 3), torch.rand(6, *SIZE)
    found = localisation(heatmaps, masks)
    for image in range(6):
        full, mask = slow_upsampled(heatmaps[image].double().numpy(), (12, 10)), masks[image].double().numpy()
        hits, inside, total, both, either = 0.0, 0.0, 0.0, 0, 0
        for r in range(12):
            for c in range(10):
                hits += full[r, c] == full.max() and mask[r, c] > 0.5
                inside += max(full[r, c], 0) * mask[r, c]
                total += max(full[r, c], 0)
                a, b = full[r, c] > full.max() / 2, mask[r, c] > 0.5
                both, either = both + (a and b), either + (a or b)
        # Corners are flat, where a maximum has company; its pixels are equal in double precision too.
        hits /= (full == full.max()).sum()
        assert found["pointing_game"][image].item() == pytest.approx(hits)
        assert found["energy_in_mask"][image].item() == pytest.approx(inside / total, abs=1e-4)
        assert found["mask_iou"][image].item() == pytest.approx(both / either)


@pytest.mark.parametrize("how", FILLS)
def test_captum_says_the_same_of_sufficiency_and_comprehensiveness(how: str) -> None:
    """Captum's feature ablation of two parts of an image: the score that each takes away with it."""
    attr = pytest.importorskip("captum.attr")
    net, x, heatmaps, target = make_case(4)
    filled = fill(x, how, MEAN).expand_as(x)
    ablation = attr.FeatureAblation(lambda images: net(images).softmax(dim=1))
    own = []
    assert BINS == (1, 5, 10, 20, 50)  # ERASER's
    for percent in BINS:
        first = ranks(heatmaps, SIZE) < math.ceil(percent * 120 / 100)  # (B, H, W)
        parts = first.long()[:, None].expand_as(x)
        taken = [ablation.attribute(x[i : i + 1], filled[i : i + 1], int(target[i]), feature_mask=parts[i : i + 1])
                 for i in range(4)]  # fmt: skip
        pixels = torch.cat(taken)[:, 0]
        rest = (pixels * ~first).amax(dim=(1, 2)) + (pixels * ~first).amin(dim=(1, 2))  # one value and 0
        own.append((rest, (pixels * first).amax(dim=(1, 2)) + (pixels * first).amin(dim=(1, 2))))
    shown = Shown(net, x, heatmaps, target, filled)
    torch.testing.assert_close(sufficiency(shown), torch.stack([rest for rest, _ in own]).mean(0).float())
    torch.testing.assert_close(comprehensiveness(shown), torch.stack([first for _, first in own]).mean(0).float())


def test_quantus_says_the_same_of_deletion() -> None:
    quantus = pytest.importorskip("quantus")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x, heatmaps, target = torch.rand(5, 1, 8, 8), torch.randn(5, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    flipping = quantus.PixelFlipping(
        features_in_step=4, perturb_baseline="black", normalise=False, disable_warnings=True
    )
    values = flipping(net, x.numpy(), target.numpy(), heatmaps[:, None].numpy(), softmax=True)
    black = x.amin(dim=(1, 2, 3), keepdim=True)
    shown = Shown(net, x, heatmaps, target, black, steps=16)
    curve = torch.cat([shown.whole()[:, None], torch.tensor(np.array(values)).float()], dim=1)
    torch.testing.assert_close(deletion_auc(shown), torch.trapezoid(curve, dx=1 / 16))


def test_quantus_says_the_same_of_localisation() -> None:
    quantus = pytest.importorskip("quantus")
    heatmaps, masks = torch.rand(6, 8, 8), (torch.rand(6, 8, 8) > 0.5).float()
    x, target = torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    for metric, own in (("PointingGame", pointing_game), ("RelevanceMassAccuracy", energy_in_mask)):
        measure = getattr(quantus, metric)(normalise=False, disable_warnings=True)
        theirs = measure(net, x.numpy(), target.numpy(), heatmaps[:, None].numpy(), masks[:, None].numpy())
        np.testing.assert_allclose(own(heatmaps, masks).numpy(), np.array(theirs, float), rtol=1e-5)


# The order of pixels, ties and dead maps


def test_ranks_are_a_permutation_in_the_order_of_the_values() -> None:
    heatmaps = torch.randn(3, 4, 3)
    values, places = metrics.enlarged(heatmaps, SIZE).flatten(1), ranks(heatmaps, SIZE).flatten(1)
    assert (places.sort(dim=1).values == torch.arange(120)).all()
    assert (values.gather(1, places.argsort(dim=1)).diff(dim=1) <= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -3.3, 1e-30, 1e30])
@pytest.mark.parametrize("cells", [(7, 7), (5, 3), (36, 36), (50, 40)])
def test_every_constant_map_follows_the_same_random_order(value: float, cells: tuple[int, int]) -> None:
    size = torch.Size((36, 36))
    order = ranks(torch.full((2, *cells), value), size)
    assert torch.equal(order[0], order[1])
    assert torch.equal(order, ranks(torch.zeros(2, *cells), size))
    half = order[0] < 648
    assert 0.2 < half[:18].float().mean() < 0.8  # not the upper half first
    assert 0.2 < half[:, :18].float().mean() < 0.8


def test_ties_come_as_blobs_of_the_size_of_the_maps_own() -> None:
    """Cut in half, a dead map of 7 x 7 has borders as long as a random one's, and far shorter than single pixels'."""
    size = torch.Size((84, 84))

    def border(heatmaps: Tensor) -> float:
        half = (ranks(heatmaps, size) < size.numel() // 2).float()
        return (half.diff(dim=1).abs().sum() + half.diff(dim=2).abs().sum()).item() / len(heatmaps)

    dead, drawn, pixels = border(torch.zeros(1, 7, 7)), border(torch.rand(20, 7, 7)), border(torch.zeros(1, 84, 84))
    assert 0.7 * drawn < dead < 1.4 * drawn
    assert dead < pixels / 4


@pytest.mark.parametrize(("cells", "side"), [(7, 224), (7, 28), (8, 64), (9, 36), (14, 224)])
def test_the_order_of_a_dead_map_favours_neither_centre_nor_border(cells: int, side: int) -> None:
    places, quarter = ranks(torch.zeros(1, cells, cells), torch.Size((side, side)))[0], side // 4
    for share in (0.1, 0.2, 0.5):
        first = (places < share * side**2).float()
        assert first[quarter:-quarter, quarter:-quarter].mean().item() == pytest.approx(share, rel=0.25)


def test_ties_below_a_peak_follow_the_same_order() -> None:
    heatmap = torch.zeros(1, 6, 5)
    heatmap[0, 2, 2] = 1
    live, dead = ranks(heatmap, SIZE)[0], ranks(0 * heatmap, SIZE)[0]
    zero = metrics.enlarged(heatmap, SIZE)[0] == 0
    assert torch.equal(live[zero].argsort(), dead[zero].argsort())
    assert live[~zero].max() < live[zero].min()


@pytest.mark.parametrize("how", FILLS)
def test_a_dead_map(how: str) -> None:
    net, x, heatmaps, target = make_case()
    filled, dead = fill(x, how, MEAN), torch.zeros_like(heatmaps)
    shown = Shown(net, x, dead, target, filled)
    with torch.no_grad():
        p, p_fill = probability(net(x), target), probability(net(filled.expand_as(x)), target)
    torch.testing.assert_close(soft_sufficiency(shown), p - p_fill)
    torch.testing.assert_close(soft_comprehensiveness(shown), torch.zeros(9))
    found = faithfulness(net, x, dead, target, filled)
    assert all(v.isfinite().all() for v in found.values())
    drawn = torch.rand(1, *heatmaps.shape[1:], generator=torch.Generator().manual_seed(metrics.SEED)).expand_as(
        heatmaps
    )
    random = faithfulness(net, x, drawn, target, filled)
    for metric in ("sufficiency", "comprehensiveness", "insertion_auc", "deletion_auc"):
        torch.testing.assert_close(found[metric], random[metric])


def test_a_dead_map_beside_a_mask() -> None:
    found = localisation(torch.zeros(1, 4, 4), square())
    assert {k: v.item() for k, v in found.items()} == {
        "pointing_game": pytest.approx(12 / 64),
        "energy_in_mask": 0,
        "mask_iou": 0,
    }
    negative = localisation(-torch.rand(1, 4, 4) - 0.1, square())
    assert negative["energy_in_mask"].item() == negative["mask_iou"].item() == 0


def test_a_flat_peak_is_shared_fairly_in_spite_of_interpolation() -> None:
    heatmap = torch.full((1, 3, 3), 0.1)
    assert pointing_game(heatmap, square()).item() == pytest.approx(12 / 64)


# What must not matter


@pytest.mark.parametrize("how", FILLS)
def test_the_batch_size_changes_nothing(how: str) -> None:
    net, x, heatmaps, target = make_case()
    largest: list[int] = []

    def predict(images: Tensor) -> Tensor:
        largest.append(len(images))
        return net(images)

    filled = fill(x, how, MEAN)
    results = {size: faithfulness(predict, x, heatmaps, target, filled, batch_size=size) for size in (1, 7, 64)}
    for size in (1, 7):
        for metric, values in results[size].items():
            torch.testing.assert_close(values, results[64][metric], rtol=0, atol=1e-6)
    assert sorted(set(largest)) == [1, 2, 7, 9]


def all_of(net: nn.Module, x: Tensor, heatmaps: Tensor, target: Tensor, masks: Tensor) -> dict[str, Tensor]:
    filled = fill(x, "blur", MEAN)
    return faithfulness(net, x, heatmaps, target, filled) | localisation(heatmaps, masks)


def test_permuting_the_batch_permutes_the_results() -> None:
    net, x, heatmaps, target = make_case()
    heatmaps[3] = 0
    masks, mixed = torch.rand(9, *SIZE), torch.randperm(9)
    found = all_of(net, x, heatmaps, target, masks)
    permuted = all_of(net, x[mixed], heatmaps[mixed], target[mixed], masks[mixed])
    for metric, values in found.items():
        torch.testing.assert_close(permuted[metric], values[mixed])


@pytest.mark.parametrize("scale", [2.0**-20, 3.7, 1e4])
def test_the_scale_of_a_heatmap_changes_nothing(scale: float) -> None:
    net, x, _, target = make_case()
    heatmaps, masks = torch.randn(9, 4, 3), torch.rand(9, *SIZE)
    found = all_of(net, x, heatmaps, target, masks)
    for metric, values in all_of(net, x, scale * heatmaps, target, masks).items():
        torch.testing.assert_close(values, found[metric], rtol=1e-4, atol=1e-4)


def test_results_are_float32_without_gradients_also_under_autocast() -> None:
    net, x, heatmaps, target = make_case()
    masks = torch.rand(9, *SIZE).double()
    with torch.autocast("cpu", torch.bfloat16):
        found = all_of(net, x, heatmaps.bfloat16().requires_grad_(), target, masks)
    assert all(v.shape == (9,) and v.dtype == torch.float32 and not v.requires_grad for v in found.values())


def test_parts_are_asked_for_once() -> None:
    net, x, heatmaps, target = make_case()
    calls = []
    faithfulness(lambda images: calls.append(len(images)) or net(images), x, heatmaps, target, torch.zeros(1))
    # The whole image and the fill, what curves and bins need in both directions, and two soft masks.
    steps = {round(step * 120 / 28) for step in range(29)} - {0, 120}
    bins = {math.ceil(k * 120 / 100) for k in BINS}
    assert len(calls) == 2 + 2 * len(steps | bins) + 2 <= 68


# Names and refusals


def test_names_state_fill_and_direction() -> None:
    assert name("sufficiency", "blur") == "sufficiency_blur_lower"
    assert name("insertion_auc", "zero") == "insertion_auc_zero_higher"
    assert name("mask_iou") == "mask_iou_higher"


def test_every_metric_has_a_direction_and_is_computed() -> None:
    assert {*FAITHFULNESS, *LOCALISATION} <= {*METRICS}
    assert set(METRICS.values()) == {"lower", "higher"}
    net, x, heatmaps, target = make_case(2)
    assert list(faithfulness(net, x, heatmaps, target, torch.zeros(1), steps=2)) == list(FAITHFULNESS)


@pytest.mark.parametrize(("heatmaps", "target"), [((8, 4, 3), 9), ((9, 1, 4, 3), 9), ((9, 4, 3), 8)])
def test_shapes_that_do_not_fit_are_refused(heatmaps: tuple[int, ...], target: int) -> None:
    net, x, _, _ = make_case()
    with pytest.raises(ValueError, match=r"images \(9, 3, 12, 10\), heatmaps .* do not fit; give"):
        Shown(net, x, torch.rand(heatmaps), torch.zeros(target, dtype=torch.int64), torch.zeros(1))


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks \(3, 8, 8\) do not fit; give"):
        localisation(torch.rand(2, 4, 4), square(3))


def test_half_precision_heatmaps_have_the_numbers_of_the_same_values_in_full() -> None:
    heatmaps = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(4)).bfloat16()
    size = torch.Size((36, 36))
    assert torch.equal(metrics.normalised(heatmaps, size), metrics.normalised(heatmaps.float(), size))
    assert torch.equal(ranks(heatmaps, size), ranks(heatmaps.float(), size))

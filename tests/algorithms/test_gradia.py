"""GRADIA, and what it shares with CARE."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import hparams_registry
from domainbed.algorithms import get_algorithm_class
from domainbed.algorithms.base import Task
from domainbed.algorithms.given_masks import energy_inside, is_flat
from domainbed.algorithms.gradia import soft_target
from domainbed.loaders import Minibatch
from domainbed.masking import at_size

SHAPE, K = (3, 36, 36), 3
BOTH = ("GRADIA", "CARE")


def build(name: str, **hparams: Any) -> Any:
    warm = {f"{name.lower()}_warmup": 0} if name in BOTH else {}
    settings = hparams_registry.default_hparams(name, "DigitsO2O") | warm | hparams
    torch.manual_seed(0)
    return get_algorithm_class(name).from_task(Task(SHAPE, K, num_domains=2), settings)


def step_data(seed: int = 0, mask: float | None = None) -> list[Minibatch]:
    """Two minibatches of noise with rectangles as masks, or with masks of one value."""
    generator = torch.Generator().manual_seed(seed)
    minibatches = []
    for n in (7, 6):
        m = torch.full((n, 36, 36), mask or 0.0)
        for i, corner in enumerate(torch.randint(0, 20, (n, 2), generator=generator).tolist()):
            if mask is None:
                m[i, corner[0] : corner[0] + 15, corner[1] : corner[1] + 11] = 1.0
        y = torch.randint(0, K, (n,), generator=generator)
        minibatches.append(Minibatch(torch.randn(n, *SHAPE, generator=generator), y, m=m))
    return minibatches


def updated(algorithm: Any, steps: int = 3) -> dict[str, float]:
    for seed in range(steps):
        values = algorithm.update(step_data(seed))
    return values


def plain(algorithm: Any) -> Any:
    """The same network with unit steps of plain SGD, whose change of the weights is the gradient."""
    algorithm.optimizer = torch.optim.SGD(algorithm.network.parameters(), lr=1.0)
    return algorithm


def slow_grad_cam(network: Any, layer: Any, x: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Logits (K,) and signed Grad-CAM (h, w) of one image; the channels' weights are numbers."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = network(x[None])[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[label], seen[0], retain_graph=True)
    weights = [float(channel.mean()) for channel in gradient[0]]
    return logits, sum(w * channel for w, channel in zip(weights, seen[0][0], strict=True))


def slow_mask(mask: Tensor, size: int) -> np.ndarray:
    """Block averages of a mask (H, W) as (size, size)."""
    block, values = len(mask) // size, mask.double().numpy()
    return np.array([[values[r : r + block, c : c + block].mean() for c in range(0, len(mask), block)]
                     for r in range(0, len(mask), block)])  # fmt: skip


def slow_soft(mask: np.ndarray) -> np.ndarray:
    n, blurred = len(mask), np.zeros_like(mask)
    mirror = [1, *range(n), n - 2]
    for r in range(n):
        for c in range(n):
            for dr, row_weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                for dc, column_weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                    blurred[r, c] += row_weight * column_weight * mask[mirror[r + dr + 1], mirror[c + dc + 1]]
    return blurred / blurred.max()


def slow_loss(gradia: Any, minibatches: list[Minibatch], threshold: float, weight: float) -> tuple[Tensor, dict]:
    """GRADIA's loss and values in float64, image by image."""
    network = gradia.network.double()
    risks, terms, energies, cells = [], [], [], []
    for x, y, m in ((x, int(y), m) for b in minibatches for x, y, m in zip(*b, b.m, strict=True)):
        logits, cam = slow_grad_cam(network, gradia.featurizer.map_layer, x.double(), y)
        mask = slow_mask(m, len(cam))
        positive = cam.detach().clamp(min=0).numpy()
        soft, energy = slow_soft(mask), (positive * mask).sum() / positive.sum()
        reasonable, right = (positive * soft).sum() / positive.sum() >= threshold, int(logits.argmax()) == y
        on_risk, on_attention = {
            (False, False): (1, 1), (False, True): (0.4, 1.6), (True, False): (0.8, 0.2), (True, True): (1, 0),
        }[bool(reasonable), right]  # fmt: skip
        risks.append(on_risk * -(logits[y].exp() / logits.exp().sum()).log())
        if on_attention:
            scaled = (cam - cam.min()) / (cam.max() - cam.min())
            terms.append(on_attention * (scaled - torch.from_numpy(soft)).abs().sum() / cam.numel())
        energies.append(energy)
        cells.append((bool(reasonable), right))
    assert len(set(cells)) == 4, "or not all weights are tried"
    attention = sum(terms) / len(terms)
    loss = sum(risks) / len(risks) + weight * attention
    values = {"loss": loss.item(), "attention_loss": attention.item(), "energy_in_mask": np.mean(energies)}
    return loss, values | {"reasonable": np.mean([cell[0] for cell in cells]), "comparable_maps": 1.0}


def test_update_equals_a_slow_loss_image_by_image_and_its_gradient() -> None:
    """The slow weights are plain numbers, so that the gradient shows ours to be constants, too."""
    threshold, weight, minibatches = 0.165, 0.7, step_data()
    gradia = plain(build("GRADIA", gradia_reasonable=threshold, gradia_lambda=weight))
    reference = build("GRADIA", gradia_reasonable=threshold, gradia_lambda=weight)
    loss, values = slow_loss(reference, minibatches, threshold, weight)
    expected = torch.autograd.grad(loss, list(reference.network.parameters()))
    before = [p.detach().clone() for p in gradia.network.parameters()]
    assert gradia.update(minibatches) == pytest.approx(values, rel=1e-4)
    for old, new, gradient in zip(before, gradia.network.parameters(), expected, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient.float(), rtol=1e-3, atol=1e-5)


def test_weights_by_reasonable_and_right_on_two_by_two_maps_by_hand() -> None:
    """A mask of one corner is 1 everywhere after the blur, which mirrors it: the distance is 1 - the scaled map's mean.

    The third map has nothing positive, so that nothing of it is in the mask, yet the same shape.
    """
    gradia = build("GRADIA")
    reasonable = torch.tensor([[4.0, 0.0], [2.0, 1.0]])  # scaled: 1, 0, 1/2, 1/4
    heatmaps = torch.stack([reasonable, reasonable, reasonable - 4, reasonable - 4, reasonable])
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).repeat(5, 1, 1)
    comparable = torch.tensor([True, True, True, True, False])
    logits, y = torch.tensor([[2.0, 0.0]]).repeat(5, 1), torch.tensor([1, 0, 1, 0, 1])
    risk, attention, values = gradia.guide(logits, y, heatmaps, mask, comparable)
    wrong, right = np.log(1 + np.exp(2.0)), np.log(1 + np.exp(-2.0))
    assert risk.item() == pytest.approx((0.8 * wrong + right + wrong + 0.4 * right + wrong) / 5, rel=1e-5)
    assert attention.item() == pytest.approx((0.2 + 1 + 1.6) * 0.5625 / 3, rel=1e-6)
    assert values == {"reasonable": 0.5}


def test_the_blur_is_opencvs_and_its_maximum_is_one() -> None:
    cv2 = pytest.importorskip("cv2")
    mask = torch.rand(4, 9, 7, generator=torch.Generator().manual_seed(0))
    blurred = np.stack([cv2.GaussianBlur(m.numpy(), (3, 3), 0) for m in mask])
    expected = blurred / blurred.max(axis=(1, 2), keepdims=True)
    torch.testing.assert_close(soft_target(mask), torch.from_numpy(expected))
    assert soft_target(torch.zeros(1, 4, 4)).sum() == 0


def test_a_masks_size_changes_by_the_mean_of_each_pixels_area() -> None:
    mask = torch.rand(1, 36, 36, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(at_size(mask, (9, 9))[0], slow_mask(mask[0], 9), rtol=1e-5)
    assert at_size(torch.ones(1, 224, 224), (7, 7)).amax() <= 1


def test_energy_counts_what_is_positive() -> None:
    maps = torch.tensor([[[3.0, -5.0], [1.0, 0.0]], [[-1.0, -1.0], [-1.0, 0.0]]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    assert energy_inside(maps, mask).tolist() == [0.75, 0.0]


def test_flat_maps_are_those_that_vary_by_rounding_only() -> None:
    rounding = 1 + 1e-7 * torch.arange(4.0).view(2, 2)
    maps = torch.stack([torch.zeros(2, 2), torch.full((2, 2), -3.0), rounding, 1e-4 * torch.eye(2), torch.eye(2)])
    assert is_flat(maps).tolist() == [True, True, True, False, False]


def weights(algorithm: Any) -> list[Tensor]:
    return [p.detach() for p in algorithm.network.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_the_control_is_erm_bit_for_bit_and_the_method_is_not(name: str) -> None:
    erm, method, control = build("ERM"), build(name), build(name, **get_algorithm_class(name).CONTROL)
    for algorithm in (erm, method, control):
        updated(algorithm)
    assert same(control, erm)
    assert not same(method, erm)


@pytest.mark.parametrize("name", BOTH)
def test_the_warm_up_is_erm_and_goes_on_after_loading(name: str) -> None:
    erm, method = build("ERM"), build(name, **{f"{name.lower()}_warmup": 2})
    updated(erm, 2), updated(method, 2)
    assert same(method, erm)
    fresh = build(name, **{f"{name.lower()}_warmup": 2})
    fresh.load_state_dict(method.state_dict())
    assert fresh.attention_weight() == 1.0
    erm.update(step_data(2)), method.update(step_data(2))
    assert not same(method, erm)
    assert int(method.update_count) == 3


@pytest.mark.parametrize("name", BOTH)
def test_minibatches_without_masks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="mask"):
        build(name).update([Minibatch(*minibatch) for minibatch in step_data()])


@pytest.mark.parametrize("name", BOTH)
def test_images_with_empty_masks_and_flat_maps_are_trained_without_guidance(name: str) -> None:
    for mask, zero in ((0.0, False), (None, True), (1.0, True)):
        erm, method = plain(build("ERM")), plain(build(name))
        for algorithm in (erm, method):
            if zero:  # then Grad-CAM is 0 everywhere
                torch.nn.init.zeros_(algorithm.classifier.weight)
            values = algorithm.update(step_data(mask=mask))
        assert values["attention_loss"] == values["comparable_maps"] == 0
        for a, b in zip(weights(method), weights(erm), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("mask", [0.0, 1e-6, 0.5, 1.0])
def test_masks_of_one_value_keep_everything_finite(name: str, mask: float) -> None:
    algorithm = plain(build(name))
    values = algorithm.update(step_data(mask=mask))
    assert np.isfinite(list(values.values())).all()
    assert abs(values["attention_loss"]) < 2
    assert all(torch.isfinite(p).all() and p.abs().max() < 100 for p in weights(algorithm))


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_is_finite_and_near_float32(name: str) -> None:
    exact, rounded = build(name), build(name)
    expected = exact.update(step_data())
    with torch.autocast("cpu", torch.bfloat16):
        values = rounded.update(step_data())
    assert values["attention_loss"] == pytest.approx(expected["attention_loss"], abs=0.05)
    assert all(torch.isfinite(p).all() for p in weights(rounded))


@pytest.mark.parametrize("name", BOTH)
def test_training_brings_the_maps_into_the_masks(name: str) -> None:
    """Labels are noise, so that only the attention loss moves the maps."""
    inside = []
    for weight in (0.0, 3.0):
        algorithm = build(name, lr=3e-3, **{f"{name.lower()}_lambda": weight})
        minibatches = step_data()
        for minibatch in minibatches:  # something to be seen where the mask is
            minibatch[0][:] += 2 * minibatch.m[:, None]
        for _ in range(25):
            values = algorithm.update(minibatches)
        inside.append(values["energy_in_mask"])
    assert inside[1] > inside[0] + 0.1


@pytest.mark.parametrize("name", BOTH)
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.lower()}_lambda -1: must not be negative"):
        build(name, **{f"{name.lower()}_lambda": -1})


def test_cross_entropy_alone_is_the_first_phases_loss() -> None:
    gradia, minibatches = build("GRADIA", gradia_warmup=1), step_data()
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    expected = F.cross_entropy(gradia.predict(x), y).item()
    assert gradia.update(minibatches)["loss"] == expected

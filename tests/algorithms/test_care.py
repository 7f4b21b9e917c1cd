"""CARE's own loss; what it shares with GRADIA is tested there."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domainbed import hparams_registry
from domainbed.algorithms import CARE
from domainbed.algorithms.base import Task
from domainbed.algorithms.care import mean_inside
from domainbed.loaders import Minibatch

SHAPE, K, TAU, WEIGHT = (3, 36, 36), 3, 0.42, 0.7


def build(**hparams: Any) -> CARE:
    settings = hparams_registry.default_hparams("CARE", "DigitsO2O") | {"care_warmup": 0} | hparams
    torch.manual_seed(0)
    return CARE.from_task(Task(SHAPE, K, num_domains=2), settings)


def step_data() -> Minibatch:
    """Noise with rectangles as masks; the last image has none."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(9, 36, 36)
    for i, (row, column) in enumerate(torch.randint(0, 20, (8, 2), generator=generator).tolist()):
        mask[i, row : row + 14, column : column + 11] = 1.0
    y = torch.randint(0, K, (9,), generator=generator)
    return Minibatch(torch.randn(9, *SHAPE, generator=generator), y, m=mask)


def slow_terms(care: CARE, x: Tensor, y: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, inner and outer mean of one image, in float64, at the size of the image.

    Each pixel of the map is repeated over the image's pixels that it stands for, so that no mask is averaged.
    """
    seen: list[Tensor] = []
    handle = care.featurizer.map_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = care.network(x[None])[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[y], seen[0], retain_graph=True)
    cam = sum(float(g.mean()) * a for g, a in zip(gradient[0], seen[0][0], strict=True))
    scaled = (cam - cam.min()) / (cam.max() - cam.min())
    block = len(mask) // len(cam)
    pixels = scaled.repeat_interleave(block, 0).repeat_interleave(block, 1)
    risk = -(logits[y].exp() / logits.exp().sum()).log()
    return risk, pixels[mask > 0].mean(), pixels[mask == 0].mean()


def test_update_equals_a_slow_loss_image_by_image_and_its_gradient() -> None:
    care, reference, minibatch = build(care_tau=TAU, care_lambda=WEIGHT), build(), step_data()
    reference.double()
    risks, terms, inner, outer = [], [], [], []
    for x, y, mask in zip(*minibatch, minibatch.m, strict=True):
        risk, inside, outside = slow_terms(reference, x.double(), int(y), mask)
        risks.append(risk)
        if mask.sum() > 0:
            terms.append(outside - (inside if inside < TAU else TAU))
            inner.append(inside.item())
            outer.append(outside.item())
    assert min(inner) < TAU < max(inner), "or one side of the bound is not tried"
    attention = sum(terms) / 8
    loss = sum(risks) / 9 + WEIGHT * attention
    expected = torch.autograd.grad(loss, list(reference.network.parameters()))

    care.optimizer = torch.optim.SGD(care.network.parameters(), lr=1.0)
    before = [p.detach().clone() for p in care.network.parameters()]
    values = care.update([minibatch])
    assert values.pop("energy_in_mask") > 0
    assert values == pytest.approx(
        {
            "loss": loss.item(),
            "attention_loss": attention.item(),
            "comparable_maps": 8 / 9,
            "map_inside": np.mean(inner),
            "map_outside": np.mean(outer),
        },
        rel=1e-4,
    )
    for old, new, gradient in zip(before, care.network.parameters(), expected, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient.float(), rtol=1e-3, atol=1e-5)


def test_the_loss_of_two_by_two_maps_by_hand() -> None:
    """Means inside .75 and .25, of which .5 at most counts; outside 1/8 and 1/2; the third image has no mask."""
    maps = torch.tensor([[[1.0, 0.5], [0.25, 0.0]], [[0.0, 0.5], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    comparable = torch.tensor([True, True, False])
    logits, y = torch.zeros(3, K), torch.zeros(3, dtype=torch.int64)
    risk, attention, values = build(care_tau=0.5, map_normalisation="minmax").guide(logits, y, maps, mask, comparable)
    assert risk.item() == pytest.approx(np.log(3), rel=1e-6)
    assert attention.item() == pytest.approx(((0.125 - 0.5) + (0.5 - 0.25)) / 2)
    assert values == {"map_inside": 0.5, "map_outside": 0.3125}


def test_a_mean_inside_that_is_enough_is_not_pushed_further() -> None:
    maps = torch.tensor([[[1.0, 0.8], [0.1, 0.0]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    logits, y = torch.zeros(1, K), torch.zeros(1, dtype=torch.int64)
    _, attention, _ = build(care_tau=0.5, map_normalisation="minmax").guide(logits, y, maps, mask, torch.tensor([True]))
    (gradient,) = torch.autograd.grad(attention, maps)
    assert gradient.tolist() == [[[0.0, 0.0], [0.5, 0.5]]]


def test_a_soft_mask_counts_in_part_and_an_empty_one_not() -> None:
    maps = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]).repeat(2, 1, 1)
    mask = torch.tensor([[[0.25, 0.75], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert mean_inside(maps, mask).tolist() == [0.25 + 0.375, 0.0]

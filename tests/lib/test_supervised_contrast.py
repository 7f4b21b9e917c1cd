"""The contrast against a loop over images and pairs, and by hand."""

import math

import pytest
import torch

from domainbed.lib.supervised_contrast import SupConLossLambda


def slow_contrast(features, y, parts, lamda=0.5):
    """Image by image and pair by pair."""
    unit = [row / sum(row**2) ** 0.5 for row in features]
    total, kept, n = 0.0, 0, len(y)
    for i in range(n):
        terms = {}
        for j in set(range(n)) - {i}:
            weight = lamda if parts[i] == parts[j] else 1 - lamda
            terms[j] = weight * torch.exp((unit[i] * unit[j]).sum() / 0.07)
        positives = [term for j, term in terms.items() if y[j] == y[i]]
        if positives:
            kept += 1
            z = sum(terms.values()) + 1e-5
            total = total - sum(torch.log(term / z + 1e-5) for term in positives) / len(positives)
    return total / (kept + 1)


@pytest.mark.parametrize("lamda", [0.5, 0.2])
def test_contrast_is_the_slow_one(lamda):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y, parts = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2]), torch.tensor([0, 0, 1, 1, 0, 1, 2, 2])  # 2: alone in its class
    expected = slow_contrast(features, y.tolist(), parts.tolist(), lamda)
    assert SupConLossLambda(lamda)(features, y, parts).item() == pytest.approx(expected.item(), rel=1e-10)


def test_contrast_by_hand():
    """Two equal images of a class: each log share is log(e / (e + 1e-5) + 1e-5), and the sum is divided by 3."""
    features, zero = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    term = 0.5 * math.exp(1 / 0.07)
    expected = -2 * math.log(term / (term + 1e-5) + 1e-5) / 3
    assert SupConLossLambda()(features, zero, zero).item() == pytest.approx(expected)


def test_contrast_is_not_rounded_under_autocast():
    features = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    y, parts = torch.arange(12) % 2, torch.arange(12) % 3
    expected = SupConLossLambda()(features, y, parts).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert SupConLossLambda()(features, y, parts).item() == pytest.approx(expected, rel=1e-6)


def test_nothing_to_contrast_is_zero():
    """DomainBed returns a number that can't be differentiated."""
    features = torch.ones(3, 2, requires_grad=True)
    loss = SupConLossLambda()(features, torch.arange(3), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert not features.grad.any()

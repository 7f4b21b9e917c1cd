"""Densities and quantiles against scipy, a gradient through a written-out bisection, and cases by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq

from domainbed.lib.distributions import (
    Distribution1D,
    GaussianKernel,
    KernelDensityEstimator,
    Nonparametric,
    Normal,
    continuous_bisect_fun_left,
    estimate_bandwidth,
)


def sample(n, seed=None):
    generator = torch.Generator().manual_seed(n if seed is None else seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


def quantile(values, q, **settings):
    distribution = Nonparametric(**settings)
    distribution.estimate_parameters(values)
    return distribution.icdf(q)


def scipys_density(values):
    return stats.gaussian_kde(values.numpy(), bw_method=1.06 * len(values) ** -0.2)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("n", [2, 5])
def test_quantile_is_that_of_scipys_density(q, n):
    values = sample(n)
    density = scipys_density(values)
    expected = brentq(lambda x: density.integrate_box_1d(-math.inf, x) - q, -20, 20, xtol=1e-12)
    found = quantile(values, q)
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert found.item() == pytest.approx(expected, abs=1e-8)


def test_density_and_its_integral_are_scipys():
    values, x = sample(6), torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(2, 4)
    ours, theirs = KernelDensityEstimator(values), scipys_density(values)
    np.testing.assert_allclose(ours(x).flatten(), theirs(x.flatten()), rtol=1e-10)
    expected = [theirs.integrate_box_1d(-math.inf, point) for point in x.flatten().tolist()]
    np.testing.assert_allclose(ours.cdf(x).flatten(), expected, rtol=1e-10)
    distribution = Nonparametric()
    distribution.estimate_parameters(values)
    assert torch.equal(distribution.cdf(x), ours.cdf(x))


def test_kernel_is_scipys_normal():
    x, centers = sample(4), sample(3)
    kernel, theirs = GaussianKernel(0.3), stats.norm(centers.numpy(), 0.3)
    np.testing.assert_allclose(kernel(x, centers), theirs.pdf(x.numpy()[:, None]), rtol=1e-10)
    np.testing.assert_allclose(kernel.cdf(x, centers), theirs.cdf(x.numpy()[:, None]), rtol=1e-10, atol=1e-14)


def test_bandwidths_by_hand():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 40.0])  # the quartiles are 1 and 3
    assert estimate_bandwidth(x).item() == pytest.approx(1.06 * np.std(x.numpy(), ddof=1) * 5**-0.2)
    assert estimate_bandwidth(x, "silverman").item() == pytest.approx(0.9 * (2 / 1.34) * 5**-0.2)
    assert quantile(x, 0.99, bw_select="silverman") < quantile(x, 0.99)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="method is 'silver'; take 'Gauss-optimal' or 'silverman'"):
        estimate_bandwidth(sample(3), "silver")
    with pytest.raises(ValueError, match="kernel is 'box'; take 'gaussian'"):
        KernelDensityEstimator(sample(3), "box")


def test_quantile_rises_with_its_probability():
    quantiles = [quantile(torch.tensor([0.2, 0.3, 1.0]), q).item() for q in (0.01, 0.3, 0.6, 0.9, 0.999)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] < 0.2 < 1.0 < quantiles[-1]


def test_quantile_beyond_the_floats():
    """log(1 - probability) = -800: the probability is 1 to a float."""
    width = 1.06 * math.sqrt(2) * 2**-0.2
    values = torch.tensor([1.0, 3.0])
    assert quantile(values, -800.0).item() == pytest.approx(2 + 40 * width)
    assert quantile(values, -800.0, use_kde=False).item() == 3


def test_equal_values_are_their_own_quantile():
    values = torch.full((3,), 0.7, requires_grad=True)
    found = quantile(values, 0.75)
    found.backward()
    assert found.item() == pytest.approx(0.7)
    assert values.grad.sum() == pytest.approx(1)


def test_gradient_is_that_of_the_halved_span():
    """Autograd through each step, where the comparison alone knows the density."""
    values = sample(4).requires_grad_()
    width = 1.06 * values.std() * 4**-0.2
    low, high = (end + width * stats.norm.ppf(0.8) for end in (values.min(), values.max()))
    for _ in range(50):
        middle = (low + high) / 2
        above = stats.norm(values.detach().numpy(), width.item()).cdf(middle.item()).mean() > 0.8
        low, high = (low, middle) if above else (middle, high)
    (expected,) = torch.autograd.grad(low, values)
    (found,) = torch.autograd.grad(quantile(values, 0.8), values)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_without_a_density_quantiles_are_numpys(q):
    values = sample(5)
    assert quantile(values, q, use_kde=False).item() == pytest.approx(np.quantile(values.numpy(), q))
    assert quantile(values, math.log(1 - q), use_kde=False).item() == pytest.approx(np.quantile(values.numpy(), q))


def test_without_a_density_probabilities_are_shares():
    distribution = Nonparametric(use_kde=False)
    distribution.estimate_parameters(torch.tensor([1.0, 2.0, 2.0, 5.0]))
    assert distribution.cdf(torch.tensor([0.0, 2.0, 3.0, 5.0])).tolist() == [0, 0.75, 0.75, 1]


@pytest.mark.parametrize("q", [0.01, 0.5, 0.975])
def test_normal_is_scipys(q):
    values = sample(7)
    ours, theirs = Normal(), stats.norm(values.mean(), values.std())
    assert ours.icdf(q).item() == pytest.approx(stats.norm.ppf(q))
    ours.estimate_parameters(values)
    assert ours.icdf(q).item() == pytest.approx(theirs.ppf(q))
    np.testing.assert_allclose(ours.cdf(values), theirs.cdf(values.numpy()), rtol=1e-10)
    assert Normal(1.0, 2.0).icdf(-50.0).item() == pytest.approx(21)


def test_bisection_finds_where_the_function_comes_to_the_value():
    lo, hi = torch.tensor(0.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    point = continuous_bisect_fun_left(torch.square, 2.0, lo, hi)
    point.backward()
    assert point.item() == pytest.approx(math.sqrt(2), abs=1e-8)
    assert hi.grad.item() == pytest.approx(math.sqrt(2) / 4)  # the share of the span
    assert lo.grad.item() == pytest.approx(1 - math.sqrt(2) / 4)
    assert continuous_bisect_fun_left(torch.square, 2.0, 0.0, 4.0, n_steps=1).item() == 1
    assert continuous_bisect_fun_left(torch.square, 99.0, 0.0, 4.0).item() == pytest.approx(4)


def test_one_subclass_needs_two_methods():
    class Greatest(Distribution1D):
        def estimate_parameters(self, x):
            self.greatest = x.max()

        def icdf(self, q):
            return self.greatest

    distribution = Greatest()
    distribution.estimate_parameters(torch.tensor([1.0, 3.0]))
    assert distribution.icdf(0.5) == 3

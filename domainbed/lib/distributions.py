"""Distributions of few values on the line, and their quantiles, through which gradients reach the values."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


def _reach(q: Tensor) -> Tensor:
    """The standard normal quantile of q in (0, 1); of q < 0, which is log(1 - probability), its bound sqrt(-2 q)."""
    return (-2 * q).sqrt() if q < 0 else torch.special.ndtri(q)


def _double(q: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(q, dtype=torch.float64, device=like.device)


class Kernel(ABC):
    """A density that is put around each of some centres.

    Args:
        bw: its width, above 0.
    """

    def __init__(self, bw: Tensor | float):
        self.bw = bw

    @abstractmethod
    def __call__(self, x: Tensor, centers: Tensor) -> Tensor:
        """The densities at x (N,) around centers (n,): (N, n)."""

    @abstractmethod
    def cdf(self, x: Tensor, centers: Tensor) -> Tensor:
        """How much of each density lies below x (N,): (N, n) in [0, 1]."""


class GaussianKernel(Kernel):
    """The normal density with standard deviation ``bw``."""

    def __call__(self, x: Tensor, centers: Tensor) -> Tensor:
        z = (x[..., None] - centers) / self.bw
        return torch.exp(-z.square() / 2) / (self.bw * (2 * torch.pi) ** 0.5)

    def cdf(self, x: Tensor, centers: Tensor) -> Tensor:
        return torch.special.ndtr((x[..., None] - centers) / self.bw)


def estimate_bandwidth(x: Tensor, method: str = "Gauss-optimal") -> Tensor:
    """The width of Gaussian kernels for values x (n,), n >= 2; 0-d.

    ``1.06 * std * n ** -0.2`` is the best one for normal values; "silverman", with
    ``0.9 * min(std, interquartile range / 1.34)``, is narrower and heeds outliers less.

    Source: Bernard W. Silverman, Density Estimation for Statistics and Data Analysis, 1986, section 3.4.2.

    Raises:
        ValueError: an unknown method.
    """
    spread, shrink = x.std(), len(x) ** -0.2
    if method == "Gauss-optimal":
        return 1.06 * spread * shrink
    if method == "silverman":
        return 0.9 * torch.minimum(spread, (x.quantile(0.75) - x.quantile(0.25)) / 1.34) * shrink
    raise ValueError(f"bandwidth method is {method!r}; take 'Gauss-optimal' or 'silverman'")


class KernelDensityEstimator:
    """The mean of the kernels around given values: ``density(x) = mean_i kernel(x, value_i)``.

    Args:
        train_Xs: the values (n,), n >= 2.
        kernel: only "gaussian".
        bw_select: how its width is chosen; see ``estimate_bandwidth``.

    Raises:
        ValueError: an unknown kernel.
    """

    def __init__(self, train_Xs: Tensor, kernel: str = "gaussian", bw_select: str = "Gauss-optimal"):
        if kernel != "gaussian":
            raise ValueError(f"kernel is {kernel!r}; take 'gaussian'")
        self.train_Xs = train_Xs
        self.bw = estimate_bandwidth(train_Xs, bw_select)
        self.kernel = GaussianKernel(self.bw)

    def __call__(self, x: Tensor) -> Tensor:
        """The density at x (any shape)."""
        return self.kernel(x, self.train_Xs).mean(-1)

    def cdf(self, x: Tensor) -> Tensor:
        """The probability of a value below x (any shape)."""
        return self.kernel.cdf(x, self.train_Xs).mean(-1)


def continuous_bisect_fun_left(
    f: Callable[[Tensor], Tensor], v: Tensor | float, lo: Tensor | float, hi: Tensor | float, n_steps: int = 32
) -> Tensor:
    """The point between lo and hi at which the rising function f comes to v, by halving the span n_steps times.

    The gradient is that of the point which divides the span in the same ratio, so it reaches lo and hi; not f nor v.

    Returns:
        0-d float64, for 0-d lo and hi.
    """
    share = torch.tensor(0.5, dtype=torch.float64)  # how far from lo to hi
    with torch.no_grad():
        for halving in range(n_steps):
            above = f(lo + share * (hi - lo)) > v
            share = share + torch.where(above, -1.0, 1.0) * 0.5 ** (halving + 2)
    return (1 - share) * lo + share * hi


class Distribution1D(ABC):
    """A distribution that is fitted to values and has quantiles; the base of those that EQRM takes as ``dist``."""

    @abstractmethod
    def estimate_parameters(self, x: Tensor) -> None:
        """Fits the values x (n,), n >= 2."""

    @abstractmethod
    def icdf(self, q: Tensor | float) -> Tensor:
        """The quantile of one probability, 0-d float64, with a gradient to the values.

        Args:
            q: in (0, 1); or log(1 - probability) < 0 for one so near to 1 that floats don't tell it from 1: then the
                result is ``mean + width * sqrt(-2 q)``, from the bound ``exp(-z ** 2 / 2)`` on a normal tail.
        """


class Normal(Distribution1D):
    """The normal distribution.

    Args:
        location: its mean.
        scale: its standard deviation; estimated, the root of the variance that is divided by n - 1.
    """

    def __init__(self, location: Tensor | float = 0.0, scale: Tensor | float = 1.0):
        self.loc, self.scale = torch.as_tensor(location), torch.as_tensor(scale)

    def estimate_parameters(self, x: Tensor) -> None:
        self.loc, self.scale = x.mean(), x.std()

    def cdf(self, x: Tensor) -> Tensor:
        """The probability of a value below x (any shape)."""
        return torch.special.ndtr((x - self.loc) / self.scale)

    def icdf(self, q: Tensor | float) -> Tensor:
        return self.loc + self.scale * _reach(_double(q, self.loc))


class Nonparametric(Distribution1D):
    """A kernel density of the values, or with ``use_kde=False`` the values themselves.

    The density's quantile is sought between those of the least and the greatest value's kernels; its gradient is that
    of ``continuous_bisect_fun_left``, not the quantile's own derivative. Without a density the quantile is
    interpolated between neighbouring values.

    Source: Cian Eastwood et al., Probable Domain Generalization via Quantile Risk Minimization, NeurIPS 2022,
        https://arxiv.org/abs/2207.09944, section 4.
    Differs: as DomainBed, in the gradient. Equal values are their own quantile, where DomainBed fails. Without a
        density, q < 0 is a probability too.

    Args:
        use_kde: whether there is a density.
        bw_select: how its width is chosen; see ``estimate_bandwidth``.

    Attributes:
        data: what was fitted, (n,) float64.
        bw: the width.
    """

    data: Tensor
    bw: Tensor

    def __init__(self, use_kde: bool = True, bw_select: str = "Gauss-optimal"):
        self.use_kde, self.bw_select = use_kde, bw_select

    def estimate_parameters(self, x: Tensor) -> None:
        self.data = x.double()
        self.bw = estimate_bandwidth(self.data, self.bw_select)

    def cdf(self, x: Tensor) -> Tensor:
        """The probability of a value up to x (any shape)."""
        if self.use_kde:
            return GaussianKernel(self.bw).cdf(x, self.data).mean(-1)
        return (self.data <= x[..., None]).double().mean(-1)

    def icdf(self, q: Tensor | float) -> Tensor:
        q = _double(q, self.data)
        if not self.use_kde:
            return self.data.quantile(-torch.expm1(q) if q < 0 else q)
        reach = self.bw * _reach(q)
        if q < 0:
            return self.data.mean() + reach
        return continuous_bisect_fun_left(self.cdf, q, self.data.min() + reach, self.data.max() + reach)

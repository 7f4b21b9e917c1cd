import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from domainbed.masking import FILLS, fill, keep


@pytest.mark.parametrize(("side", "kernel"), [(224, 11), (448, 21), (96, 5), (36, 5)])
def test_blur_is_a_gaussian_in_proportion_to_the_image(side: int, kernel: int) -> None:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = np.arange(kernel) - kernel // 2
    weights = np.exp(-((offsets / (kernel * 5 / 11)) ** 2) / 2)
    weights /= weights.sum()
    expected = correlate1d(correlate1d(x.numpy(), weights, axis=2, mode="mirror"), weights, axis=3, mode="mirror")
    np.testing.assert_allclose(fill(x, "blur", torch.zeros(3)).numpy(), expected, atol=1e-6)


def test_mean_and_zero() -> None:
    x, mean = torch.randn(4, 2, 5, 6), torch.tensor([1.5, -2.0])
    assert torch.equal(fill(x, "mean", mean).expand_as(x)[3, :, 4, 5], mean)
    assert torch.equal(fill(x, "zero", mean).expand_as(x), torch.zeros_like(x))


@pytest.mark.parametrize("how", FILLS)
def test_a_mask_chooses_between_image_and_fill(how: str) -> None:
    x, mean = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    mask = torch.zeros(2, 8, 8)
    mask[0, 2, 3], mask[0, 2, 4] = 1.0, 0.25
    filled = fill(x, how, mean)
    seen, behind = keep(x, mask, filled), filled.expand_as(x)
    assert torch.equal(seen[0, :, 2, 3], x[0, :, 2, 3])
    torch.testing.assert_close(seen[0, :, 2, 4], 0.25 * x[0, :, 2, 4] + 0.75 * behind[0, :, 2, 4])
    torch.testing.assert_close(seen[1], behind[1])


def test_an_unknown_fill_is_named() -> None:
    with pytest.raises(ValueError, match="unknown fill of masked pixels: 'noise'; take one of blur, mean, zero"):
        fill(torch.zeros(1, 3, 8, 8), "noise", torch.zeros(3))

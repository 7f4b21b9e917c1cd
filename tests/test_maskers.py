import pytest
import torch

from domainbed.maskers import ConvMasker, MapMasker


@pytest.mark.parametrize("size", [(36, 36), (28, 28), (224, 224), (17, 40)])
def test_a_mask_for_each_image_at_its_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    masks = ConvMasker((3, *size))(torch.randn(2, 3, *size))
    assert masks.shape == (2, *size)
    assert (masks - 0.5).abs().max() < 0.1
    assert masks.std() > 0  # though not the same everywhere


def test_a_light_network_without_batch_statistics() -> None:
    masker = ConvMasker((3, 36, 36))
    assert 150_000 < sum(weight.numel() for weight in masker.parameters()) < 200_000
    assert not list(masker.buffers())
    x = torch.randn(4, 3, 36, 36)
    torch.testing.assert_close(masker(x)[1:2], masker(x[1:2]))


@pytest.mark.parametrize("start", [0.1, 0.5, 0.9])
def test_masks_begin_where_they_are_told(start: float) -> None:
    torch.manual_seed(0)
    assert (ConvMasker((3, 36, 36), start)(torch.randn(2, 3, 36, 36)) - start).abs().max() < 0.1
    assert (MapMasker(48, start)(torch.randn(3, 48, 9, 7)) - start).abs().max() < 0.1


def test_masks_of_maps() -> None:
    torch.manual_seed(0)
    masks = MapMasker(48)(torch.randn(3, 48, 9, 7))
    assert masks.shape == (3, 9, 7)
    assert masks.dtype == torch.float32
    assert 0 < masks.min() < masks.max() < 1

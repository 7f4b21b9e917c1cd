from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from domainbed import mask_files
from domainbed.datasets.base import ImageEnvironment, InMemoryEnvironment, MultipleDomainDataset, masks
from domainbed.images import Images

PATHS = ("birds/a.jpg", "birds/b.c.jpeg", "d.png")


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def halves(height: int, width: int, white: slice) -> np.ndarray:
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, white] = 255
    return pixels


class Photographs(MultipleDomainDataset):
    """The images 0 and 2 in the first environment, 1 in the second, at 4 x 4 pixels."""

    def __init__(self, *pools: Images):
        self.input_shape, self.num_classes = (3, 4, 4), 2
        first, last = pools[0], pools[-1]
        self.datasets = [ImageEnvironment(first, [2, 0], [0, 1]), Subset(ImageEnvironment(last, [0, 1], [0, 1]), [1])]


@pytest.fixture
def dataset(tmp_path: Path) -> Photographs:
    for path in PATHS:
        save(tmp_path / "images" / path, np.full((8, 12, 3), 90, np.uint8))
    return Photographs(Images(tmp_path / "images", PATHS, size=4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Masks of other sizes and modes than the images: left half, right half, all of the image."""
    save(tmp_path / "masks" / "birds/a.png", halves(8, 12, slice(6)))
    save(tmp_path / "masks" / "birds/b.c.png", np.repeat(halves(16, 24, slice(12, None))[..., None], 3, 2))
    save(tmp_path / "masks" / "d.png", halves(2, 2, slice(2)) > 0)
    return tmp_path / "masks"


def test_masks_lie_as_the_images_do(dataset: Photographs, folder: Path) -> None:
    assert not dataset.has_masks
    mask_files.use(dataset, folder)
    assert dataset.has_masks
    first, second = masks(dataset[0], [0, 1]), masks(dataset[1], [0])
    assert first is not None
    assert first.dtype == torch.float32
    assert torch.equal(first[0], torch.ones(4, 4))
    left = F.interpolate(
        torch.tensor(halves(8, 12, slice(6)) / 255)[None, None], (4, 4), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(first[1], left[0, 0].float(), atol=1 / 255, rtol=0)
    assert second.round().tolist() == [[[0, 0, 1, 1]] * 4]
    assert dataset[0].take([1]).masks is dataset[0].masks


def test_a_mask_may_have_the_name_of_its_image(dataset: Photographs, folder: Path) -> None:
    (folder / "birds/a.png").rename(folder / "birds/a.jpg")  # PNG in it, as PIL looks at what a file holds
    mask_files.use(dataset, folder)
    assert dataset[0].masks.paths == ("birds/a.jpg", "birds/b.c.png", "d.png")


def test_masks_beside_the_images(dataset: Photographs, folder: Path) -> None:
    images = dataset[0].images.root
    for path in PATHS[:2]:
        save(images / Path(path).with_suffix(".png"), halves(8, 12, slice(6)))
    with pytest.raises(FileNotFoundError, match=r"1 of 3 masks are missing(.|\n)*None of:\n  d.png$"):
        mask_files.use(dataset, images)  # d.png is the image


def test_pools_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    for place, white in (("north", slice(6)), ("south", slice(6, None))):
        for name in ("1", "2", "3"):
            save(tmp_path / "images" / place / f"{name}.jpg", np.full((8, 12, 3), 90, np.uint8))
            save(tmp_path / "masks" / place / f"{name}.png", halves(8, 12, white))
    pools = [Images(tmp_path / "images" / place, ("1.jpg", "2.jpg", "3.jpg"), size=4) for place in ("north", "south")]
    dataset = Photographs(*pools)
    mask_files.use(dataset, tmp_path / "masks")
    assert masks(dataset[0], [0])[0, 0].round().tolist() == [1, 1, 0, 0]
    assert masks(dataset[1], [0])[0, 0].round().tolist() == [0, 0, 1, 1]


def test_missing_masks_are_counted_and_listed(dataset: Photographs, folder: Path) -> None:
    (folder / "birds/a.png").unlink()
    (folder / "d.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 masks are missing.*\.png.*None of:\n  birds/a.jpg\n  d.png$"):
        mask_files.use(dataset, folder)
    with pytest.raises(FileNotFoundError, match=r"--mask_dir .*/nowhere: no such folder"):
        mask_files.use(dataset, folder / "nowhere")


def test_damaged_masks_are_counted_and_listed(dataset: Photographs, folder: Path) -> None:
    (folder / "birds/a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"--mask_dir .*: 1 of 3 images in .*(.|\n)*birds/a.png: not an image"):
        mask_files.use(dataset, folder)


def test_two_images_do_not_share_a_mask(tmp_path: Path, folder: Path) -> None:
    pool = Images(tmp_path / "images", ("birds/a.jpg", "birds/a.png", "d.png"), size=4)
    with pytest.raises(ValueError, match=r"birds/a.png: named twice"):
        mask_files.use(Photographs(pool), folder)


def test_label_maps_are_no_masks(dataset: Photographs, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        save(path, np.ones((8, 12), np.uint8))
    with pytest.raises(ValueError, match=r"no pixel of the masks is brighter than 1 of 255"):
        mask_files.use(dataset, folder)


def test_transforms_are_refused(dataset: Photographs, folder: Path) -> None:
    dataset[0].transform = torch.tensor
    with pytest.raises(NotImplementedError, match="transform of their own, which masks can't follow"):
        mask_files.use(dataset, folder)


class Arrays(MultipleDomainDataset):
    def __init__(self):
        self.input_shape, self.num_classes = (1, 2, 3), 2
        x, y = torch.zeros(4, 1, 2, 3), torch.zeros(4).long()
        own = InMemoryEnvironment(x, y, y, masks=torch.full((4, 2, 3), 51, dtype=torch.uint8))
        self.datasets = [own, TensorDataset(x, y), ConcatDataset([Subset(own, [0, 1]), own])]


def test_arrays_take_the_place_of_a_datasets_own_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 256, (4, 2, 3), np.uint8), rng.random((4, 2, 3)) < 0.5, rng.random((6, 2, 3)) < 0.5]
    for e, array in enumerate(given):
        np.save(tmp_path / f"env{e}.npy", array)
    dataset = Arrays()
    assert not dataset.has_masks  # the second has none
    assert masks(dataset[1], [0]) is None
    assert masks(dataset[2], [5, 0]).unique().tolist() == pytest.approx([0.2])
    mask_files.use(dataset, tmp_path)
    assert dataset.has_masks
    for environment, array in zip(dataset, given, strict=True):
        found, full = masks(environment, [3, 1]), 1 if array.dtype == bool else 255
        np.testing.assert_allclose(found.numpy(), array[[3, 1]] / full, rtol=1e-6)
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, "env1.npy: no such file"),
        (b"nothing", "env1.npy: "),
        (np.ones((4, 3, 2), bool), r"env1.npy: holds an array \(4, 3, 2\); the environment's masks are \(4, 2, 3\)"),
        (np.ones((4, 2, 3), np.float32), "env1.npy: holds float32; store masks as uint8 .* or bool"),
        (np.ones((4, 2, 3), np.uint8), "env1.npy: no pixel is brighter than 1 of 255"),
    ],
)
def test_arrays_that_are_no_masks(tmp_path: Path, array: np.ndarray | bytes | None, message: str) -> None:
    np.save(tmp_path / "env0.npy", np.ones((4, 2, 3), bool))
    np.save(tmp_path / "env2.npy", np.ones((6, 2, 3), bool))
    if isinstance(array, bytes):
        (tmp_path / "env1.npy").write_bytes(array)
    elif array is not None:
        np.save(tmp_path / "env1.npy", array)
    with pytest.raises(ValueError, match=rf"the masks of 1 of 3 environments can't be used:\n  {message}"):
        mask_files.use(Arrays(), tmp_path)


def test_few_masks_will_do_but_not_none(tmp_path: Path, dataset: Photographs, folder: Path) -> None:
    some = sorted(folder.rglob("*.png"))
    for path in some[1:]:
        save(path, np.zeros((8, 12), np.uint8))
    mask_files.use(dataset, folder)
    save(some[0], np.zeros((8, 12), np.uint8))
    with pytest.raises(ValueError, match="no pixel of the masks is brighter than 0 of 255"):
        mask_files.use(dataset, folder)
    for e, n in enumerate((4, 4, 6)):
        np.save(tmp_path / f"env{e}.npy", np.full((n, 2, 3), e == 1))
    mask_files.use(Arrays(), tmp_path)
    np.save(tmp_path / "env1.npy", np.zeros((4, 2, 3), bool))
    with pytest.raises(ValueError, match="no pixel of the masks is brighter than 0 of 255"):
        mask_files.use(Arrays(), tmp_path)

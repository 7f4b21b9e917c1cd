import colorsys
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image
from torchvision import transforms

from domainbed import augmentation
from domainbed.augmentation import COLOURS, ORDERS, Augmentation, apply_batch, apply_opencv, apply_pil, draw

SHAPES = [
    (224, 224),
    (427, 640),
    (500, 333),
    (100, 180),
    (100, 1000),
    (900, 120),
    (7, 9),
]  # the long ones hit the fallback
SAME = Augmentation(0, 0, 1, 1, False, 0, 1, 1, 1, 0, False)


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.BICUBIC)


def draws(n: int, height: int = 224, width: int = 224, crop: bool = True) -> list[Augmentation]:
    rng = np.random.default_rng(0)
    return [draw(rng, height, width, crop) for _ in range(n)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    torch.manual_seed(0)
    image, ratio = Image.new("RGB", (width, height)), [3 / 4, 4 / 3]
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, [0.7, 1], ratio) for _ in range(1500)])
    ours = np.array([change[:4] for change in draws(1500, height, width)]) * [height, width, height, width]
    np.testing.assert_allclose(ours, ours.round(), atol=1e-9)  # whole pixels of the original
    ours = ours.round()
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_colours_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.3, 0.3, 0.3, 0.3)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [jitter.get_params(*ranges) for _ in range(3000)]
    ours = draws(3000)
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert stats.ks_2samp([getattr(c, name) for c in ours], [t[1 + k] for t in theirs]).pvalue > 1e-3
    assert stats.chisquare(np.bincount([change.order for change in ours], minlength=24)).pvalue > 1e-3
    assert stats.binomtest(sum(change.flip for change in ours), 3000, 0.5).pvalue > 1e-3
    assert stats.binomtest(sum(change.grey for change in ours), 3000, 0.1).pvalue > 1e-3


def test_the_numbers_are_drawn_independently() -> None:
    correlations = np.corrcoef(np.array(draws(3000))[:, 4:].T)
    assert abs(correlations - np.eye(7)).max() < 0.08


def test_without_a_crop_the_box_is_the_image() -> None:
    assert {change[:4] for change in draws(20, 30, 40, crop=False)} == {(0, 0, 1, 1)}


def test_equal_generators_draw_equal_numbers() -> None:
    assert draws(5) == draws(5)


def test_all_24_orders_are_there() -> None:
    assert len(set(ORDERS)) == 24


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pil_equals_torchvisions_transform_pixel_for_pixel(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(height, width)
    for change in draws(12, height, width):
        box = [round(edge * side) for edge, side in zip(change[:4], (height, width) * 2, strict=True)]
        colours = ([COLOURS.index(colour) for colour in ORDERS[change.order]], *change[6:10])
        monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", lambda *_, box=box: box)
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *_, colours=colours: colours)
        theirs = transforms.Compose([
            transforms.RandomResizedCrop(64, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(float(change.flip)),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(float(change.grey)),
        ])  # fmt: skip
        np.testing.assert_array_equal(np.asarray(apply_pil(image, change, 64)), np.asarray(theirs(image)))


def planes(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def apply_batch_of_one(pixels: np.ndarray, change: Augmentation) -> np.ndarray:
    return apply_batch(torch.from_numpy(planes(pixels))[None], torch.tensor([change], dtype=torch.float32))[0].numpy()


def adjust_opencv(pixels: np.ndarray, colour: str, amount: float) -> np.ndarray:
    return augmentation._adjust_opencv(pixels, colour, amount)


def adjust_batch_of_one(pixels: np.ndarray, colour: str, amount: float) -> np.ndarray:
    x = torch.from_numpy(planes(pixels))[None].float()
    adjusted = augmentation._adjust_batch(x, colour, torch.full((1, 1, 1, 1), amount))
    return adjusted[0].numpy().transpose(1, 2, 0)


APPLIERS = pytest.mark.parametrize("applier", [apply_opencv, apply_batch_of_one])
ADJUSTERS = pytest.mark.parametrize("adjuster", [adjust_opencv, adjust_batch_of_one])
Applier = Callable[[np.ndarray, Augmentation], np.ndarray]
Adjuster = Callable[[np.ndarray, str, float], np.ndarray]


@ADJUSTERS
@pytest.mark.parametrize("colour", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1, 1.3])
def test_blends_are_pils_to_a_level(adjuster: Adjuster, colour: str, factor: float) -> None:
    image = photograph(96, 96)
    reference = getattr(transforms.functional, f"adjust_{colour}")(image, factor)
    apart = adjuster(np.asarray(image), colour, factor) - np.asarray(reference).astype(float)
    assert abs(apart).max() <= 1
    assert abs(apart).mean() < 0.02


@ADJUSTERS
@pytest.mark.parametrize("shift", [-0.3, -0.11, 0.0, 0.2, 0.3])
def test_hues_turn_as_pils_and_as_the_standard_librarys(adjuster: Adjuster, shift: float) -> None:
    image = photograph(40, 40)
    pixels = np.asarray(image)
    adjusted = adjuster(pixels, "hue", shift).astype(float)
    turned = []
    for red, green, blue in pixels.reshape(-1, 3) / 255.0:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        turned.append(colorsys.hsv_to_rgb((hue + int(shift * 255) / 255) % 1, saturation, value))
    references = (255 * np.array(turned).reshape(40, 40, 3), np.asarray(transforms.functional.adjust_hue(image, shift)))
    for reference, mean in zip(references, (0.5, 0.6), strict=True):
        apart = adjusted - reference
        assert abs(apart).max() <= 8
        assert abs(apart).mean() < mean


@APPLIERS
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0.11, 0.07, 0.83, 0.9), (10 / 64, 0, 50 / 64, 60 / 64), (0, 0, 1, 1)])
def test_boxes_are_read_at_the_right_points(applier: Applier, flip: bool, box: tuple[float, ...]) -> None:
    # Against scipy's interpolation at the points where the written pixels' centres lie. Greys keep hue out of it.
    pixels = np.repeat(np.asarray(photograph(64, 64).convert("L"))[..., None], 3, axis=2)
    top, left, height, width = (64 * edge for edge in box)
    centres = (np.arange(64) + 0.5) / 64
    rows, columns = top + height * centres - 0.5, left + width * (1 - centres if flip else centres) - 0.5
    points = np.meshgrid(rows, columns, indexing="ij")
    expected = ndimage.map_coordinates(pixels[..., 0].astype(float), points, order=1, mode="nearest")
    changed = applier(pixels, SAME._replace(top=box[0], left=box[1], height=box[2], width=box[3], flip=flip))
    inner = np.s_[2:-2, 2:-2]  # at its edges a resized box repeats its own pixels, where others read what lies outside
    assert abs(changed[0][inner] - expected[inner]).max() <= 3.5  # OpenCV 4 rounds the points to 1/32 pixel
    assert abs(changed[0] - expected).mean() < 0.6


@APPLIERS
def test_grey_is_pils_and_has_three_channels(applier: Applier) -> None:
    image = photograph(50, 50)
    grey, colour = (applier(np.asarray(image), SAME._replace(grey=grey)) for grey in (True, False))
    reference = np.asarray(apply_pil(image, SAME._replace(grey=True), 50)).transpose(2, 0, 1).astype(float)
    assert (grey == grey[:1]).all()
    assert not (colour == colour[:1]).all()
    assert abs(grey - reference).max() <= 4  # the way to HSV and back costs levels though it shifts nothing


@APPLIERS
@pytest.mark.parametrize("order", range(24))
def test_the_colours_change_in_the_drawn_order(applier: Applier, order: int) -> None:
    image = photograph(48, 48)
    change = SAME._replace(order=order, brightness=1.3, contrast=0.7, saturation=1.3, hue=0.25)
    ours = applier(np.asarray(image), change).transpose(1, 2, 0)
    apart = [abs(ours - np.asarray(apply_pil(image, change._replace(order=k), 48)).astype(float)) for k in range(24)]
    assert apart[order].mean() < 1
    assert apart[order].mean() <= min(a.mean() for a in apart) + 0.05  # some orders commute


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    pixels = torch.from_numpy(planes(np.asarray(photograph(40, 40)))).expand(20, -1, -1, -1)
    changes = torch.tensor(draws(20), dtype=torch.float32)
    together, alone = apply_batch(pixels, changes), [apply_batch(pixels[:1], change[None]) for change in changes]
    assert together.shape == (20, 3, 40, 40)
    torch.testing.assert_close(together, torch.cat(alone), atol=1, rtol=0)
    assert (together != torch.cat(alone)).float().mean() < 1e-3


@APPLIERS
def test_the_pixels_that_came_are_left_alone(applier: Applier) -> None:
    pixels = np.asarray(photograph(40, 40)).copy()
    before = pixels.copy()
    for change in draws(10):
        applier(pixels, change)
    np.testing.assert_array_equal(pixels, before)


def test_missing_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    augmentation.opencv.cache_clear()
    with pytest.raises(ImportError, match=r"pip install domainbed-ex2l\[cv2\]"):
        augmentation.opencv()

"""DomainBed's random change of a training image, as numbers: drawn once, applied by PIL, by OpenCV or to a batch.

The three appliers do the same in the same order, in whole 8-bit levels: cut a box out and resize it, mirror, change
brightness, contrast, saturation and hue in the drawn order, drop the colours. So two pipelines that are given one set
of numbers differ only by how they resample and round.
"""

import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MIN_AREA = 0.7  # of the image, of a crop
LOG_RATIO = math.log(4 / 3)  # of width to height of a crop, at most
ATTEMPTS = 10  # to fit a box into the image
JITTER = 0.3  # of brightness, contrast, saturation (factors 1 +- .3) and hue (+- .3 of a turn)
GREY_SHARE = 0.1  # of the images

COLOURS = BRIGHTNESS, CONTRAST, SATURATION, HUE = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(COLOURS))
GREY = np.array([19595, 38470, 7471]) / 65536  # PIL's weights of red, green and blue; they sum to 1
TRUNCATE = -0.499  # PIL cuts fractions off where OpenCV rounds


class Augmentation(NamedTuple):
    """One drawn change of an image.

    Attributes:
        top, left, height, width: the box that is cut out, as fractions of the image's height and width.
        flip: whether the box is mirrored.
        order: which of the 24 ``ORDERS`` the four changes of colour take.
        brightness, contrast, saturation: factors.
        hue: shift, in turns.
        grey: whether the colours are dropped.
    """

    top: float
    left: float
    height: float
    width: float
    flip: bool
    order: int
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool


def draw(rng: np.random.Generator, height: int, width: int, crop: bool) -> Augmentation:
    """Draws the change of one training image of height x width pixels, without a crop if not wanted.

    Distributions: DomainBed's train transform, which is torchvision's RandomResizedCrop(scale=(.7, 1)),
    RandomHorizontalFlip, ColorJitter(.3, .3, .3, .3) and RandomGrayscale(.1).
    """
    top, left, box_height, box_width = _draw_box(rng, height, width) if crop else (0, 0, height, width)
    brightness, contrast, saturation, hue = rng.uniform(-JITTER, JITTER, 4).tolist()
    return Augmentation(
        top / height,
        left / width,
        box_height / height,
        box_width / width,
        flip=rng.random() < 0.5,
        order=int(rng.integers(len(ORDERS))),
        brightness=1 + brightness,
        contrast=1 + contrast,
        saturation=1 + saturation,
        hue=hue,
        grey=rng.random() < GREY_SHARE,
    )


def _draw_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box that fits into the image; after ten misses the largest central one."""
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(MIN_AREA, 1)
        ratio = math.exp(rng.uniform(-LOG_RATIO, LOG_RATIO))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def apply_pil(image: Image.Image, change: Augmentation, size: int) -> Image.Image:
    """The changed image, size x size, by the functions that torchvision's transforms call on PIL images.

    Args:
        image: RGB, of any size.
        change: its box is rounded to whole pixels, which is exact if it was drawn for this height and width.
    """
    from torchvision.transforms import functional as transforms

    image = cut_pil(image, change, size)
    for colour in ORDERS[change.order]:
        image = getattr(transforms, f"adjust_{colour}")(image, getattr(change, colour))
    return transforms.rgb_to_grayscale(image, num_output_channels=3) if change.grey else image


def cut_pil(image: Image.Image, change: Augmentation, size: int) -> Image.Image:
    """The change's box, resized to size x size and mirrored, but in its old colours: what masks share with images."""
    from torchvision.transforms import functional as transforms

    width, height = image.size
    box = (change.top * height, change.left * width, change.height * height, change.width * width)
    image = transforms.resized_crop(image, *map(round, box), [size, size])
    return transforms.hflip(image) if change.flip else image


@functools.cache
def opencv() -> Any:
    """OpenCV, told to start no threads: they would not survive the forks of a loader, and the loader has its own.

    Raises:
        ImportError: OpenCV is not installed.
    """
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise ImportError("OpenCV is missing: pip install domainbed-ex2l[cv2], or take --input_pipeline pil") from error
    cv2.setNumThreads(0)
    return cv2


def apply_opencv(pixels: NDArray[np.uint8], change: Augmentation) -> NDArray[np.uint8]:
    """The changed image (3, S, S) of pixels (S, S, 3), both uint8 RGB."""
    cv2 = opencv()
    pixels = _cut_opencv(pixels, change)
    for colour in ORDERS[change.order]:
        pixels = _adjust_opencv(pixels, colour, getattr(change, colour))
    planes = np.empty((3, *pixels.shape[:2]), np.uint8)
    if change.grey:
        planes[:] = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    else:
        cv2.split(pixels, list(planes))  # four times as quick as a transposed copy
    return planes


def _cut_opencv(pixels: NDArray[np.uint8], change: Augmentation) -> NDArray[np.uint8]:
    """The box, resized to the size of the pixels and mirrored."""
    cv2, size = opencv(), len(pixels)
    edges = [fraction * size for fraction in change[:4]]
    top, left, height, width = map(round, edges)
    if max(abs(edge - round(edge)) for edge in edges) < 1e-6:  # whole pixels: thrice as quick
        box = pixels[top : top + height, left : left + width]
        box = cv2.resize(box, (size, size)) if box.shape != pixels.shape else box
        return cv2.flip(box, 1) if change.flip else box
    across, down = -change.width if change.flip else change.width, change.height  # pixels read per pixel written
    right, below = edges[1] + edges[3] if change.flip else edges[1], edges[0]  # where the first one's edge lies
    matrix = np.array([[across, 0, right + across / 2 - 0.5], [0, down, below + down / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _adjust_opencv(pixels: NDArray[np.uint8], colour: str, amount: float) -> NDArray[np.uint8]:
    """Pixels (S, S, 3) pulled towards black, their mean grey or each one's grey, or their hue turned, by an amount."""
    cv2 = opencv()
    if colour == HUE:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
        pixels[..., 0] += np.uint8(int(amount * 255) % 256)  # wraps around, as hues do
        return cv2.cvtColor(pixels, cv2.COLOR_HSV2RGB_FULL)
    if colour == BRIGHTNESS:
        return cv2.addWeighted(pixels, amount, pixels, 0, TRUNCATE)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if colour == CONTRAST:
        mean = int(cv2.mean(grey)[0] + 0.5)
        return cv2.addWeighted(pixels, amount, pixels, 0, (1 - amount) * mean + TRUNCATE)
    return cv2.addWeighted(pixels, amount, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - amount, TRUNCATE)


def apply_batch(pixels: Tensor, changes: Tensor) -> Tensor:
    """The changed images (B, 3, S, S) float32 in whole levels 0 to 255, on the device of the pixels.

    Args:
        pixels: (B, 3, S, S) uint8.
        changes: (B, 11) float32, one ``Augmentation`` a row.
    """
    columns = dict(zip(Augmentation._fields, changes.unbind(1), strict=True))
    x = _cut_batch(pixels.float(), columns)
    orders = np.array(ORDERS)[columns["order"].cpu().long().numpy()]  # (B, 4)
    for turn, colour in itertools.product(range(4), COLOURS):
        rows = torch.from_numpy(np.flatnonzero(orders[:, turn] == colour)).to(x.device)
        if len(rows):
            x[rows] = _adjust_batch(x[rows], colour, columns[colour][rows, None, None, None])
    return torch.where(columns["grey"].bool()[:, None, None, None], _grey(x), x)


def _cut_batch(x: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Each image's box, resized and mirrored; grid_sample's coordinates run from -1 to 1."""
    zero = torch.zeros_like(columns["top"])
    across = columns["width"] * (1 - 2 * columns["flip"])
    right, down = (2 * columns[edge] + columns[side] - 1 for edge, side in (("left", "width"), ("top", "height")))
    matrix = torch.stack([across, zero, right, zero, columns["height"], down], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).round_()


def _adjust_batch(x: Tensor, colour: str, amount: Tensor) -> Tensor:
    """x (B, 3, S, S) pulled towards black, its mean grey or each pixel's grey, or its hue turned, by (B, 1, 1, 1)."""
    if colour == HUE:
        return _shift_hue(x, amount)
    target = torch.zeros_like(x[:, :1]) if colour == BRIGHTNESS else _grey(x)
    if colour == CONTRAST:
        target = (target.mean((2, 3), keepdim=True) + 0.5).floor_()
    return (target + amount * (x - target)).clamp_(0, 255).floor_()


def _grey(x: Tensor) -> Tensor:
    """(B, 1, S, S): PIL's grey, exact in float32."""
    weights = x.new_tensor(GREY * 65536).view(3, 1, 1)
    return ((x * weights).sum(1, keepdim=True) + 32768).div_(65536).floor_()


def _shift_hue(x: Tensor, hue: Tensor) -> Tensor:
    """Turns the colours of x (B, 3, S, S) by hue (B, 1, 1, 1), in PIL's steps of 1/255 of a turn."""
    red, green, blue = x.split(1, dim=1)
    value, spread = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    over = spread.clamp(min=1)  # without spread there is no hue to turn
    sextant = torch.where(
        value == red,
        (green - blue) / over,
        torch.where(value == green, 2 + (blue - red) / over, 4 + (red - green) / over),
    )
    sextant = sextant + 6 * (hue * 255).trunc() / 255
    k = (x.new_tensor([5, 3, 1]).view(3, 1, 1) + sextant) % 6
    return (value - spread * torch.minimum(k, 4 - k).clamp_(0, 1)).round_()

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from domainbed import augmentation, input_pipelines
from domainbed.augmentation import apply_pil, draw
from domainbed.images import Images
from domainbed.input_pipelines import REGISTRY, Pipeline

NAMES = ("pil", "cv2", "device")
NORMALISE = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
PHOTOGRAPHS = {
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "brick": skimage.data.brick,
    "grass": skimage.data.grass,
    "gravel": skimage.data.gravel,
}


def save(root: Path, name: str, size: tuple[int, int] | None, mode: str = "RGB") -> str:
    image = Image.fromarray(PHOTOGRAPHS[name.partition("_")[0]]()).convert(mode)
    if size is not None:
        image = image.resize(size, Image.Resampling.BICUBIC)
    image.save(root / f"{name}.png")
    return f"{name}.png"


@pytest.fixture
def odd(tmp_path: Path) -> Images:
    """Images of many kinds, for a network of 48 x 48 pixels."""
    kinds = [((60, 90), "RGB"), ((90, 60), "L"), ((70, 70), "RGBA"), ((120, 24), "P"), ((48, 48), "RGB")]
    paths = [save(tmp_path, f"china_{k}", *kind) for k, kind in enumerate(kinds)]
    return Images(tmp_path, tuple(paths), 48)


def pipelines(images: Images) -> dict[str, Pipeline]:
    made = {name: REGISTRY[name](images) for name in REGISTRY}
    for pipeline in made.values():
        pipeline.prepare()
    return made


def finished(pipeline: Pipeline, positions: list[int], seed: int | None) -> torch.Tensor:
    read = [
        pipeline.read(p, None if seed is None else np.random.default_rng([seed, k])) for k, p in enumerate(positions)
    ]
    return pipeline.finish(default_collate(read))


def test_the_names_and_the_default() -> None:
    assert tuple(REGISTRY) == NAMES
    assert input_pipelines.DEFAULT == "pil"
    with pytest.raises(NotImplementedError, match=r"input pipeline not found: PIL.* known: pil, cv2, device"):
        REGISTRY["PIL"]


@pytest.mark.parametrize("crop", ["original", "resized", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_without_augmentation_all_equal_torchvision_bit_for_bit(name: str, crop: str, odd: Images) -> None:
    images = Images(odd.root, odd.paths, odd.size, crop)
    reference = transforms.Compose([transforms.Resize((48, 48)), transforms.ToTensor(), NORMALISE])
    expected = torch.stack([reference(images.open(position)) for position in range(5)])
    x = finished(REGISTRY[name](images), list(range(5)), seed=None)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(x, expected)


def test_pil_finishes_as_torchvision_does(odd: Images) -> None:
    image, height, width = odd.open(0), 90, 60
    change = draw(np.random.default_rng([3, 0]), height, width, crop=True)
    expected = NORMALISE(transforms.ToTensor()(apply_pil(image, change, 48)))
    assert torch.equal(finished(REGISTRY["pil"](odd), [0], seed=3)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_a_function_of_the_generator(name: str, odd: Images) -> None:
    pipeline = REGISTRY[name](odd)
    first, second, other = (finished(pipeline, [0, 1, 2, 3, 4], seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first.shape == (5, 3, 48, 48)
    assert first.dtype == torch.float32


@pytest.mark.parametrize(("crop", "height", "width", "cropped"), [
    ("original", 90, 60, True), ("resized", 48, 48, True), ("none", 48, 48, False),
])  # fmt: skip
def test_all_draw_the_same_numbers_for_the_same_shape(
    crop: str, height: int, width: int, cropped: bool, odd: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        augmentation, "draw", lambda rng, *shape, crop: asked.append((*shape, crop)) or draw(rng, *shape, crop)
    )
    images = Images(odd.root, odd.paths, odd.size, crop)
    for pipeline in pipelines(images).values():
        pipeline.read(0, np.random.default_rng(0))
    assert asked == [(height, width, cropped)] * 3


def test_resized_images_are_squashed_before_they_are_cropped(odd: Images) -> None:
    images = Images(odd.root, odd.paths, odd.size, "resized")
    squashed = transforms.Resize((48, 48))(images.open(3))
    expected = apply_pil(squashed, draw(np.random.default_rng(5), 48, 48, crop=True), 48)
    pixels = REGISTRY["pil"](images).read(3, np.random.default_rng(5))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))


# Mean and 99 % quantile of the absolute differences from pil in levels, for files of 224 px and files as they are
# (china and flower 640 x 427, the others 512 x 512): squashing first and cropping then loses what is fine.
BOUNDS = {
    "china": (0.8, 6, 3.5, 30), "flower": (0.9, 7, 2.0, 20), "brick": (0.5, 3, 3.0, 20), "grass": (0.5, 3, 7.0, 35),
    "gravel": (0.5, 3, 6.0, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", ["cv2", "device"])
@pytest.mark.parametrize("photograph", list(PHOTOGRAPHS))
@pytest.mark.parametrize("size", [(224, 224), None])
def test_equal_numbers_give_nearly_equal_pixels(
    name: str, photograph: str, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    images = Images(tmp_path, (save(tmp_path, photograph, size),))
    other, reference = (finished(REGISTRY[n](images), [0] * 10, seed=7) for n in (name, "pil"))
    apart = ((other - reference) * 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).numpy()
    mean, quantile = BOUNDS[photograph][:2] if size else BOUNDS[photograph][2:]
    assert abs(apart).mean() < mean
    assert np.quantile(abs(apart), 0.99) < quantile
    assert abs(apart.mean()) < 0.4  # neither brighter nor darker


@pytest.mark.parametrize("name", ["cv2", "device"])
def test_channel_means_and_deviations_are_distributed_alike(name: str, tmp_path: Path) -> None:
    images = Images(tmp_path, (save(tmp_path, "china", (90, 60)),), 48)
    ours = finished(REGISTRY[name](images), [0] * 500, seed=1)
    reference = finished(REGISTRY["pil"](images), [0] * 500, seed=2)  # other draws
    for statistic in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3))):
        a, b = statistic(ours).numpy(), statistic(reference).numpy()
        for channel in range(3):
            assert stats.ks_2samp(a[:, channel], b[:, channel]).pvalue > 1e-3


class Items(Dataset[Any]):
    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def __len__(self) -> int:
        return len(self.pipeline.images)

    def __getitem__(self, position: int) -> Any:
        return self.pipeline.read(position, np.random.default_rng(position))


@pytest.mark.parametrize("name", NAMES)
def test_loader_processes_read_the_same(name: str, odd: Images) -> None:
    pipeline = REGISTRY[name](odd)
    pipeline.prepare()
    alone, others = (DataLoader(Items(pipeline), batch_size=2, num_workers=n) for n in (0, 2))
    for a, b in zip(alone, others, strict=True):
        assert torch.equal(pipeline.finish(a), pipeline.finish(b))


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_can_be_sent_to_a_process_that_is_not_forked(name: str, odd: Images) -> None:
    pipeline = REGISTRY[name](odd)
    pipeline.prepare()
    sent = pickle.dumps(pipeline)
    assert len(sent) < 2000  # not the pixels
    assert torch.equal(finished(pickle.loads(sent), [0, 1], seed=1), finished(pipeline, [0, 1], seed=1))


def test_cv2_without_opencv(odd: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    augmentation.opencv.cache_clear()
    with pytest.raises(ImportError, match=r"domainbed-ex2l\[cv2\]"):
        REGISTRY["cv2"](odd)
    REGISTRY["device"](odd).read(0, np.random.default_rng(0))  # which needs none


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_device_gives_the_same_on_a_gpu(odd: Images) -> None:
    pipeline = REGISTRY["device"](odd)
    pixels, changes = default_collate([pipeline.read(k % 5, np.random.default_rng(k)) for k in range(24)])
    there = pipeline.finish([pixels.cuda(), changes.cuda()])
    assert there.is_cuda
    levels = (there.cpu() - pipeline.finish([pixels, changes])).abs() * 58  # 255 x the deviations
    assert levels.mean() < 0.05

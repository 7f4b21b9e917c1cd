"""Input pipelines, their speed and how alike they are, side by side: ``python benchmarks/input_pipelines.py``.

Prints a Markdown table for each question; the images are JPEGs cut from the colour photographs that scikit-learn and
scikit-image carry.

images   images per second on one core, from file to normalised batch, against torchvision's transforms called image by
         image as DomainBed does; the contestants take turns, batch by batch. "first pass" includes decoding the cache.
step     the share of a ResNet-18 training step (32 images, 224 px, two threads) that waits for images.
pixels   how far the pipelines are from pil for equal draws, in 8-bit levels.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import models, transforms

from domainbed import image_cache
from domainbed.images import CACHE_VARIABLE, Images, cache_directory
from domainbed.input_pipelines import MEAN, REGISTRY, STD, Pipeline

BATCH = 32
SIDES = (224, 350, 500)  # of the files' images
COLOURFUL = {
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
}
TEXTURES = {"brick": skimage.data.brick, "grass": skimage.data.grass, "gravel": skimage.data.gravel}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def write(root: Path, side: int, count: int) -> Images:
    """JPEGs of side x side pixels, each another part of a photograph."""
    rng, photographs = np.random.default_rng(side), [Image.fromarray(make()) for make in COLOURFUL.values()]
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        cut = int(min(photograph.size) * rng.uniform(0.7, 1))
        left, top = (int(rng.integers(edge - cut + 1)) for edge in photograph.size)
        part = photograph.crop((left, top, left + cut, top + cut))
        part.resize((side, side), Image.Resampling.BICUBIC).save(root / f"{n}.jpg", quality=90)
    return Images(root, tuple(f"{n}.jpg" for n in range(count)))


class Torchvision(Pipeline):
    """What DomainBed does: transforms image by image, up to the normalised float tensor."""

    transform = transforms.Compose([
        transforms.RandomResizedCrop(224, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip

    def read(self, position: int, rng: np.random.Generator | None) -> torch.Tensor:
        return self.transform(self.images.open(position))

    def finish(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


CONTESTANTS: dict[str, Callable[[Images], Pipeline]] = {"torchvision": Torchvision, **dict(REGISTRY.items())}


def generator(n: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 0, n]))


def load(pipeline: Pipeline, positions: Sequence[int], turn: int) -> float:
    """Seconds for a batch."""
    start = time.perf_counter()
    pipeline.finish(default_collate([pipeline.read(p, generator(turn * BATCH + p)) for p in positions]))
    return time.perf_counter() - start


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Binds the process to one core, and torch to one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def forget_caches() -> None:
    for path in cache_directory().rglob(f"*{image_cache.SUFFIX}"):
        path.unlink()


def images_per_second(repeats: int, count: int) -> str:
    """Each size of file: batches in turn; then first passes, building included."""
    rows = []
    for side in SIDES:
        with tempfile.TemporaryDirectory() as directory:
            images = write(Path(directory), side, count)
            pipelines = {name: make(images) for name, make in CONTESTANTS.items()}
            for pipeline in pipelines.values():
                pipeline.prepare()
                load(pipeline, range(BATCH), 0)  # warms up
            times: dict[str, list[float]] = {name: [] for name in pipelines}
            for turn in range(repeats):
                positions = [(turn * BATCH + k) % count for k in range(BATCH)]
                for name, pipeline in pipelines.items():
                    times[name].append(load(pipeline, positions, turn))
            for name in pipelines:
                ratios = [a / b for a, b in zip(times["torchvision"], times[name], strict=True)]
                per_s = BATCH / statistics.median(times[name])
                rows.append([side, name, per_s, statistics.median(ratios), f"{min(ratios):.1f} to {max(ratios):.1f}"])
            rows.append(first_pass(images, side, BATCH / statistics.median(times["torchvision"])))
    return table(["files, px", "pipeline", "images/s", "ratio to torchvision", "min to max"], rows)


def first_pass(images: Images, side: int, reference: float) -> list[object]:
    """All images once with cv2 and no cache yet, three times."""
    speeds = []
    for turn in range(3):
        forget_caches()
        start = time.perf_counter()
        pipeline = CONTESTANTS["cv2"](images)
        pipeline.prepare()
        for first in range(0, len(images), BATCH):
            load(pipeline, range(first, min(first + BATCH, len(images))), turn)
        speeds.append(len(images) / (time.perf_counter() - start))
    ratios = [speed / reference for speed in speeds]
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    return [side, "cv2, first pass", statistics.median(speeds), statistics.median(ratios), spread]


class Items(Dataset[Any]):
    """The images of a pipeline over and over."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, n: int) -> Any:
        return self.pipeline.read(n % len(self.pipeline.images), generator(n))


def waiting(repeats: int, steps: int) -> str:
    """Blocks of steps in turn; in each the first step, which starts the workers, is left out.

    Times are lower quartiles: what other processes on the machine do adds to them, and to waiting most of all.
    """
    variants = [("torchvision", 0), ("pil", 0), ("pil", 2), ("cv2", 0)]
    spent: dict[tuple[str, int], list[tuple[float, float]]] = {variant: [] for variant in variants}  # waited, all
    torch.manual_seed(0)
    network = models.resnet18(num_classes=10)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory() as directory:
        images = write(Path(directory), 224, 64)
        for _, (name, workers) in itertools.product(range(repeats), variants):
            pipeline = CONTESTANTS[name](images)
            pipeline.prepare()
            batches = iter(DataLoader(Items(pipeline), BATCH, num_workers=workers))
            for step in range(steps + 1):
                start = time.perf_counter()
                x = pipeline.finish(next(batches))
                waited = time.perf_counter() - start
                loss = torch.nn.functional.cross_entropy(network(x), torch.arange(BATCH) % 10)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step:
                    spent[name, workers].append((waited, time.perf_counter() - start))
            del batches
    rows = []
    for (name, workers), times in spent.items():
        shares = [waited / whole for waited, whole in times]
        waited, whole = (1000 * np.quantile(column, 0.25) for column in zip(*times, strict=True))
        spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"
        rows.append([name, workers, f"{whole:.0f}", f"{waited:.0f}", f"{100 * waited / whole:.1f}", spread])
    header = ["pipeline", "loader processes", "step, ms", "of it waiting, ms", "share waiting, %", "min to max"]
    return table(header, rows)


def likeness(draws: int) -> str:
    """Absolute differences from pil, and the mean of the differences."""
    rows = []
    for side, (name, make) in itertools.product((224, None), {**COLOURFUL, **TEXTURES}.items()):
        with tempfile.TemporaryDirectory() as directory:
            image = Image.fromarray(make()).convert("RGB")
            image = image if side is None else image.resize((side, side), Image.Resampling.BICUBIC)
            image.save(Path(directory, "image.png"))
            images = Images(Path(directory), ("image.png",))
            x = {pipeline: levels(REGISTRY[pipeline](images), draws) for pipeline in REGISTRY}
        for pipeline in ("cv2", "device"):
            apart = x[pipeline] - x["pil"]
            numbers = [float(abs(apart).mean()), *np.quantile(abs(apart), (0.5, 0.99)).tolist(), abs(apart).max()]
            shape = f"{image.width} x {image.height}"
            rows.append([name, shape, pipeline, *(f"{n:.2f}" for n in numbers), f"{apart.mean():+.2f}"])
    return table(["photograph", "file, px", "pipeline", "mean", "median", "99 %", "largest", "mean with sign"], rows)


def levels(pipeline: Pipeline, draws: int) -> np.ndarray:
    """The image `draws` times augmented, in levels 0 to 255."""
    x = pipeline.finish(default_collate([pipeline.read(0, generator(n)) for n in range(draws)]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((x * std + mean) * 255).round().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="batches of each pipeline and size")
    parser.add_argument("--images", type=int, default=192, help="files of each size")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each variant of the training step")
    parser.add_argument("--steps", type=int, default=3, help="steps in a block")
    parser.add_argument("--only", nargs="+", choices=["images", "step", "pixels"], default=["images", "step", "pixels"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as cache:  # which vanishes with the files that are made here
        os.environ[CACHE_VARIABLE] = cache
        measure(args)


def measure(args: argparse.Namespace) -> None:
    if "images" in args.only:
        with one_core():
            print("\n" + images_per_second(args.repeats, args.images), flush=True)
    if "step" in args.only:
        print("\n" + waiting(args.blocks, args.steps), flush=True)
    if "pixels" in args.only:
        print("\n" + likeness(20), flush=True)


if __name__ == "__main__":
    main()

"""Predicts images with a trained run: ``python -m domainbed.scripts.predict --model runs/one --images folder``.

Writes a CSV file with a line for each image. Images are opened as the run's dataset opens those it evaluates, a batch
at a time. Those that can't be read are named and left out, and the exit status is 1 then.
"""

import argparse
import csv
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from domainbed import attribution, figures, predictors
from domainbed.explainers import Explainer
from domainbed.predictors import Predictions, Predictor
from domainbed.scripts import bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser, add_trusted

EXIT_SKIPPED = 1  # some images could not be read
SIDE = 256  # px that the shorter side of a picture has at least, so that something is seen
OPACITY = 0.6  # of the colours


def parser() -> argparse.ArgumentParser:
    """The arguments of predict."""
    p = DomainBedParser([], description=__doc__)
    add = p.add_argument
    add("--model", required=True, metavar="RUN", help="a run's output_dir, or a model*.pkl in it")
    add("--images", nargs="+", required=True, metavar="PATH", help="folders, with all below them, and files")
    add("--out", default="predictions.csv", metavar="FILE.csv", help="a line for each image")
    add("--explain", metavar="DIR", help="also write where the model looks, a PNG file for each image")
    add("--method", choices=[*attribution.METHODS, *attribution.EVALUATION_METHODS], default="grad_cam")
    add("--batch_size", type=int, default=predictors.BATCH, help="images at a time")
    add_trusted(p)
    return p


def main(argv: Sequence[str]) -> int:
    """Predicts the images, writes the CSV file and the pictures; returns the exit status."""
    args = parser().parse_args(argv)
    with bad_input():
        _check(args)
        predictor = predictors.load(args.model, trusted=args.trusted)
        files = predictors.find_files(args.images)
        explainer = predictor.explainer(args.method) if args.explain else None
        # names of files that are not UTF-8 are written as the bytes that they are
        out = open(args.out, "w", newline="", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 -- closed below
    print(_readable(str(predictor)))
    with out:
        job = Job(predictor, explainer, args, _places(args.images, files))
        job.run(files, out)
    return job.report()


def _readable(text: str) -> str:
    """The text, with what is not UTF-8 in names of files replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: give 1 or more")
    if not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {Path(args.out).parent}; make it first")
    if args.explain:
        figures.figure_class()
        os.makedirs(args.explain, exist_ok=True)


def _places(given: Sequence[str], files: Sequence[Path]) -> dict[Path, Path]:
    """Where each file lies, seen from the folder that holds all that was given."""
    folders = [os.path.abspath(path if os.path.isdir(path) else Path(path).parent) for path in given]
    common = os.path.commonpath(folders)
    return {file: Path(os.path.relpath(os.path.abspath(file), common)) for file in files}


@dataclass
class Job:
    """The predictions of many files under way.

    Attributes:
        places: of the files, below the folder of pictures.
        skipped: files that can't be read.
        hits: of each class, whether its images in folders that bear its name are predicted right.
        done: images predicted.
    """

    predictor: Predictor
    explainer: Explainer | None
    args: argparse.Namespace
    places: Mapping[Path, Path]
    skipped: list[Path] = field(default_factory=list)
    hits: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    done: int = 0

    def run(self, files: Sequence[Path], out: TextIO) -> None:
        """Predicts the files and writes what is found, batch by batch."""
        writer = csv.writer(out)
        writer.writerow(predictors.columns(self.predictor.class_names))
        for start in range(0, len(files), self.args.batch_size):
            pixels, troubles = self.predictor.input.read(files[start : start + self.args.batch_size])
            for file, trouble in troubles.items():
                print(f"skipped {file}: {trouble}", file=sys.stderr)
            self.skipped += troubles
            if pixels:
                writer.writerows(self._batch(pixels))
                out.flush()  # what is done stays, whatever comes

    def _batch(self, pixels: Mapping[Path, torch.Tensor]) -> Iterator[list[Any]]:
        batch = torch.stack(list(pixels.values()))
        found, heatmaps = self.predictor.both(self.explainer, list(map(str, pixels)), batch)
        for i, file in enumerate(pixels):
            if heatmaps is not None:
                self._draw(file, found, i, heatmaps[i])
            for name in self._folder_classes(file):
                self.hits[name].append(name == found.names[i])
        self.done += len(found)
        return found.rows()

    def _folder_classes(self, file: Path) -> list[str]:
        """The class whose name the nearest such folder bears, if one does."""
        folders = reversed(self.places[file].parent.parts)
        return [name for name in folders if name in self.predictor.class_names][:1]

    def _draw(self, file: Path, found: Predictions, i: int, heatmap: NDArray[np.float32]) -> None:
        path = Path(self.args.explain, f"{self.places[file]}.png")  # a.jpg and a.png stay two
        path.parent.mkdir(parents=True, exist_ok=True)
        name, p = found.names[i], found.probabilities[i].max()
        about, shown = PngInfo(), _readable(file.name)
        about.add_itxt("Title", f"{shown}: {name}")
        about.add_itxt(
            "Description", f"{shown} in grey, in bright colours where the model looks for {name} (p = {p:.2f})"
        )
        with Image.open(file) as picture:
            overlay(picture.convert("RGB"), heatmap).save(path, pnginfo=about)

    def report(self) -> int:
        """Prints what came of it; the exit status."""
        pictures = f", pictures to {self.args.explain}" if self.args.explain else ""
        print(_readable(f"Wrote predictions of {self.done} images to {self.args.out}{pictures}"))
        if self.hits:
            print(accuracies(self.hits))
        if not self.skipped:
            return 0
        total = self.done + len(self.skipped)
        print(f"error: {len(self.skipped)} of {total} images can't be read and were skipped (above)", file=sys.stderr)
        return EXIT_SKIPPED


def accuracies(hits: Mapping[str, Sequence[bool]]) -> str:
    """A line with the accuracy on all images whose folder names a class, and on those of each class."""
    every = [hit for some in hits.values() for hit in some]
    by_class = (f"{name} {100 * np.mean(some):.1f} % of {len(some)}" for name, some in sorted(hits.items()))
    head = f"Accuracy {100 * np.mean(every):.1f} % of {len(every)} images in folders named as classes"
    return f"{head} ({', '.join(by_class)})"


def overlay(picture: Image.Image, heatmap: NDArray[np.float32]) -> Image.Image:
    """The picture in grey under the heatmap (H, W) in [0, 1], at the picture's size or a multiple of it."""
    from matplotlib import colormaps

    times = math.ceil(SIDE / min(picture.size)) if min(picture.size) < SIDE else 1
    size = picture.width * times, picture.height * times
    values = np.asarray(Image.fromarray(heatmap).resize(size, Image.Resampling.BILINEAR))
    colours = Image.fromarray((255 * colormaps["inferno"](values)[..., :3]).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB").resize(size), colours, OPACITY)


if __name__ == "__main__":
    run_cli(main)

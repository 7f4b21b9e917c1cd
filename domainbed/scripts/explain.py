"""Measures where saved models look: ``python -m domainbed.scripts.explain --model runs/one runs/other --n 512``.

The run's dataset and splits are built again; the numbers are printed, and appended to explanations.jsonl beside the
model, where collect_results finds them. docs/explanations.md says what they mean.
"""

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed import attribution, explanation_records, figures, masking, saved_models
from domainbed.evaluation import ExplanationPlan, Explanations, explanations
from domainbed.explainers import Explainer
from domainbed.explanation_tables import run_table
from domainbed.loaders import EVALUATION_BATCH
from domainbed.rows import pseudo_confounders
from domainbed.scripts import bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser, add_trusted
from domainbed.scripts.figure_gradcam import Sketch, View, describe, picture, sketch
from domainbed.scripts.subjects import Subject, check_same_images, open_subject, wanted
from domainbed.scripts.train_building import device
from domainbed.splits import Split

PER_IMAGE = ("model", "env", "split", "index", "y", "c", "g", "predicted", "correct")


def parser() -> argparse.ArgumentParser:
    """The arguments of explain."""
    known = [*attribution.METHODS, *attribution.EVALUATION_METHODS]
    p = DomainBedParser([], description=__doc__)
    add = p.add_argument
    add("--model", nargs="+", required=True, metavar="RUN", help="a run's output_dir, or a model*.pkl in it")
    add("--n", type=int, default=512, help="images of each split, about; 0 with --picture: measure nothing")
    add("--method", choices=known, default="grad_cam", help="of attribution")
    add("--fills", nargs="+", choices=masking.FILLS, default=["blur"], help="in place of masked pixels")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--envs", type=int, nargs="+", help="default: the run's test environments")
    add("--splits", nargs="+", choices=("in", "out", "uda"), default=["in"])
    add("--per_image", metavar="FILE.csv", help="also write each image's numbers")
    add("--picture", metavar="FILE.png", help="also draw where the models look, on the first of these splits")
    add("--images", type=int, default=8, help="of the picture")
    add("--data_dir", help="default: the run's")
    add("--mask_dir", help="default: the run's")
    add("--batch_size", type=int, default=EVALUATION_BATCH, help=f"images at a time, at most {EVALUATION_BATCH}")
    add_trusted(p)
    return p


def main(argv: Sequence[str]) -> int:
    """Measures the explanations of each model, prints and writes them; draws them if asked to."""
    args = parser().parse_args(argv)
    with bad_input():
        _check(args)
        files = [saved_models.find(path) for path in args.model]
        if args.picture:
            check_same_images(files, args.trusted)
    rows: list[dict[str, Any]] = []
    sketches: list[Sketch] = []
    for file in files:
        with bad_input():
            subject, splits = _opened(file, args)
        if args.n:
            rows += measure(subject, splits, args)
        if args.picture:
            view = View(args.images, args.seed, args.method)
            sketches.append(sketch(subject, splits[0], _named(subject), view))
    with bad_input():
        if args.per_image:
            write_csv(args.per_image, rows)
        if args.picture:
            path = Path(args.picture)
            figures.save(picture(sketches, across=True), path, "Where the networks look", describe(sketches))
            print(f"Drew {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.n < 0 or (args.n == 0 and not args.picture):
        raise ValueError(f"--n {args.n}: give 1 or more images (0 is for --picture alone)")
    if args.n == 0 and args.per_image:
        raise ValueError("--per_image writes what was measured, and --n 0 measures nothing; give --n 1 or more")
    if args.picture:
        figures.figure_class()  # now, not when everything has been measured
        figures.check_file(Path(args.picture))
    for flag in ("picture", "per_image"):
        if (path := getattr(args, flag)) and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"--{flag} {path}: there is no folder {Path(path).parent}")
    if args.images < 1:
        raise ValueError(f"--images {args.images}: give 1 or more")
    if not 1 <= args.batch_size <= EVALUATION_BATCH:
        raise ValueError(f"--batch_size {args.batch_size}: give 1 to {EVALUATION_BATCH}")


def _opened(file: Path, args: argparse.Namespace) -> tuple[Subject, list[Split]]:
    """The model with its run's data, and the splits that are to be explained.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: the model, its data or its explanation can't be had.
    """
    subject = open_subject(file, {"data_dir": args.data_dir, "mask_dir": args.mask_dir}, args.trusted)
    Explainer(subject.algorithm, args.method).check(subject.dataset.input_shape)
    return subject, wanted(subject.splits, args.envs or subject.test_envs, args.splits)


def measure(subject: Subject, splits: Sequence[Split], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and records the metrics of a model; returns those of each image."""
    inferred = bool(pseudo_confounders(subject.args))
    plan = ExplanationPlan(args.n, args.seed, args.method, tuple(dict.fromkeys(args.fills)), args.batch_size, inferred)
    dataset, num_confounders = subject.dataset, subject.dataset.num_confounders
    measured = explanations(subject.algorithm, splits, num_confounders, device(), plan, dataset.N_WORKERS)
    settings = explanation_records.Settings.of(plan, subject.file.name, subject.step, args.mask_dir or "")
    num_groups = dataset.num_classes * num_confounders
    place = subject.file.parent
    with bad_input():
        line = explanation_records.write(place, subject.args, settings, plan.fills, measured, num_groups)
    print(subject.file, run_table(line), sep="", end="")
    return [row for place, found in measured.items() for row in _image_rows(subject.file, place, found)]


def _image_rows(file: Path, place: tuple[int, str], found: Explanations) -> Iterator[dict[str, Any]]:
    """A line of the CSV file for each image; what is not known is left empty."""
    for i, key in enumerate(found.subset.keys):
        y, predicted, grouped = int(found.y[i]), int(found.predicted[i]), found.subset.grouped
        known = {"c": int(found.c[i]), "g": int(found.subset.groups[i])} if grouped else {}
        row = {"model": str(file), "env": place[0], "split": place[1], "index": int(key), "y": y, **known}
        metrics = {name: float(values[i]) for name, values in found.values.items() if not math.isnan(values[i])}
        yield row | {"predicted": predicted, "correct": int(predicted == y)} | metrics


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one line for each image and model."""
    columns = dict.fromkeys([*PER_IMAGE, *(name for row in rows for name in row)])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _named(subject: Subject) -> str:
    return str(subject.args.get("label") or subject.args["algorithm"])


if __name__ == "__main__":
    run_cli(main)

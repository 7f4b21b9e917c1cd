"""Measures where saved models look: ``python -m domainbed.scripts.explain --model runs/one runs/other --n 512``.

The run's dataset and splits are built again; the numbers are printed, and appended to explanations.jsonl beside the
model, where collect_results finds them. docs/explanations.md says what they mean.
"""

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed import attribution, explanation_records, figures, masking, saved_models, subsets
from domainbed.algorithms import get_algorithm_class
from domainbed.datasets.base import confounders, masks
from domainbed.evaluation import ExplanationPlan, Explanations, explanations
from domainbed.explainers import Explainer
from domainbed.explanation_tables import run_table
from domainbed.feature_maps import evaluating
from domainbed.lib.misc import predicted_labels
from domainbed.loaders import EVALUATION_BATCH, evaluation_batches
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.scripts.train import build_data, device
from domainbed.scripts.train_arguments import completed
from domainbed.splits import Split

SAME_IMAGES = (  # arguments in which runs agree if they have the same test images
    "dataset", "trial_seed", "test_envs", "holdout_fraction", "uda_holdout_fraction", "confounders",
)  # fmt: skip
PER_IMAGE = ("model", "env", "split", "index", "y", "c", "g", "predicted", "correct")


@dataclass(frozen=True)
class Subject:
    """A saved model, and the data of its run.

    Attributes:
        file: where it was saved.
        args: arguments of the run as they were saved.
        step: after which it was saved, -1 if that is not known.
        splits: those that are to be explained.
    """

    file: Path
    args: dict[str, Any]
    step: int
    algorithm: Any
    dataset: Any
    splits: Sequence[Split]


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
    return p


def main(argv: Sequence[str]) -> int:
    """Measures the explanations of each model, prints and writes them; draws them if asked to."""
    args = parser().parse_args(argv)
    with bad_input():
        _check(args)
        files = [saved_models.find(path) for path in args.model]
        if args.picture:
            _check_same_images(files)
    rows: list[dict[str, Any]] = []
    sketches: list[Sketch] = []
    for file in files:
        with bad_input():
            subject = open_subject(file, args)
        if args.n:
            rows += measure(subject, args)
        if args.picture:
            sketches.append(sketch(subject, args))
    with bad_input():
        if args.per_image:
            write_csv(args.per_image, rows)
        if args.picture:
            draw(args.picture, sketches)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.n < 0 or (args.n == 0 and not args.picture):
        raise ValueError(f"--n {args.n}: give 1 or more images (0 is for --picture alone)")
    if args.n == 0 and args.per_image:
        raise ValueError("--per_image writes what was measured, and --n 0 measures nothing; give --n 1 or more")
    if args.picture:
        figures.figure_class()  # now, not when everything has been measured
    for flag in ("picture", "per_image"):
        if (path := getattr(args, flag)) and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"--{flag} {path}: there is no folder {Path(path).parent}")
    if args.images < 1:
        raise ValueError(f"--images {args.images}: give 1 or more")
    if not 1 <= args.batch_size <= EVALUATION_BATCH:
        raise ValueError(f"--batch_size {args.batch_size}: give 1 to {EVALUATION_BATCH}")


def _check_same_images(files: Sequence[Path]) -> None:
    """Raises ValueError if the runs have not been tested on the same images."""
    first, *others = [completed(saved_models.load(file, torch.device("cpu"))["args"]) for file in files]
    for file, other in zip(files[1:], others, strict=True):
        differing = [f"{key}: {first[key]!r} and {other[key]!r}" for key in SAME_IMAGES if first[key] != other[key]]
        if differing:
            raise ValueError(
                f"--picture compares models on the same images, but {files[0]} and {file} differ in "
                f"{'; '.join(differing)}; draw them one by one"
            )


def open_subject(file: Path, args: argparse.Namespace) -> Subject:
    """The model, with its run's dataset and splits as the run had them.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: the model, its data or its explanation can't be had.
    """
    content = saved_models.load(file, device())
    own = {key: value for key in ("data_dir", "mask_dir") if (value := getattr(args, key)) is not None}
    run_args = completed(content["args"]) | own
    dataset, splits = build_data(run_args, content["model_hparams"])
    algorithm = saved_models.restore(content, get_algorithm_class(run_args["algorithm"]), device())
    Explainer(algorithm, args.method).check(dataset.input_shape)
    envs = run_args["test_envs"] if args.envs is None else args.envs
    step = saved_models.step_of(file, content)
    return Subject(file, content["args"], step, algorithm, dataset, wanted(splits, envs, args.splits))


def wanted(splits: Sequence[Split], envs: Sequence[int], kinds: Sequence[str]) -> list[Split]:
    """The splits of these environments and kinds.

    Raises:
        ValueError: the run has none of an environment.
    """
    found = [split for split in splits if split.env in envs and split.kind in kinds]
    for env in envs:
        if env not in {split.env for split in found}:
            known = ", ".join(f"env{split.env} {split.kind}" for split in splits)
            raise ValueError(f"--envs {env} --splits {' '.join(kinds)}: this run has the splits {known}")
    return found


def measure(subject: Subject, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints and records the metrics of a model; returns those of each image."""
    plan = ExplanationPlan(args.n, args.seed, args.method, tuple(dict.fromkeys(args.fills)), args.batch_size)
    dataset, num_confounders = subject.dataset, subject.dataset.num_confounders
    measured = explanations(subject.algorithm, subject.splits, num_confounders, device(), plan, dataset.N_WORKERS)
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


@dataclass(frozen=True)
class Sketch:
    """What a picture shows of one model: the images (n, C, H, W), their titles, its rows, true masks if known."""

    file: Path
    images: torch.Tensor
    titles: Sequence[str]
    rows: Sequence[figures.MapRow]
    truth: torch.Tensor | None


def sketch(subject: Subject, args: argparse.Namespace) -> Sketch:
    """The rows of a model: its heatmaps, of both networks where it has two, and its own mask where it makes one."""
    split, dataset, explainer = subject.splits[0], subject.dataset, Explainer(subject.algorithm, args.method)
    keys = subsets.choose(split, args.images, args.seed, dataset.num_confounders).keys[: args.images]
    c = confounders(split.environment)[keys]
    batches = list(evaluation_batches(split.environment, keys, device=device()))
    x, y = (torch.cat(list(column)) for column in zip(*batches, strict=True))
    with evaluating(explainer.network):
        logits, heatmaps = explainer.heatmaps(x)
        grouped = dataset.num_confounders > 1
        pair = explainer.pair(x, y.to(device()), torch.from_numpy(c).to(device())) if grouped else None
        learned = explainer.mask(x)
    predicted = predicted_labels(logits).cpu()
    name = subject.args.get("label") or subject.args["algorithm"]
    words: dict[str, Any] = {
        "captions": [_class_name(dataset, int(k)) for k in predicted],
        "correct": (predicted == y.cpu()).numpy(),
    }
    if pair is None:
        rows = [figures.MapRow(f"{name}\n{args.method}", heatmaps.cpu().numpy(), **words)]
    else:
        rows = [figures.MapRow(f"{name}\nlabel network", pair[0].cpu().numpy(), **words)]
        rows.append(figures.MapRow(f"{name}\nconfounder network", pair[1].cpu().numpy()))
    if learned is not None:
        rows.append(figures.MapRow(f"{name}\nmask", learned.cpu().numpy(), overlaid=False))
    titles = [dataset.group_name(int(k) * dataset.num_confounders + int(v)) for k, v in zip(y, c, strict=True)]
    titles = titles if grouped else [_class_name(dataset, int(k)) for k in y]
    return Sketch(subject.file, x.cpu(), titles, rows, masks(split.environment, keys))


def _class_name(dataset: Any, label: int) -> str:
    return str(dataset.CLASSES[label]) if dataset.CLASSES else f"y={label}"


def draw(path: str, sketches: Sequence[Sketch]) -> None:
    """Writes the picture: the images, each model's rows, the true masks.

    Raises:
        BadInput: the models see other images.
    """
    first = sketches[0]
    for other in sketches[1:]:
        if other.images.shape != first.images.shape or not torch.allclose(other.images, first.images, atol=1e-4):
            raise BadInput(
                f"{first.file} and {other.file} see different images (their size, or a dataset that is drawn by each "
                "run's seed); draw them one by one"
            )
    rows = [row for some in sketches for row in some.rows]
    if first.truth is not None:
        rows.append(figures.MapRow("true mask", np.asarray(first.truth), overlaid=False))
    figures.explanation_grid(first.images.numpy(), first.titles, rows).savefig(path, dpi=150)
    print(f"Drew {path}")


if __name__ == "__main__":
    run_cli(main)

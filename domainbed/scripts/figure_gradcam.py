"""Where several runs look at the same images, one column a network: ``figure gradcam --runs runs/erm runs/ex2l``."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from domainbed import attribution, figures, subsets
from domainbed.datasets.base import Integers, confounders, masks
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.lib.misc import labels, predicted_labels
from domainbed.loaders import evaluation_batches
from domainbed.rows import pseudo_confounders
from domainbed.scripts import bad_input, subjects
from domainbed.scripts.subjects import Subject
from domainbed.scripts.train_building import device
from domainbed.splits import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sketch:
    """What a picture shows of one model.

    Attributes:
        file: the model.
        source: of which environment the images are, and what the run did with them.
        images: (n, C, H, W).
        titles: of the images.
        strips: what is drawn beside them.
        truth: the true masks, if known.
    """

    file: Path
    source: str
    images: torch.Tensor
    titles: Sequence[str]
    strips: Sequence[figures.Strip]
    truth: torch.Tensor | None


@dataclass(frozen=True)
class View:
    """Which images are shown, and how they are explained."""

    images: int = 8
    seed: int = 0
    method: str = "grad_cam"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure gradcam``."""
    subjects.add_arguments(parser)
    add = parser.add_argument
    add("--images", type=int, default=8, help="how many, spread over the groups (default: 8)")
    add("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    add("--method", choices=[*attribution.METHODS, *attribution.EVALUATION_METHODS], default="grad_cam",
        help="of attribution (default: grad_cam)")  # fmt: skip
    add("--env", type=int, help="whose images; default: the runs' first test environment")
    add("--mask_dir", help="true masks; default: the runs'")


def draw(args: argparse.Namespace) -> None:
    """Draws the figure, and prints which models it shows.

    Raises:
        BadInput: there are no such runs, or they can't be shown together.
    """
    with bad_input():
        out = subjects.output_file(args)
        files = subjects.chosen_files(args)
        subjects.check_same_images(list(files.values()), args.trusted)
        sketches = [_sketched(name, file, args) for name, file in files.items()]
        figure = picture(sketches, across=False)
        figures.save(figure, out, f"Where the networks look ({args.method})", describe(sketches))
    print(f"Drew {out}")


def _sketched(name: str, file: Path, args: argparse.Namespace) -> Sketch:
    subject = subjects.open_subject(file, {"data_dir": args.data_dir, "mask_dir": args.mask_dir}, args.trusted)
    env = subject.test_envs[0] if args.env is None else args.env
    (split,) = subjects.wanted(subject.splits, [env], ["in"])
    print(f"{name}: {subject.where}")
    return sketch(subject, split, name, View(args.images, args.seed, args.method))


def sketch(subject: Subject, split: Split, name: str, view: View) -> Sketch:
    """A model's heatmaps of what it predicts, its confounder network's of the true confounder, its own masks.

    Raises:
        NotImplementedError, ValueError: the model can't be explained (``explainers.Explainer``).
    """
    dataset, explainer = subject.dataset, Explainer(subject.algorithm, view.method)
    explainer.check(dataset.input_shape)
    keys = shown_keys(split, view.images, view.seed, dataset.num_confounders)
    c = confounders(split.environment)[keys]
    learned_c = np.full_like(c, -1) if pseudo_confounders(subject.args) else c
    batches = evaluation_batches(split.environment, keys, device=device())
    x, y = (torch.cat(list(column)) for column in zip(*batches, strict=True))
    with evaluating(explainer.network):
        logits, heatmaps = explainer.heatmaps(x)
        grouped = dataset.num_confounders > 1
        pair = explainer.pair(x, y.to(device()), torch.from_numpy(learned_c).to(device())) if grouped else None
        learned = explainer.mask(x)
    predicted = predicted_labels(logits).cpu()
    captions, correct = [class_name(dataset, int(k)) for k in predicted], (predicted == y.cpu()).numpy()
    kind = view.method if pair is None else "label network"
    strips = [figures.Strip(f"{name}\n{kind}", heatmaps.cpu().numpy(), captions=captions, correct=correct)]
    if pair is not None:
        strips.append(figures.Strip(f"{name}\nconfounder network", pair[1].cpu().numpy()))
    if learned is not None:
        strips.append(figures.Strip(f"{name}\nmask", learned.cpu().numpy(), overlaid=False))
    titles = [dataset.group_name(int(k) * dataset.num_confounders + int(v)) for k, v in zip(y, c, strict=True)]
    titles = titles if grouped else [class_name(dataset, int(k)) for k in y]
    return Sketch(subject.file, source(subject, split), x.cpu(), titles, strips, masks(split.environment, keys))


def source(subject: Subject, split: Split) -> str:
    """The environment of a split, and what the run did with its images, in words."""
    if split.env in subject.test_envs:
        use = "tested on" if split.kind == "in" else f"tested on, {split.kind}-split"
    elif split.env in subject.dataset.VALIDATION_ENVS:
        use = "validated on"
    else:
        use = "trained on" if split.kind == "in" else "held out of training"
    return f"env {split.env} ({use})"


def shown_keys(split: Split, n: int, seed: int, num_confounders: int) -> Integers:
    """Positions (n,) of n images, spread over the groups and in their order; without groups at random, by label."""
    subset = subsets.choose(split, n, seed, num_confounders)
    kinds = subset.groups if subset.grouped else labels(split.environment)[subset.keys]
    keys = subset.keys[np.argsort(kinds, kind="stable")]
    few = (
        np.linspace(0, len(keys) - 1, min(n, len(keys))).round().astype(int)
    )  # fewer images than groups: of every so many
    return keys[few]


def class_name(dataset: Any, label: int) -> str:
    return str(dataset.CLASSES[label]) if dataset.CLASSES else f"y={label}"


def picture(sketches: Sequence[Sketch], across: bool) -> "Figure":
    """The images, each model's strips, the true masks; strips are rows if ``across``, else columns.

    Raises:
        ValueError: the models see other images.
    """
    first = sketches[0]
    for other in sketches[1:]:
        if other.images.shape != first.images.shape or not torch.allclose(other.images, first.images, atol=1e-4):
            raise ValueError(
                f"{first.file} and {other.file} see different images (their size, or a dataset that is drawn by each "
                "run's seed); draw them one by one"
            )
    strips = [strip for some in sketches for strip in some.strips]
    if first.truth is not None:
        strips.append(figures.Strip("true mask", np.asarray(first.truth), overlaid=False))
    return figures.explanation_grid(first.images.numpy(), first.titles, strips, across)


def describe(sketches: Sequence[Sketch]) -> str:
    """The picture in a sentence or two, for those who can't see it."""
    strips = [(strip, strip.title.replace("\n", ", ")) for some in sketches for strip in some.strips]
    right = [f"{title} {int(strip.correct.sum())}" for strip, title in strips if strip.correct is not None]
    others = [title for strip, title in strips if strip.correct is None]
    n, groups = len(sketches[0].images), "; ".join(dict.fromkeys(sketches[0].titles))
    words = f"{n} images of {sketches[0].source}, one by one ({groups}), and where networks look."
    return f"{words} Predicted right of {n}: {', '.join(right)}." + (f" Also: {', '.join(others)}." if others else "")

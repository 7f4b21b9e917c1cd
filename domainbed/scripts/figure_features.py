"""How runs' penultimate features cluster by label, confounder and environment: ``figure features --runs runs/erm``."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domainbed import features, figures, table_formats
from domainbed.feature_scores import Floats, Score
from domainbed.features import Features
from domainbed.figures import Panel
from domainbed.scripts import bad_input, subjects
from domainbed.scripts.figure_gradcam import class_name
from domainbed.scripts.train_building import device
from domainbed.splits import validation_splits
from domainbed.table_formats import MISSING, Cell, Table

SHORT = {  # a column's header
    "silhouette label": "S label",
    "silhouette confounder": "S conf",
    "silhouette environment": "S env",
    "purity label": "kNN label",
    "purity confounder": "kNN conf",
    "purity environment": "kNN env",
    "probe label": "probe y",
    "probe confounder": "probe c",
    "probe environment": "probe e",
    "probe confounder given label": "probe c|y",
    "proxy A-distance": "A-dist",
}
NOTES = (
    "S: silhouette, -1 to 1, 0 interleaved. kNN: purity of the 10 nearest, 0 chance, 1 pure. probe: balanced accuracy "
    "of a linear classifier. A-dist: how far test images can be told from held-out training ones, 0 alike, 2 apart.",
    "label, confounder (conf): of test images; environment: of test and held-out training images. X: can't be had. "
    "label alone: what features would score that hold the label and nothing else.",
)
SECONDARY = (
    "Secondary: an embedding changes with its seed, and distances in it mean little; compare it with the table of the "
    "features before you believe it."
)


@dataclass(frozen=True)
class Shown:
    """What is shown of one run.

    Attributes:
        name: of its row.
        kind: names of its dataset and its test environments.
        plane: (n, 2), its features' embedding.
        labels, confounders, environments: the names of the values.
        scores: by name, those of the features and those of the plane (empty if it was only projected).
        baseline: the scores of the label alone.
    """

    name: str
    kind: str
    found: Features
    plane: Floats
    labels: Sequence[str]
    confounders: Sequence[str]
    environments: Sequence[str]
    scores: tuple[Mapping[str, Score], Mapping[str, Score]]
    baseline: Mapping[str, Score]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``figure features``."""
    subjects.add_arguments(parser)
    add = parser.add_argument
    n = features.IMAGES
    add("--n", type=int, default=n, help=f"about how many test images, and held-out ones (default: {n})")
    add("--seed", type=int, default=0, help="of the choice of images, the probes and UMAP (default: 0)")
    add("--no_umap", action="store_true", help="draw the two main directions (PCA), and score the features only")


def draw(args: argparse.Namespace) -> None:
    """Draws the figure, prints its scores and writes them beside it.

    Raises:
        BadInput: there are no such runs, they are tested on different images, or they have no such features.
    """
    with bad_input():
        out = subjects.output_file(args)
        if not args.no_umap:
            features.require_umap()
        files = subjects.chosen_files(args)
        subjects.check_same_images(list(files.values()), args.trusted)
        shown = [show(name, file, args) for name, file in files.items()]
        method = "PCA" if args.no_umap else "UMAP"
        figure = picture(shown, method, args.seed)
        figures.save(figure, out, f"Penultimate features ({method})", describe(shown, method))
    tables = score_tables(shown, method, args.seed)
    comment = "domainbed.scripts.figure features"
    for format, suffix in (("text", ".txt"), ("json", ".json")):
        text = table_formats.render(tables, format, "Features", comment)
        out.with_suffix(suffix).write_text(text, encoding="utf-8")
        if format == "text":
            print(text, end="")
    print(f"Drew {out}; scores: {out.with_suffix('.txt')}, {out.with_suffix('.json')}")


def show(name: str, file: Path, args: argparse.Namespace) -> Shown:
    """A run's features, their embedding and the scores of both; prints which model they are of."""
    subject = subjects.open_subject(file, {"data_dir": args.data_dir}, args.trusted)
    dataset, test_envs, splits = subject.dataset, subject.test_envs, subject.splits
    print(f"{name}: {subject.where}")
    tested = subjects.wanted(splits, test_envs, ["in"])
    held_out = validation_splits(dataset, splits, test_envs)
    found = features.collect(
        subject.algorithm, tested, held_out, dataset.num_confounders, device(), args.n, args.seed, dataset.N_WORKERS
    )
    plane = features.project(found.x) if args.no_umap else features.embed(found.x, args.seed)
    of_plane = {} if args.no_umap else features.scores(found, plane, "euclidean", args.seed)
    return Shown(
        name,
        f"{subject.args['dataset']}, test environment {', '.join(map(str, test_envs))}",
        found,
        plane,
        [class_name(dataset, label) for label in range(dataset.num_classes)],
        list(dataset.CONFOUNDERS) or [f"c={c}" for c in range(dataset.num_confounders)],
        [str(env) for env in dataset.ENVIRONMENTS or range(len(dataset))],
        (features.scores(found, found.x, seed=args.seed), of_plane),
        features.scores(found, features.label_alone(found, args.seed), seed=args.seed),
    )


def panels(shown: Shown) -> list[Panel]:
    """By label and confounder the test images, by environment all."""
    found, test = shown.found, shown.found.tested
    here = [Panel("label (test images)", shown.plane[test], found.y[test], shown.labels)]
    if found.grouped:
        here.append(Panel("confounder (test images)", shown.plane[test], found.c[test], shown.confounders))
    tested = set(np.unique(found.e[test]).tolist())
    names = [f"{name} (test)" if e in tested else f"{name} (held out)" for e, name in enumerate(shown.environments)]
    return [*here, Panel("environment (all images)", shown.plane, found.e, names)]


def picture(shown: Sequence[Shown], method: str, seed: int) -> Any:
    """A row of panels for each run, which are of the same dataset and test environments."""
    what = f"UMAP (seed {seed})" if method == "UMAP" else "the two main directions (PCA)"
    title = f"Penultimate features of {shown[0].kind}: {what}"
    return figures.scatter_grid([(some.name, panels(some)) for some in shown], title)


def score_tables(shown: Sequence[Shown], method: str, seed: int) -> list[Table]:
    """The scores of the features, and those of their embedding where it is more than a projection."""
    tests, others = int(shown[0].found.tested.sum()), int((~shown[0].found.tested).sum())
    images = f"{tests} test images and {others} held-out ones, of each group about as many (all of a small one), seed "
    images += f"{seed}."
    kind = shown[0].kind
    found = [_table(f"Scores of the penultimate features: {kind}", [images, *NOTES], shown, 0)]
    if method == "UMAP":
        title = f"Scores of their UMAP in two dimensions (seed {seed}): {kind}"
        found.append(_table(title, [SECONDARY], shown, 1))
    return found


def _table(title: str, notes: Sequence[str], shown: Sequence[Shown], place: int) -> Table:
    lines = {some.name: some.scores[place] for some in shown}
    if place == 0:
        lines["label alone"] = shown[0].baseline
    rows: list[list[Cell | str]] = [[name, *(_cell(scores[key]) for key in SHORT)] for name, scores in lines.items()]
    chances = [shown[0].scores[place][key].chance for key in SHORT]
    chance = [Cell(MISSING if one is None else f"{one:.2f}", {"value": one}) for one in chances]
    return Table(title, notes, ["Run", *SHORT.values()], [*rows, ["chance", *chance]])


def _cell(score: Score) -> Cell:
    text = MISSING if score.value is None else f"{round(score.value, 2) + 0.0:.2f}"
    return Cell(text, {"value": score.value, "chance": score.chance})


def describe(shown: Sequence[Shown], method: str) -> str:
    """The picture in a sentence or two, for those who can't see it."""
    named = ("silhouette label", "silhouette confounder", "silhouette environment")
    runs = [f"{some.name} {', '.join(_cell(some.scores[0][name]).text for name in named)}" for some in shown]
    return (
        f"Points in the plane, a row of panels for each run: penultimate features of {shown[0].kind} by {method}, "
        "coloured by label, confounder and environment. Silhouettes of the features by these three: "
        f"{'; '.join(runs)}."
    )

"""CelebA, with two training environments composed of its official training split, and any attributes as confounder."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domainbed.datasets.base import Integers, image_size, register
from domainbed.datasets.composed import ComposedDataset, require_variation
from domainbed.datasets.wilds import read_by_wilds, release_folder
from domainbed.images import Images
from domainbed.messages import not_found
from domainbed.metadata import Problems, Table, read_csv

LABEL, SEX = "Blond_Hair", "Male"
FOLDER, ATTRIBUTES, SPLITS = "img_align_celeba", "list_attr_celeba.csv", "list_eval_partition.csv"


@register
class CelebA(ComposedDataset):
    """Is the hair of the celebrity blond? Confounder: sex, or attributes that the user names.

    Source: Liu, Luo, Wang and Tang 2015, "Deep Learning Face Attributes in the Wild",
    https://arxiv.org/abs/1411.7766; label and confounder of Sagawa, Koh, Hashimoto and Liang 2020,
    https://arxiv.org/abs/1911.08731. Environments: the eX2L paper, B.6, table 5; 45 % of the dark-haired women, 55 %
    of the dark-haired men, 35 % of the blond women and 60 % of the blond men are its environment 1, which gives its
    numbers to the last digit when all splits are counted together.
    Licence: non-commercial research.
    Layout: ``celebA_v1.0/{list_attr_celeba.csv, list_eval_partition.csv, RELEASE_v1.0.txt, img_align_celeba/*.jpg}``.

    Args:
        confounders: one or several of the attributes, whose product forms the confounder; None: Male. The
            environments stay composed by sex.

    Hparams:
        environments: "shares", "subsample" or "pooled" (leaks), see docs/environments.md.
        data_seed: of the composition.
    """

    ENVIRONMENTS = ("balanced", "less males", "validation", "test")
    CLASSES = ("not blond", "blond")
    CONFOUNDERS: Sequence[str] = ("female", "male")
    OPTIONS = ("confounders",)
    SHARES = (((0.45, 0.55), (0.35, 0.60)), ((0.55, 0.45), (0.65, 0.40)))
    PROPORTIONS = (((0.4177, 0.4694), (0.1020, 0.0108)), ((0.4679, 0.3519), (0.1736, 0.0066)))
    PUBLISHED_COUNTS: Mapping[str, Any] = {
        "train": (71629, 66874, 22880, 1387),
        "validation": (8535, 8276, 2874, 182),
        "test": (9767, 7535, 2480, 180),
    }

    def __init__(
        self,
        root: str | None,
        test_envs: Sequence[int],
        hparams: dict[str, Any],
        confounders: Sequence[str] | None = None,
    ):
        folder = release_folder(root, "celebA", "1.0", (ATTRIBUTES, SPLITS, FOLDER))
        named = tuple(confounders or (SEX,))
        table = read_csv(folder / ATTRIBUTES, ("image_id", LABEL, SEX))
        _check_confounders(named, [name for name in table.columns if name not in ("image_id", LABEL)])
        names, attributes = table.columns["image_id"], _attributes(table, folder / FOLDER, {LABEL, SEX, *named})
        splits = _splits(folder / SPLITS, names)
        ours = {"_input_array": names, "_split_array": splits, "_y_array": attributes[LABEL]}
        read_by_wilds("celebA_dataset", "CelebADataset", folder, ours)
        if named != (SEX,):
            for name in named:
                require_variation(table.path, attributes[name][splits == 0], product_names([name]))
            self.CONFOUNDERS = product_names(named)
            self.PUBLISHED_COUNTS = {split: sum(counts) for split, counts in self.PUBLISHED_COUNTS.items()}
        c = np.ravel_multi_index([attributes[name] for name in named], [2] * len(named)).astype(np.int64)
        images = Images(folder / FOLDER, tuple(names), image_size(hparams), "resized", table.path, table.lines)
        self.lay_out(images, splits, attributes[LABEL], c, attributes[SEX], hparams)


def product_names(attributes: Sequence[str]) -> tuple[str, ...]:
    """Names of the values of a product of attributes, the last one running fastest: "not Male+not Young", ..."""
    pairs = [(f"not {name}", name) for name in attributes]
    return tuple("+".join(values) for values in itertools.product(*pairs))


def _check_confounders(named: Sequence[str], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            raise ValueError(not_found("confounder of CelebA", name, known))
    if len(set(named)) < len(named):
        raise ValueError(f"--confounders {' '.join(named)}: one is named twice")


def _attributes(table: Table, folder: Path, names: set[str]) -> dict[str, Integers]:
    """Attributes (N,) in 0 and 1, and a check of the images; all bad rows in one error."""
    problems = Problems(table.path)
    values = {name: (table.integers(name, (-1, 1), problems) == 1).astype(np.int64) for name in sorted(names)}
    table.check_paths("image_id", folder, problems)
    problems.raise_if_any("mend the rows or take them out (here and in list_eval_partition.csv)")
    return values


def _splits(path: Path, images: Sequence[str]) -> Integers:
    """Splits (N,) of the images, which the file must name in the same order."""
    table = read_csv(path, ("image_id", "partition"))
    problems = Problems(path)
    splits = table.integers("partition", range(3), problems)
    for line, name, image in zip(table.lines, table.columns["image_id"], images, strict=False):
        if name != image:
            problems.add(line, f"image_id is {name!r}, and {ATTRIBUTES} has {image!r} there")
    problems.raise_if_any(f"name the images of {ATTRIBUTES} in its order")
    if len(table) != len(images):
        raise ValueError(f"{path} has {len(table)} rows, {ATTRIBUTES} has {len(images)}; name the same images in both")
    return splits

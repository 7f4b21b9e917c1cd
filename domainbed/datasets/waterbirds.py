"""Waterbirds, with two training environments composed of its official training split."""

from collections.abc import Sequence
from typing import Any

from domainbed.datasets.base import Integers, image_size, register
from domainbed.datasets.composed import ComposedDataset
from domainbed.datasets.wilds import read_by_wilds, release_folder
from domainbed.images import Images
from domainbed.metadata import Problems, Table, read_csv

COLUMNS = ("img_filename", "y", "split", "place")


@register
class Waterbirds(ComposedDataset):
    """Land bird or water bird, cut out and pasted on photographs of land and water. Confounder: the background.

    In training 95 % of the birds are on their own background, in validation and test half of them.

    Source: Sagawa, Koh, Hashimoto and Liang 2020, "Distributionally Robust Neural Networks for Group Shifts",
    https://arxiv.org/abs/1911.08731; birds of CUB-200-2011, backgrounds of Places. Environments: the eX2L paper, B.6,
    table 4; 55 % of the land and 35 % of the water images are its environment 1, which gives its numbers to the last
    digit when all splits are counted together.
    Licence: non-commercial research and education.
    Layout: ``waterbirds_v1.0/{metadata.csv, RELEASE_v1.0.txt, 001.Black_footed_Albatross/*.jpg, ...}``.

    Hparams:
        environments: "shares", "subsample" or "pooled" (leaks), see docs/environments.md.
        data_seed: of the composition.
    """

    ENVIRONMENTS = ("land-centric", "balanced", "validation", "test")
    CLASSES = ("landbird", "waterbird")
    CONFOUNDERS = ("land", "water")
    SHARES = (((0.55, 0.35), (0.55, 0.35)), ((0.45, 0.65), (0.45, 0.65)))
    PROPORTIONS = (((0.6180, 0.1837), (0.0826, 0.1158)), ((0.4477, 0.3020), (0.0598, 0.1905)))
    PUBLISHED_COUNTS = {
        "train": (3498, 184, 56, 1057),
        "validation": (467, 466, 133, 133),
        "test": (2255, 2255, 642, 642),
    }

    def __init__(self, root: str | None, test_envs: Sequence[int], hparams: dict[str, Any]):
        folder = release_folder(root, "waterbirds", "1.0", ("metadata.csv",))
        table = read_csv(folder / "metadata.csv", COLUMNS)
        splits, y, place = _checked(table)
        names = table.columns["img_filename"]
        ours = {"_input_array": names, "_split_array": splits, "_y_array": y}
        read_by_wilds("waterbirds_dataset", "WaterbirdsDataset", folder, ours)
        images = Images(folder, tuple(names), image_size(hparams), "resized", table.path, table.lines)
        self.lay_out(images, splits, y, place, place, hparams)


def _checked(table: Table) -> tuple[Integers, Integers, Integers]:
    """Splits, labels and backgrounds (N,) of the metadata; all bad rows in one error."""
    problems = Problems(table.path)
    splits, y, place = (table.integers(name, range(n), problems) for name, n in (("split", 3), ("y", 2), ("place", 2)))
    table.check_paths("img_filename", table.path.parent, problems)
    problems.raise_if_any("mend the rows or take them out")
    return splits, y, place

"""Waterbirds on tiny trees in the release's layout."""

import csv
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed import datasets
from domainbed.datasets.composed import divided_counts
from domainbed.loaders import TrainingLoader, evaluation_batches
from domainbed.partitions import REGISTRY as PARTITIONS
from domainbed.splits import split_environments, training_splits, validation_splits

TRAIN = (35, 7, 6, 21)  # landbird on land, on water, waterbird on land, on water
HEADER = ("img_id", "img_filename", "y", "split", "place", "place_filename")


def rows(counts: dict[int, tuple[int, ...]]) -> list[tuple]:
    """Metadata of counts[split][group] images, the splits mixed."""
    cells = [(s, g) for s, groups in counts.items() for g, n in enumerate(groups) for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(cells))
    return [
        (i + 1, f"{g:03d}.Bird_{g // 2}/Bird_{i:04d}.jpg", g // 2, s, g % 2, f"/l/lake/{i}.jpg")
        for i, (s, g) in enumerate(cells[j] for j in order)
    ]


def write(root: Path, table: list[tuple], header: tuple = HEADER, **options) -> Path:
    """The tree with a tiny picture, of its group's grey, for each row; returns the metadata's path."""
    folder = root / "waterbirds_v1.0"
    for row in table:
        path = folder / row[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (60 * (2 * row[2] + row[4]),) * 3).save(path)
    (folder / "RELEASE_v1.0.txt").touch()
    with open(folder / "metadata.csv", "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **{"lineterminator": "\n"} | options).writerows([header, *table])
    return folder / "metadata.csv"


ROWS = rows({0: TRAIN, 1: (5, 5, 4, 4), 2: (6, 6, 3, 3)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, ROWS)
    return tmp_path


def build(root: Path, **hparams):
    return datasets.Waterbirds(str(root), [3], {"image_size": 8, "data_augmentation": True} | hparams)


def groups(environment) -> list[int]:
    return np.bincount(environment.y * 2 + environment.c, minlength=4).tolist()


def test_official_splits_and_shares(root: Path) -> None:
    dataset = build(root)
    first, second, validation, test = map(groups, dataset)
    assert [validation, test] == [[5, 5, 4, 4], [6, 6, 3, 3]]
    assert tuple(np.add(first, second)) == TRAIN
    assert [first, second] == divided_counts(TRAIN, np.reshape(dataset.SHARES, (2, 4))).tolist()
    assert first == [19, 2, 3, 7]  # 55 % of 35 and 6, 35 % of 7 and 21
    assert dataset.split_counts == {"train": TRAIN, "validation": (5, 5, 4, 4), "test": (6, 6, 3, 3)}
    assert [environment.augment for environment in dataset] == [True, True, False, False]
    assert (dataset.num_classes, dataset.num_confounders, dataset.input_shape) == (2, 2, (3, 8, 8))
    assert dataset.group_name(2) == "waterbird, land"


@pytest.mark.parametrize("reading", ["shares", "subsample", "pooled"])
def test_every_row_keeps_its_file_label_and_place(root: Path, reading: str) -> None:
    known = {name: (y, split, place) for _, name, y, split, place, _ in ROWS}
    used: list[list[str]] = []
    for e, environment in enumerate(build(root, environments=reading)):
        names = [environment.images.paths[p] for p in environment.positions]
        used.append(names)
        for name, y, c in zip(names, environment.y, environment.c, strict=True):
            assert known[name][0] == y
            assert known[name][2] == c
        splits = {known[name][1] for name in names}
        assert splits == ({0, 1, 2} if reading == "pooled" and e < 2 else {max(e - 1, 0)})
    assert not set(used[0]) & set(used[1])


def test_images_are_those_of_the_rows(root: Path) -> None:
    dataset = build(root)
    dataset.use_input_pipeline("pil")
    for environment in dataset:
        x, y = environment[0]
        grey = 60 * (2 * y + int(environment.c[0]))
        assert x.shape == (3, 8, 8)
        assert abs(x[0] - (grey / 255 - 0.485) / 0.229).max() < 0.03  # JPEG


def test_subsample_has_the_printed_proportions(tmp_path: Path) -> None:
    write(tmp_path, rows({0: (60, 30, 9, 30), 1: (1, 1, 1, 1), 2: (1, 1, 1, 1)}))
    dataset = build(tmp_path, environments="subsample")
    for environment, printed in zip(dataset, np.reshape(dataset.PROPORTIONS, (2, 4)), strict=False):
        assert abs(np.array(groups(environment)) - printed / printed.sum() * len(environment)).max() < 1


def test_pooling_is_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(root)
        assert not caplog.records
        build(root, environments="pooled")
    assert "training sees images of the validation and test splits" in caplog.text


def test_the_data_seed_decides(root: Path) -> None:
    def first(**hparams) -> list[int]:
        return build(root, **hparams)[0].positions.tolist()

    torch.manual_seed(1)
    before = first()
    torch.manual_seed(2)
    assert before == first(data_seed=0) != first(data_seed=1)


def test_it_trains_by_group_and_validates_officially(root: Path) -> None:
    dataset = build(root)
    dataset.use_input_pipeline("pil")
    splits = split_environments(dataset, [3], 0.2)
    assert [split.env for split in validation_splits(dataset, splits, [3])] == [2]
    loader = TrainingLoader(training_splits(dataset, splits, [3]), PARTITIONS["group"], 4, dataset.num_confounders)
    minibatches = next(iter(loader))
    assert loader.group_counts(2) == TRAIN
    assert [minibatch.g.unique().tolist() for minibatch in minibatches] == [[0], [1], [2], [3]]
    (x, y), *_ = evaluation_batches(dataset[3], np.arange(18))
    assert (x.shape, y.tolist()) == ((18, 3, 8, 8), dataset[3].y.tolist())


def damaged(change: Callable[[list[list]], None]) -> list[list]:
    table = [list(row) for row in ROWS]
    change(table)
    return table


def rewrite(metadata: Path, table: list[list], header: tuple = HEADER) -> None:
    with open(metadata, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *table])


def test_all_bad_rows_are_listed(root: Path) -> None:
    def change(table: list[list]) -> None:
        table[0][2], table[1][3], table[2][4], table[3][1] = 2, 7, "x", "../secret.jpg"
        table[5][1], table[6][1] = table[4][1], "nowhere.jpg"

    rewrite(root / "waterbirds_v1.0" / "metadata.csv", damaged(change))
    with pytest.raises(ValueError, match=r"metadata.csv: 6 bad rows; mend") as caught:
        build(root)
    for line, words in (
        (2, "y is '2'; allowed: 0 or 1"),
        (3, "split is '7'; allowed: 0 to 2"),
        (4, "place is 'x'"),
        (5, "leads out of"),
        (7, "stands on line 6 already"),
        (8, "'nowhere.jpg': no such file"),
    ):
        assert any(f"line {line}:" in text and words in text for text in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [row.__setitem__(3, 0) for row in t], "no image to validation and test"),
        (lambda t: [row.__setitem__(4, 1) for row in t if row[3] == 0], r"metadata\.csv: all .* confounder 'water'"),
        (lambda t: t.__setitem__(slice(None), t[:0]), "holds no rows"),
    ],
)  # fmt: skip
def test_metadata_that_can_not_be_trained_on(root: Path, change, message: str) -> None:
    rewrite(root / "waterbirds_v1.0" / "metadata.csv", damaged(change))
    with pytest.raises(ValueError, match=message):
        build(root)


def test_a_missing_column(root: Path) -> None:
    rewrite(root / "waterbirds_v1.0" / "metadata.csv", [list(row) for row in ROWS], (*HEADER[:4], "ground", "x"))
    with pytest.raises(ValueError, match="line 1: the header lacks place"):
        build(root)


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data_dir is missing"):
        datasets.Waterbirds(None, [3], {})
    with pytest.raises(FileNotFoundError, match=r"no such directory; it must hold waterbirds_v1\.0"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="unpack the release there"):
        build(tmp_path / "empty")
    (root / "waterbirds_v1.0" / "RELEASE_v1.0.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks RELEASE_v1.0.txt \(without .* wilds takes nothing"):
        build(root)
    (root / "waterbirds_v1.0" / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks metadata.csv, RELEASE_v1.0.txt"):
        build(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "waterbirds_v1.0"]  # nothing was made


@pytest.mark.parametrize("options", [{"encoding": "utf-8-sig"}, {"lineterminator": "\r\n"}, {"quoting": csv.QUOTE_ALL}])
def test_dialects_of_csv(tmp_path: Path, options: dict) -> None:
    write(tmp_path, ROWS, **options)
    assert sum(map(len, build(tmp_path))) == len(ROWS)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ", "),
        lambda text: text.replace(",", " ,"),
        lambda text: text.replace(".jpg,", ".jpg ,", 1),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: re.sub(r",(\d),(\d),(\d),", r",\1.0,+\2,\3.,", text),
        lambda text: re.sub(r"/l/(.*)", r'"/l, or ""r""/\1"', text),
    ],
)
def test_ways_of_writing_that_wilds_would_misread(root: Path, change: Callable[[str], str]) -> None:
    metadata, plain = root / "waterbirds_v1.0" / "metadata.csv", build(root)
    changed = change(metadata.read_text())
    assert changed != metadata.read_text()
    metadata.write_text(changed)
    for environment, expected in zip(build(root), plain, strict=True):
        assert environment.positions.tolist() == expected.positions.tolist()
        assert environment.images.paths == expected.images.paths
        assert environment.y.tolist() == expected.y.tolist()


def test_a_row_that_wilds_reads_otherwise_is_named(root: Path) -> None:
    first = ROWS[0][1]
    (root / "waterbirds_v1.0" / first).rename(root / "waterbirds_v1.0" / "NA")  # no number, says pandas
    metadata = root / "waterbirds_v1.0" / "metadata.csv"
    metadata.write_text(metadata.read_text().replace(first, "NA"))
    with pytest.raises(ValueError, match=r"_input_array of image 1 is nan for wilds, 'NA' for us"):
        build(root)


def test_an_unreadable_image_is_named_with_the_line_of_the_metadata(root: Path) -> None:
    (root / "waterbirds_v1.0" / ROWS[7][1]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"take them out of .*metadata\.csv:\n  line 9: {ROWS[7][1]}: not an image"):
        build(root).use_input_pipeline("pil")


def test_unknown_reading(root: Path) -> None:
    with pytest.raises(ValueError, match="did you mean pooled"):
        build(root, environments="pool")


def test_too_few_training_images(tmp_path: Path) -> None:
    write(tmp_path, rows({0: (1, 0, 0, 1), 1: (1, 1, 1, 1), 2: (1, 1, 1, 1)}))
    with pytest.raises(ValueError, match=r"Waterbirds, environments subsample: .* no image") as caught:
        build(tmp_path, environments="subsample")
    assert "no image: landbird, water; waterbird, land; complete the release" in str(caught.value)
    assert """take --hparams '{"environments": "shares"}'""" in str(caught.value)
    write(tmp_path, rows({0: (1, 0, 1, 0), 1: (1, 1, 1, 1), 2: (1, 1, 1, 1)}))
    with pytest.raises(ValueError, match="all training images have the confounder 'land'"):
        build(tmp_path)


def test_published_counts_of_the_release() -> None:
    root = os.environ.get("DOMAINBED_DATA_DIR", "")
    if not Path(root, "waterbirds_v1.0").is_dir():
        pytest.skip("DOMAINBED_DATA_DIR names no folder with waterbirds_v1.0")
    dataset = datasets.Waterbirds(root, [3], {})
    assert dataset.split_counts == dataset.PUBLISHED_COUNTS

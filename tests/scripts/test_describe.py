"""The describe script on embedded sets and CSV files: what it prints, and the contact sheet that it writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from domainbed import datasets
from domainbed.scripts import BadInput, describe

SUBPOP = """
group      0: train, 85% brick  1: train, 63% brick  2: validation       3: test   all training
                      training             training     validation          test
3, brick         1258 (83.9 %)         932 (62.1 %)   100 (25.0 %)  300 (25.0 %)  2190 (73.0 %)
3, gravel           35 (2.3 %)           85 (5.7 %)   100 (25.0 %)  300 (25.0 %)    120 (4.0 %)
8, brick            17 (1.1 %)           13 (0.9 %)   100 (25.0 %)  300 (25.0 %)     30 (1.0 %)
8, gravel         190 (12.7 %)         470 (31.3 %)   100 (25.0 %)  300 (25.0 %)   660 (22.0 %)
all                       1500                 1500            400          1200           3000
"""


def described(capsys: pytest.CaptureFixture, output: Path, *flags: str) -> tuple[str, Image.Image]:
    assert describe.main([*flags, "--output", str(output)]) == 0
    with Image.open(output) as sheet:
        sheet.load()
        return capsys.readouterr().out, sheet


def rows_of(sheet: Image.Image) -> int:
    return (sheet.height - 4) // 100


def test_an_embedded_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, sheet = described(capsys, tmp_path / "sheet", "--dataset", "DigitsSubpop")
    assert text.startswith("DigitsSubpop\n============\nA subpopulation shift like Waterbirds'")
    assert SUBPOP in text
    assert "Images: 4600 of 3 x 36 x 36, in 4 environments" in text
    assert "Confounder: 2 values (brick, gravel)" in text
    assert "Source: the group shares of Waterbirds" in text
    assert "Every group of the test environments occurs in training." in text
    assert "official validation" not in text.split("Images:")[1]
    assert "Published counts: none" in text
    assert f"Contact sheet: {tmp_path / 'sheet'}" in text
    assert (sheet.format, rows_of(sheet)) == ("PNG", 4)
    _, again = described(capsys, tmp_path / "again", "--dataset", "DigitsSubpop")
    assert np.array_equal(np.asarray(sheet), np.asarray(again))


def test_groups_that_training_never_shows_and_test_environments_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text, sheet = described(capsys, tmp_path / "sheet.png", "--dataset", "DigitsM2M")
    assert "In the test environments but never in training (8 of 8): 0, gravel; 0, city; 1, gravel;" in text
    assert "There is no official validation set" in text
    assert rows_of(sheet) == 16
    text, _ = described(capsys, tmp_path / "sheet.png", "--dataset", "DigitsM2M", "--test_envs", "1")
    assert ["training", "test", "training"] in [line.split() for line in text.splitlines()]


def test_a_set_without_its_own_test_environments(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe.main(["--dataset", "Debug28"]) == 0
    assert "The test environments are yours to choose with --test_envs" in capsys.readouterr().out
    with Image.open("Debug28.png") as sheet:
        assert rows_of(sheet) == 4


@pytest.fixture
def csv(tmp_path: Path) -> str:
    """Twelve images of two classes: red cats, blue dogs."""
    rows = ["path,label,split,place,hour"]
    for i in range(12):
        label, split = ("cat", "dog")[i % 2], "train" if i < 8 else "test"
        rows.append(f"{i}.png,{label},{split},{('in', 'out')[i // 2 % 2]},{i % 3}")
        Image.new("RGB", (40, 30), ("#c00000", "#0000c0")[i % 2]).save(tmp_path / f"{i}.png")
    (tmp_path / "pets.csv").write_text("\n".join(rows))
    return str(tmp_path / "pets.csv")


def test_a_file_without_confounder_is_described_by_class(
    csv: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text, sheet = described(capsys, tmp_path / "sheet.png", "--dataset", csv, "--hparams", '{"image_size": 48}')
    assert f"The images that {csv} lists." in text
    assert "Layout: 12 rows with the columns path, label, split, place, hour." in text
    assert "Images: 12 of 3 x 48 x 48, in 2 environments" in text
    assert "Classes: 2 (cat, dog)" in text
    assert "Confounder: none is known" in text
    table = text.split("Images of each class (share of the environment)\n\n")[1].split("\n\n")[0]
    assert table.splitlines() == [
        "class    0: train     1: test",
        "         training        test",
        "cat    4 (50.0 %)  2 (50.0 %)",
        "dog    4 (50.0 %)  2 (50.0 %)",
        "all             8           4",
    ]
    assert rows_of(sheet) == 2
    pixels, left = np.asarray(sheet).astype(int), sheet.width - 800
    for row, color in enumerate([(192, 0, 0), (0, 0, 192)]):
        cells = pixels[4 + 100 * row : 100 + 100 * row, left:]
        assert abs(cells[:, :96] - color).max() <= 2  # as in the file, after normalisation and back
        assert (cells[:, 596:] == 255).all()  # six images of each


def test_confounders_of_a_file(csv: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--dataset", csv, "--confounders", "place", "hour", "--hparams", '{"image_size": 16}']
    text, sheet = described(capsys, tmp_path / "sheet.png", *flags)
    assert "Confounder: 6 values (in+0, in+1, in+2, out+0, out+1, out+2)" in text
    assert "\ncat, in+0 " in text
    assert rows_of(sheet) == 12
    with pytest.raises(BadInput, match=r"column of .* not found: plaice; did you mean place"):
        describe.main(["--dataset", csv, "--confounders", "plaice"])


class Unlabelled(Dataset):
    """Labels that only the images know."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), i / self.n), i % 3


class Lazy(datasets.MultipleDomainDataset):
    """Greys.

    Source: none. Licence: none.
    """

    ENVIRONMENTS = ("first", "second")
    PUBLISHED_COUNTS = {"first": 6, "second": 8}

    def __init__(self, root: str | None, test_envs: list[int], hparams: dict[str, Any]):
        self.input_shape, self.num_classes = (1, 8, 8), 3
        self.datasets = [Unlabelled(6), Unlabelled(9)]


def test_labels_that_need_every_image_are_read_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "Lazy", Lazy, raising=False)
    text, sheet = described(capsys, tmp_path / "sheet.png", "--dataset", "Lazy")
    assert text.startswith("Reading the labels of first, second image by image; this takes a while.\n")
    assert "No array of labels: first, second;" in text
    assert "\ny=0    2 (33.3 %)  3 (33.3 %)\n" in text
    assert "this is not the official release.\n  first: as published\n  second: differs\n    images: 9 here, 8" in text
    assert rows_of(sheet) == 3
    assert "Not stated" not in text  # nothing is on disk, so no layout is missed


class Bred(datasets.MultipleDomainDataset):
    """A set whose user may name another confounder, and which counts its splits itself."""

    CONFOUNDERS = ("a", "b")
    PUBLISHED_COUNTS = {"train": (1, 2, 3, 4)}
    split_counts = {"train": (1, 2, 3, 4)}


def test_published_groups_are_compared_with_the_confounder_of_the_release() -> None:
    dataset, environments = Bred(), [describe.cards.Environment("x", "training", np.array([5, 5, 5, 5]))]
    facts = describe.Facts(environments, [], [], "group", [])
    assert describe.release(dataset) == {"train": (1, 2, 3, 4)}
    assert describe.here(dataset, facts)["train"].tolist() == [1, 2, 3, 4]
    dataset.CONFOUNDERS = ("c", "d")
    assert describe.release(dataset) == {"train": 10}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "DigitsM2N"], "did you mean DigitsM2M"),
        (["--dataset", "gone.csv"], r"gone\.csv: no such file"),
        (["--dataset", "ColoredMNIST"], "ColoredMNIST needs --data_dir"),
        (["--dataset", "Debug28", "--test_envs", "7"], "--test_envs 7"),
        (["--dataset", "Debug28", "--confounders", "x"], "leaves no choice of --confounders"),
        (["--dataset", "Debug28", "--hparams", '{"bacth_size": 3}'], "hparam of ERM not found: bacth_size"),
        (["--dataset", "Debug28", "--output", "no/such/sheet.png"], "there is no folder no/such; make it first"),
    ],
)
def test_bad_input(flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        describe.main(flags)


def test_missing_images_are_named(csv: str, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()
    (tmp_path / "5.png").write_text("x")
    with pytest.raises(BadInput, match=r"line 5: path '3\.png': no such file"):
        describe.main(["--dataset", csv])
    Image.new("RGB", (4, 4)).save(tmp_path / "3.png")
    with pytest.raises(BadInput, match=r"1 of 12 images (.*\n) +line 7: 5\.png: not an image"):
        describe.main(["--dataset", csv])

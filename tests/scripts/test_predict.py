"""From a folder of images to a CSV file and pictures of where the model looks."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed import hparams_registry, predictors, training
from domainbed.algorithms import ERM
from domainbed.algorithms.base import Task
from domainbed.scripts import BadInput, predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of DigitsSubpop's classes 3 and 8."""
    path = tmp_path_factory.mktemp("run") / "model.pkl"
    torch.manual_seed(0)
    task, hparams = Task((3, 36, 36), 2, 2), hparams_registry.default_hparams("ERM", "DigitsSubpop")
    args = {"algorithm": "ERM", "dataset": "DigitsSubpop"}
    training.save_model(path, ERM.from_task(task, hparams), task, hparams, args)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images: in folders called like classes, in another one, and one beside them."""
    rng = np.random.default_rng(0)
    for name in ("3/a.png", "3/deeper/a.jpg", "8/b.png", "others/c.png", "d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 36, 3)).astype(np.uint8)).save(path)
    return tmp_path / "images"


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_image_has_a_line(model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert predict.main(["--model", str(model), "--images", str(folder), "--out", str(out), "--batch_size", "2"]) == 0
    expected = predictors.load(model).predict(folder)
    found = lines(out)
    assert [line["file"] for line in found] == expected.files
    assert [line["name"] for line in found] == expected.names
    probabilities = [[float(line["p(3)"]), float(line["p(8)"])] for line in found]
    assert np.allclose(probabilities, expected.probabilities, atol=1e-6)
    printed = capsys.readouterr().out
    assert f"Wrote predictions of 5 images to {out}" in printed
    names = {Path(line["file"]).relative_to(folder).parts[0]: line["name"] for line in found}
    threes = [line["name"] == "3" for line in found if "/3/" in line["file"]]
    hits = [*threes, names["8"] == "8"]
    assert (
        f"Accuracy {100 * np.mean(hits):.1f} % of 3 images in folders named as classes "
        f"(3 {100 * np.mean(threes):.1f} % of 2, 8 {100.0 * hits[-1]:.1f} % of 1)"
    ) in printed


def test_what_can_not_be_read_is_named_and_the_rest_is_written(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "8" / "torn.png").write_bytes((folder / "d.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    out = tmp_path / "out.csv"
    argv = ["--model", str(model), "--images", str(folder), "--out", str(out), "--batch_size", "1"]
    assert predict.main(argv) == predict.EXIT_SKIPPED
    assert len(lines(out)) == 5
    printed = capsys.readouterr()
    for name in ("8/torn.png", "text.jpg"):
        assert f"skipped {folder / name}: " in printed.err
    assert "error: 2 of 7 images can't be read and were skipped" in printed.err
    assert "of 3 images in folders named as classes" in printed.out


def test_a_name_that_is_not_utf_8(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder / "d") + b"\xff.png"))
    (folder / "d.png").rename(odd)
    out = Path(os.fsdecode(os.fsencode(tmp_path / "out") + b"\xff.csv"))
    argv = ["--model", str(model), "--images", str(folder), "--out", str(out), "--explain", str(tmp_path / "look")]
    assert predict.main(argv) == 0
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert str(odd) in [line["file"] for line in csv.DictReader(file)]
    with Image.open(tmp_path / "look" / f"{odd.name}.png") as picture:
        assert picture.text["Title"].startswith("d\ufffd.png: ")
    capsys.readouterr().out.encode()  # printed in full to a terminal


def test_pictures_keep_the_folders(model: Path, folder: Path, tmp_path: Path) -> None:
    argv = ["--model", str(model), "--images", str(folder), "--out", str(tmp_path / "out.csv")]
    assert predict.main([*argv, "--explain", str(tmp_path / "look"), "--method", "layer_cam"]) == 0
    pictures = sorted(str(path.relative_to(tmp_path / "look")) for path in (tmp_path / "look").rglob("*.png"))
    assert pictures == ["3/a.png.png", "3/deeper/a.jpg.png", "8/b.png.png", "d.png.png", "others/c.png.png"]
    with Image.open(tmp_path / "look" / "d.png.png") as picture:
        assert picture.size == (36 * 8, 48 * 8)
        assert picture.text["Title"].startswith("d.png: ")
        assert "in bright colours where the model looks for" in picture.text["Description"]


def test_the_overlay_is_bright_where_the_heatmap_is() -> None:
    heatmap = np.zeros((4, 4), np.float32)
    heatmap[:2, 2:] = 1
    found = np.asarray(predict.overlay(Image.new("RGB", (300, 400), "grey"), heatmap).convert("L"), float)
    assert found.shape == (400, 300)
    top_right = found[:100, 200:].mean()
    assert top_right > 2 * max(found[:100, :100].mean(), found[300:].mean())


def test_files_of_several_places(model: Path, folder: Path, tmp_path: Path) -> None:
    given = [str(folder / "d.png"), str(folder / "3"), str(folder / "d.png")]
    out, look = tmp_path / "out.csv", tmp_path / "look"
    assert predict.main(["--model", str(model), "--images", *given, "--out", str(out), "--explain", str(look)]) == 0
    assert [Path(line["file"]).name for line in lines(out)] == ["d.png", "a.png", "a.jpg"]
    assert (look / "3" / "deeper" / "a.jpg.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "nowhere"], "nowhere: no such file or folder of images"),
        (["--batch_size", "0"], "--batch_size 0: give 1 or more"),
        (["--out", "nowhere/out.csv"], "there is no folder nowhere"),
        (["--model", "nowhere"], "nowhere: no such run or model"),
    ],
)
def test_bad_input_is_explained_before_anything_is_written(
    model: Path, folder: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    argv = ["--model", str(model), "--images", str(folder), "--out", str(tmp_path / "out.csv")]
    with pytest.raises(BadInput, match=message):
        predict.main([*argv, *flags])
    assert not (tmp_path / "out.csv").exists()


def test_a_file_that_may_run_code_is_loaded_by_name_only(model: Path, folder: Path, tmp_path: Path) -> None:
    content = torch.load(model, weights_only=True)
    torch.save(content | {"more": Path("anywhere")}, tmp_path / "model.pkl")
    argv = ["--model", str(tmp_path), "--images", str(folder), "--out", str(tmp_path / "out.csv")]
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(BadInput, match=r"model.pkl holds pathlib.*Path, which may run code.*say so: --trusted"):
        predict.main(argv)
    assert predict.main([*argv, "--trusted"]) == 0
    assert len(lines(tmp_path / "out.csv")) == 5

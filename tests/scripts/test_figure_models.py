"""figure gradcam and figure features, from saved runs to files."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from domainbed import figures
from domainbed.scripts import BadInput, figure, figure_gradcam, subjects, train
from domainbed.splits import Split, split_environments

pytest.importorskip("matplotlib")

FLAGS = [
    "--dataset", "DigitsO2O", "--steps", "1", "--eval_splits", "selection",
    "--hparams", '{"batch_size": 8}', "--keep_best", "aa_wga",
]  # fmt: skip
ROWS = {"ERM:random": ["ERM", "random"], "ERM:group": ["ERM", "group"], "EX2L_MAE": ["EX2L_MAE", "group"],
        "ALIGN:group": ["ALIGN", "group"]}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows, directories in another order."""
    root = tmp_path_factory.mktemp("sweep")
    for place, (algorithm, partition) in zip("badc", ROWS.values(), strict=True):
        words = ["--algorithm", algorithm, "--partition", partition, "--output_dir", str(root / place)]
        assert train.main([*FLAGS, *words]) == 0
    return root


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed to ``figures.explanation_grid``."""
    drawn: list[Any] = []
    grid = figures.explanation_grid
    monkeypatch.setattr(figures, "explanation_grid", lambda *args: drawn.append(args) or grid(*args))
    return drawn


def texts(path: Path) -> dict[str, str]:
    from PIL import Image

    with Image.open(path) as image:
        return dict(image.text)


def test_a_sweep_gives_a_column_to_each_network(sweep: Path, grids: list[Any], capsys: pytest.CaptureFixture) -> None:
    assert figure.main(["gradcam", "--input_dir", str(sweep), "--images", "4"]) == 0
    ((images, titles, strips, across),) = grids
    assert not across
    assert len(images) == 4
    assert titles == ["0, gravel", "1, city", "4, brick", "6, grass"]
    assert [strip.title.replace("\n", ": ") for strip in strips] == [
        "ERM:random: grad_cam", "ERM:group: grad_cam", "EX2L_MAE: label network", "EX2L_MAE: confounder network",
        "ALIGN:group: grad_cam", "ALIGN:group: mask", "true mask",
    ]  # fmt: skip
    assert [strip.overlaid for strip in strips] == [True] * 5 + [False] * 2
    marked = [strip for strip in strips if strip.correct is not None]
    assert len(marked) == 4
    for strip in marked:
        assert strip.correct.tolist() == [t.split(", ")[0] == c for t, c in zip(titles, strip.captions, strict=True)]
    said = texts(sweep / "figures" / "gradcam.png")
    assert said["Title"] == "Where the networks look (grad_cam)"
    assert "4 images of env 0 (tested on), one by one (0, gravel; 1, city; 4, brick; 6, grass)" in said["Description"]
    assert f"ERM:random, grad_cam {int(marked[0].correct.sum())}" in said["Description"]
    assert "ERM:random: b/model_best.pkl, step" in capsys.readouterr().out


def test_runs_are_drawn_in_their_order(sweep: Path, grids: list[Any], tmp_path: Path) -> None:
    runs = [str(sweep / place) for place in "db"]
    out = tmp_path / "new" / "a.svg"
    figure.main(["gradcam", "--runs", *runs, "--images", "2", "--method", "layer_cam", "--out", str(out), "--env", "1"])
    ((images, _, strips, _),) = grids
    assert len(images) == 2
    assert [strip.title.split("\n")[0] for strip in strips[:-1]] == ["EX2L_MAE", "EX2L_MAE", "ERM:random"]
    assert out.read_text().startswith("<?xml")
    assert "2 images of env 1 (trained on), one by one" in out.read_text()


def test_runs_of_one_row_are_told_apart(sweep: Path, grids: list[Any], tmp_path: Path) -> None:
    shutil.copytree(sweep / "b", tmp_path / "again")
    runs = [str(sweep / "b"), str(tmp_path / "again")]
    figure.main(["gradcam", "--runs", *runs, "--images", "1", "--out", str(tmp_path / "a.png")])
    names = [strip.title.split("\n")[0] for strip in grids[0][2][:-1]]
    assert names == ["ERM:random (b/model_best.pkl)", "ERM:random (again/model_best.pkl)"]


def test_runs_in_folders_of_one_name_are_told_apart(sweep: Path, grids: list[Any], tmp_path: Path) -> None:
    runs = [tmp_path / parent / "run" for parent in ("one", "two")]
    for run in runs:
        shutil.copytree(sweep / "b", run)
    figure.main(["gradcam", "--runs", *map(str, runs), "--images", "1", "--out", str(tmp_path / "a.png")])
    names = [strip.title.split("\n")[0] for strip in grids[0][2][:-1]]
    assert names == [f"ERM:random ({run / 'model_best.pkl'})" for run in runs]


@pytest.mark.parametrize(
    ("kind", "e", "expected"),
    [
        ("in", 1, "env 1 (tested on)"),
        ("uda", 1, "env 1 (tested on, uda-split)"),
        ("in", 0, "env 0 (trained on)"),
        ("out", 0, "env 0 (held out of training)"),
        ("in", 2, "env 2 (validated on)"),
    ],
)
def test_what_a_run_did_with_images_is_said(kind: str, e: int, expected: str) -> None:
    dataset = SimpleNamespace(VALIDATION_ENVS=(2,))
    subject = subjects.Subject(Path("model.pkl"), {"test_envs": [1]}, 0, None, dataset, [])
    assert figure_gradcam.source(subject, Split(e, kind, None, np.arange(3), e)) == expected


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_images_are_spread_over_the_groups(n: int) -> None:
    from domainbed.datasets import get_dataset_class

    dataset = get_dataset_class("DigitsO2O")(None, [0], {})
    split = split_environments(dataset, [0], 0.2)[0]
    keys = figure_gradcam.shown_keys(split, n, 0, dataset.num_confounders)
    y, c = np.asarray(split.environment.y)[keys], np.asarray(split.environment.c)[keys]
    groups = y * dataset.num_confounders + c
    assert len(set(keys)) == n
    assert groups.tolist() == sorted(groups)
    assert max(np.bincount(groups)) == -(-n // 4)  # there are four


def test_of_each_row_the_draw_that_validation_takes_in_the_first_trial(sweep: Path, tmp_path: Path) -> None:
    for draw, (trial, change) in {"low": (0, -1), "high": (0, 1), "later": (1, 2)}.items():
        shutil.copytree(sweep / "b", tmp_path / draw)
        file = tmp_path / draw / "results.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["args"] |= {"trial_seed": trial, "hparams_seed": len(draw)}
            line |= {key: value + change for key, value in line.items() if "_out_g" in key and key.endswith("_acc")}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert subjects.stand_ins(tmp_path) == {"ERM:random": tmp_path / "high" / "model_best.pkl"}


def test_features_without_umap(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "look.png"
    words = ["--input_dir", str(sweep), "--rows", "EX2L_MAE", "ERM:random", "--n", "120", "--no_umap"]
    assert figure.main(["features", *words, "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "look.txt").read_text()
    assert text in printed
    assert "Scores of the penultimate features: DigitsO2O, test environment 0" in text
    lines = [line.split("  ")[0] for line in text.splitlines()[-4:]]
    assert lines == ["EX2L_MAE", "ERM:random", "label alone", "chance"]
    assert "probe c|y" in text
    written = (tmp_path / "look.json").read_text()
    assert json.loads(written)
    assert "UMAP" not in text + written
    assert texts(out)["Title"] == "Penultimate features (PCA)"
    assert "EX2L_MAE" in texts(out)["Description"]


def test_umap_is_asked_for_before_anything_is_computed(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(BadInput, match=r"pip install 'domainbed-ex2l\[report\]'; or --no_umap"):
        figure.main(["features", "--input_dir", str(sweep)])


@pytest.mark.parametrize("kind", ["gradcam", "features"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "nowhere", "--out", "a.png"], "nowhere: no such run or model"),
        (["--runs", "SWEEP/a"], "--out: name the file of the figure"),
        (["--runs", "SWEEP/a", "--out", "a.jpg"], "a.jpg: a figure is written as .png, .pdf, .svg"),
        (["--runs", "SWEEP/a", "--rows", "ERM", "--out", "a.png"], "--rows is for --input_dir"),
        (["--runs", "SWEEP/a", "SWEEP/b", "SWEEP/a", "--out", "a.png"], "--runs names .*a twice; name each once"),
        (
            ["--runs", "SWEEP/a", "SWEEP/a/model_best.pkl", "--out", "a.png"],
            "--runs names .*a and .*model_best.pkl, the same model",
        ),
        (["--input_dir", "SWEEP", "--rows", "ALIGN:group", "ALIGN:group"], "--rows names ALIGN:group twice"),
        (["--input_dir", "SWEEP/a"], "a holds no runs"),
        (
            ["--input_dir", "SWEEP", "--rows", "IRM"],
            "--rows IRM: .* has the rows ERM:random, ERM:group, EX2L",
        ),
        (["--input_dir", "SWEEP", "--dataset", "DigitsM2M"], "holds runs of DigitsO2O 0; name one of them"),
    ],
)
def test_bad_input(sweep: Path, kind: str, words: list[str], message: str) -> None:
    words = [word.replace("SWEEP", str(sweep)) for word in words]
    extra = ["--no_umap"] if kind == "features" else []
    with pytest.raises(BadInput, match=message):
        figure.main([kind, *words, *extra])


def test_runs_on_other_images_are_not_compared(sweep: Path, tmp_path: Path) -> None:
    words = ["--algorithm", "ERM", "--trial_seed", "1", "--output_dir", str(tmp_path / "other")]
    assert train.main([*FLAGS, *words]) == 0
    runs = ["--runs", str(sweep / "b"), str(tmp_path / "other"), "--out", str(tmp_path / "a.png")]
    for words in (["gradcam"], ["features", "--no_umap"]):
        with pytest.raises(BadInput, match="differ in trial_seed: 0 and 1; draw them one by one"):
            figure.main([*words, *runs])
    assert not list(tmp_path.glob("a.*"))


def test_a_model_of_an_older_class_is_no_crash(sweep: Path, tmp_path: Path) -> None:
    import torch

    shutil.copytree(sweep / "b", tmp_path / "old")
    file = tmp_path / "old" / "model_best.pkl"
    content = torch.load(file, weights_only=True)
    content["model_dict"].popitem()
    torch.save(content, file)
    with pytest.raises(
        BadInput, match=r"the saved model does not fit ERM as it is now \(RuntimeError: .*\); train it again"
    ):
        figure.main(["gradcam", "--runs", str(tmp_path / "old"), "--out", str(tmp_path / "a.png")])

"""From a training with --explain to the script on its model, the tables and the picture."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, explanation_records
from domainbed.algorithms import ERM
from domainbed.datasets import get_dataset_class
from domainbed.jobs import EXTRAS, Job
from domainbed.rows import Row
from domainbed.scripts import BadInput, collect_results, explain, sweep, train

QUICK = ["--steps", "3", "--checkpoint_freq", "2", "--eval_splits", "selection", "--hparams", '{"batch_size": 8}']
DIGITS = ["--dataset", "DigitsO2O", *QUICK]
DEBUG = ["--dataset", "Debug28", *QUICK[:-1], '{"backbone": "small_cnn", "batch_size": 4}']


def run(output_dir: Path, *flags: str) -> Path:
    assert train.main([*flags, "--output_dir", str(output_dir)]) == 0
    return output_dir


def lines(directory: Path) -> list[dict[str, Any]]:
    return explanation_records.read(directory)


def explained(directory: Path, *flags: str, n: int = 32) -> dict[str, Any]:
    """What the script adds to the run's file."""
    (directory / "explanations.jsonl").unlink(missing_ok=True)
    assert explain.main(["--model", str(directory), "--n", str(n), *flags]) == 0
    (line,) = lines(directory)
    return line


def numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("env")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sweep")
    flags = [*DIGITS, "--explain", "32"]
    return {
        "ERM": run(root / "ERM", *flags, "--algorithm", "ERM"),
        "EX2L_MAE": run(root / "EX2L_MAE", *flags, "--algorithm", "EX2L_MAE", "--keep_best", "aa_wga"),
    }


@pytest.fixture
def runs(trained: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may write to."""
    return {name: shutil.copytree(path, tmp_path / "sweep" / name) for name, path in trained.items()}


@pytest.mark.parametrize("name", ["ERM", "EX2L_MAE"])
def test_the_script_repeats_the_end_of_the_training(runs: dict[str, Path], name: str) -> None:
    (at_the_end,) = lines(runs[name])
    model = "model.pkl" if name == "ERM" else "model_best.pkl"
    assert at_the_end["explained"].items() >= {
        "model": model, "method": "grad_cam", "n": 32, "seed": 0, "fills": ["blur"],
    }.items()  # fmt: skip
    again = explained(runs[name], "--batch_size", "5")
    assert again["args"] == at_the_end["args"]
    assert again["explained"] == at_the_end["explained"]
    assert numbers(again) == pytest.approx(numbers(at_the_end), abs=1e-4)
    expected = {"sufficiency_blur_lower", "insertion_auc_blur_higher", "mask_iou_higher", "dead_maps_lower"}
    expected |= {"map_overlap_lower"} if name == "EX2L_MAE" else set()
    groups = explanation_records.group_metrics(again, 0, "in")
    for metrics in (explanation_records.metrics(again, 0, "in"), *groups.values()):
        assert expected <= metrics.keys()
    assert [again[f"env0_in_g{g}_explained"] for g in groups] == [8] * 4


def test_other_masks_have_a_line_and_a_table_of_their_own(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = runs["ERM"]
    dataset = get_dataset_class("DigitsO2O")(None, [0], {})
    (tmp_path / "masks").mkdir()
    for e, environment in enumerate(dataset):
        np.save(tmp_path / "masks" / f"env{e}.npy", 255 - environment.masks)
    own = explained(directory)
    assert explain.main(["--model", str(directory), "--n", "32", "--mask_dir", str(tmp_path / "masks")]) == 0
    _, others = lines(directory)
    assert own["env0_in_energy_in_mask_higher"] + others["env0_in_energy_in_mask_higher"] == pytest.approx(1, abs=0.02)
    assert [line["explained"]["mask_dir"] for line in lines(directory)] == ["", str(tmp_path / "masks")]


def test_the_step_is_that_of_the_model(runs: dict[str, Path]) -> None:
    assert lines(runs["ERM"])[0]["explained"]["step"] == 2
    best = torch.load(runs["EX2L_MAE"] / "model_best.pkl", weights_only=True)["step"]
    assert lines(runs["EX2L_MAE"])[0]["explained"]["step"] == best
    explain.main(["--model", str(runs["EX2L_MAE"] / "model.pkl"), "--n", "8"])
    assert lines(runs["EX2L_MAE"])[1]["explained"].items() >= {"model": "model.pkl", "step": 2, "n": 8}.items()


def test_models_see_the_same_images_and_each_has_a_line_in_the_csv(runs: dict[str, Path], tmp_path: Path) -> None:
    models, path = [str(directory) for directory in runs.values()], tmp_path / "images.csv"
    explain.main(
        ["--model", *models, "--n", "12", "--fills", "zero", "--splits", "in", "out", "--per_image", str(path)]
    )
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    by_model = {model: [row for row in rows if row["model"].startswith(f"{model}/")] for model in models}
    places = [[(row["env"], row["split"], row["index"], row["y"], row["c"], row["g"]) for row in some]
              for some in by_model.values()]  # fmt: skip
    assert places[0] == places[1]
    assert len(places[0]) == len(set(places[0])) == 24
    assert {row["split"] for row in rows} == {"in", "out"}
    assert all(row["correct"] == str(int(row["y"] == row["predicted"])) for row in rows)
    assert {row["map_overlap_lower"] for row in by_model[models[0]]} == {""}
    line = lines(runs["ERM"])[1]
    tested = [row for row in by_model[models[0]] if row["split"] == "in"]
    groups = [f"env0_in_g{row['g']}" for row in tested]
    shares = [line[f"{group}_images"] / line[f"{group}_explained"] for group in groups]
    values = [float(row["sufficiency_zero_lower"]) for row in tested]
    assert line["env0_in_sufficiency_zero_lower"] == pytest.approx(np.average(values, weights=shares))


def test_other_environments_seeds_and_methods(runs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    line = explained(runs["ERM"], "--envs", "1", "2", "--method", "layer_cam", "--seed", "3", n=8)
    assert explanation_records.places(line) == [(1, "in"), (2, "in")]
    printed = capsys.readouterr().out
    assert "-------- Explanations by layer_cam (model.pkl, step 2), seed 3" in printed
    assert "env1 in  env2 in  env1 in worst group" in printed


def test_tables_of_a_sweep(runs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    directory = runs["ERM"].parent
    collect_results.main(["--input_dir", str(directory)])
    printed = capsys.readouterr().out
    results, table = ((directory / name).read_bytes() for name in ("results.txt", "explanations.txt"))
    assert printed.encode().endswith(table)
    text = table.decode()
    assert "DigitsO2O: explanations by grad_cam, 32 images (seed 0), model.pkl" in text
    assert "DigitsO2O: explanations by grad_cam, 32 images (seed 0), model_best.pkl: worst group" in text
    record = json.loads((runs["ERM"] / "results.jsonl").read_text().splitlines()[-1])
    (row,) = [line for line in text.splitlines() if line.startswith("ERM")][:1]
    assert row.split()[3] == f"{100 * record['env0_in_acc']:.1f}"
    for path in directory.glob("*/explanations.jsonl"):
        path.unlink()
    (directory / "explanations.txt").unlink()
    collect_results.main(["--input_dir", str(directory)])
    assert (directory / "results.txt").read_bytes() == results
    assert not (directory / "explanations.txt").exists()


def test_latex_tables_have_a_file_of_their_own(runs: dict[str, Path]) -> None:
    collect_results.main(["--input_dir", str(runs["ERM"].parent), "--latex"])
    assert (runs["ERM"].parent / "explanations.tex").read_text().startswith("\\documentclass")


def test_training_is_the_same_with_and_without(trained: dict[str, Path], tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", *DIGITS, "--algorithm", "ERM")
    assert not (plain / "explanations.jsonl").exists()
    records = [[json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
               for directory in (plain, trained["ERM"])]  # fmt: skip
    for one, other in zip(*records, strict=True):
        assert {k: v for k, v in one.items() if k not in ("args", "step_time")} == {
            k: v for k, v in other.items() if k not in ("args", "step_time")
        }
    one, other = (torch.load(d / "model.pkl", weights_only=True)["model_dict"] for d in (plain, trained["ERM"]))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_stores_no_model_is_explained_at_its_end_only(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", *DEBUG, "--explain", "6", "--skip_model_save")
    assert lines(directory)[0]["explained"].items() >= {"model": "", "step": 2}.items()
    with pytest.raises(BadInput, match=r"holds no model.*--skip_model_save"):
        explain.main(["--model", str(directory)])


def test_overwriting_a_run_forgets_its_explanations(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", *DEBUG, "--explain", "6")
    run(directory, *DEBUG, "--overwrite", "--seed", "1")
    assert not (directory / "explanations.jsonl").exists()


def test_arguments_that_an_older_model_lacks_have_their_defaults(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", *DEBUG, "--explain", "6")
    (expected,) = lines(directory)
    saved = torch.load(directory / "model.pkl", weights_only=True)
    del saved["step"]
    for key in ("explain", "mask_dir", "input_pipeline", "partition"):
        del saved["args"][key]
    torch.save(saved, directory / "model.pkl")
    line = explained(directory, n=6)
    assert numbers(line) == pytest.approx(numbers(expected), abs=1e-4)
    assert line["explained"]["step"] == 2


class Somebodys(ERM):
    """As for DomainBed: its constructor, its update."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)

    def update(self, minibatches, unlabeled=None):
        return super().update(minibatches)


class Unexplained(torch.nn.Module):
    """Has no featurizer."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        self.layer = torch.nn.Linear(int(np.prod(input_shape)), num_classes)

    def update(self, minibatches, unlabeled=None):
        return {"loss": 0.0}

    def predict(self, x):
        return self.layer(x.flatten(1))


def test_a_third_party_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Somebodys", Somebodys, raising=False)
    directory = run(tmp_path / "run", *DEBUG, "--algorithm", "Somebodys", "--explain", "6")
    (expected,) = lines(directory)
    assert numbers(explained(directory, n=6)) == pytest.approx(numbers(expected), abs=1e-4)


def test_a_class_without_maps_is_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Unexplained", Unexplained, raising=False)
    message = "Unexplained can't be explained: heatmaps need an attribute `featurizer` with `map_layer`"
    with pytest.raises(BadInput, match=message):
        run(tmp_path / "a", *DEBUG, "--algorithm", "Unexplained", "--explain", "6")
    assert not (tmp_path / "a" / "results.jsonl").exists()
    directory = run(tmp_path / "b", *DEBUG, "--algorithm", "Unexplained")
    with pytest.raises(BadInput, match=message):
        explain.main(["--model", str(directory)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0"], "--n 0: give 1 or more images"),
        (["--n", "-1"], "--n -1"),
        (["--n", "0", "--picture", "a.png", "--per_image", "a.csv"], "--per_image writes what was measured"),
        (["--batch_size", "65"], "--batch_size 65: give 1 to 64"),
        (["--envs", "7"], "--envs 7 --splits in: this run has the splits env0 in, env1 in"),
        (["--splits", "uda"], "--envs 0 --splits uda: this run has the splits"),
    ],
)
def test_bad_input(trained: dict[str, Path], flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        explain.main(["--model", str(trained["ERM"]), *flags])


def test_negative_numbers_of_images_are_refused_by_train(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--explain -1: must not be negative"):
        run(tmp_path, *DEBUG, "--explain", "-1")


class TestPicture:
    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_of_several_models(self, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[Any] = []
        grid = explain.figures.explanation_grid
        monkeypatch.setattr(explain.figures, "explanation_grid", lambda *args: drawn.append(args) or grid(*args))
        path = tmp_path / "picture.png"
        models = [str(directory) for directory in runs.values()]
        explain.main(["--model", *models, "--n", "0", "--picture", str(path), "--images", "5"])
        assert path.read_bytes().startswith(b"\x89PNG")
        ((images, titles, rows, across),) = drawn
        assert across
        assert len(images) == len(titles) == 5
        assert [row.title.replace("\n", ": ") for row in rows] == [
            "ERM: grad_cam", "EX2L_MAE: label network", "EX2L_MAE: confounder network", "true mask",
        ]  # fmt: skip
        assert [row.overlaid for row in rows] == [True, True, True, False]
        right = [title.split(", ")[0] == caption for title, caption in zip(titles, rows[0].captions, strict=True)]
        assert rows[0].correct.tolist() == right
        assert len(lines(runs["ERM"])) == 1  # nothing was measured

    def test_of_runs_on_other_images(self, trained: dict[str, Path], tmp_path: Path) -> None:
        other = run(tmp_path / "other", *DIGITS, "--trial_seed", "1")
        with pytest.raises(BadInput, match=r"differ in trial_seed: 0 and 1; draw them one by one"):
            explain.main(["--model", str(trained["ERM"]), str(other), "--picture", str(tmp_path / "a.png")])

    def test_of_a_dataset_that_each_seed_draws_anew(self, tmp_path: Path) -> None:
        models = [str(run(tmp_path / seed, *DEBUG, "--seed", seed)) for seed in "01"]
        with pytest.raises(BadInput, match="see different images"):
            explain.main(["--model", *models, "--n", "0", "--picture", str(tmp_path / "a.png")])


def test_a_picture_without_matplotlib_names_the_extra(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'domainbed-ex2l\[report\]'"):
        explain.main(["--model", str(trained["ERM"]), "--picture", "a.png"])


def jobs(*words: str) -> list[Job]:
    given = ["launch", "--datasets", "DigitsO2O", "--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "1",
             "--output_dir", "out", "--command_launcher", "dummy", *words]  # fmt: skip
    return sweep.sweep_jobs(sweep.parse(given))


def test_a_sweep_passes_it_on_and_jobs_without_it_stay_what_they_were(tmp_path: Path) -> None:
    (plain,), (asked,) = jobs(), jobs("--explain", "64", "--mask_dir", "my masks")
    assert not {"explain", "mask_dir"} & plain.train_args.keys()
    assert "--explain 64 " in asked.command_str
    assert "--mask_dir 'my masks' " in asked.command_str
    assert plain.train_args["seed"] == asked.train_args["seed"]
    assert {"explain", "mask_dir"} <= set(EXTRAS)
    file = tmp_path / "sweep.toml"
    file.write_text("explain = 64\nmask_dir = 'my masks'\n")
    args = sweep.parse(["launch", str(file), "--datasets", "DigitsO2O", "--algorithms", "ERM", "--n_trials", "1",
                        "--n_hparams", "1", "--output_dir", "out", "--command_launcher", "dummy"])  # fmt: skip
    assert [job.train_args for job in sweep.sweep_jobs(args)] == [asked.train_args]


def test_explaining_makes_no_other_row() -> None:
    args = {"algorithm": "ERM", "dataset": "DigitsO2O"}
    assert Row.of(args | {"explain": 64}) == Row.of(args | {"explain": 0}) == Row.of(args)
    assert Row.of(args | {"mask_dir": None}) == Row.of(args) != Row.of(args | {"mask_dir": "masks"})

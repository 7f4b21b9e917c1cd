"""A saved run predicts what it predicted in training, whatever form the images are given in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed import attribution, datasets, hparams_registry, predictors, records, training
from domainbed.algorithms import ERM
from domainbed.algorithms.base import Task
from domainbed.predictors import Input, Predictor
from domainbed.scripts import train, train_building
from domainbed.scripts.train_arguments import completed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "erm"
    flags = ["--dataset", "DigitsM2M", "--algorithm", "ERM", "--steps", "10", "--checkpoint_freq", "9"]
    flags += ["--eval_splits", "selection", "--keep_best", "aa_wga"]
    assert train.main([*flags, "--output_dir", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return predictors.load(run / "model.pkl")


@pytest.fixture(scope="module")
def tested(predictor: Predictor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of the run's test environment, in-split."""
    hparams = hparams_registry.default_hparams("ERM", "DigitsM2M")
    _, splits = train_building.build_data(completed(predictor.args), hparams)
    (split,) = [split for split in splits if (split.env, split.kind) == (0, "in")]
    return split.environment[torch.from_numpy(split.keys)]


def save(folder: Path, x: torch.Tensor) -> list[Path]:
    """The images as PNG files, in folders of two."""
    paths = [folder / str(i // 2) / f"{i}.png" for i in range(len(x))]
    for path, image in zip(paths, x, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    return paths


def model(folder: Path, dataset: str, shape: tuple[int, int, int], classes: int, **more: Any) -> Path:
    """An untrained model."""
    task = Task(shape, classes, 2)
    hparams = hparams_registry.default_hparams("ERM", dataset)
    algorithm = ERM.from_task(task, hparams)
    args = {"algorithm": "ERM", "dataset": dataset}
    training.save_model(folder / "model.pkl", algorithm, task, hparams, args, **more)
    return folder / "model.pkl"


def test_predictions_repeat_the_runs_own_accuracy(run: Path, predictor: Predictor, tested: Any) -> None:
    x, y = tested
    found = predictor.predict(x, batch_size=100)
    last = records.read(run / "results.jsonl")[0][-1]
    assert np.mean(found.labels == y.numpy()) == pytest.approx(last["env0_in_acc"], abs=0.002)
    assert found.probabilities.shape == (len(x), 4)
    assert found.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert (found.probabilities.argmax(1) == found.labels).all()
    assert found.names == [("0", "1", "4", "6")[label] for label in found.labels]
    assert found.files[:2] == ["0", "1"]


def test_every_form_of_the_same_images_gives_the_same(predictor: Predictor, tested: Any, tmp_path: Path) -> None:
    x = tested[0][:300:50]
    paths = save(tmp_path, x)
    expected = predictor.predict(x).probabilities
    pictures = [Image.open(path) for path in paths]
    forms = [paths, tmp_path, list(map(str, paths)), pictures, [*paths[:3], *pictures[3:]]]
    for form in [*forms, (x * 255).round().byte()]:
        assert np.array_equal(predictor.predict(form, batch_size=6).probabilities, expected)
    assert np.allclose(predictor.predict(paths, batch_size=4).probabilities, expected, atol=1e-6)
    assert predictor.predict(paths[0]).files == [str(paths[0])]
    assert predictor.predict([tmp_path, paths[0]]).files == [*map(str, paths), str(paths[0])]


def test_a_table_of_predictions(predictor: Predictor, tested: Any) -> None:
    found = predictor.predict(tested[0][:3])
    table = found.to_frame()
    assert list(table.columns) == ["file", "label", "name", "p(0)", "p(1)", "p(4)", "p(6)"]
    assert np.allclose(table.iloc[:, 3:].to_numpy(float), found.probabilities)
    assert list(table["name"]) == found.names


def test_heatmaps_are_the_explainers_enlarged(predictor: Predictor, tested: Any) -> None:
    x = tested[0][:5]
    heatmaps = predictor.explain(x, batch_size=2)
    assert heatmaps.shape == (5, 36, 36)
    _, small = predictor.explainer("grad_cam").heatmaps(x)
    for heatmap, own in zip(heatmaps, small.numpy(), strict=True):
        enlarged = np.asarray(Image.fromarray(own).resize((36, 36), Image.Resampling.BILINEAR))
        assert np.allclose(heatmap, enlarged / enlarged.max() if own.any() else 0, atol=1e-4)
    with pytest.raises(NotImplementedError, match="attribution method not found: gradcam; did you mean grad_cam"):
        predictor.explain(x, "gradcam")


def test_a_figure_that_notebooks_show(predictor: Predictor, tested: Any) -> None:
    x, y = tested
    figure = predictor.show(x[:3], labels=y[:3].tolist())
    assert [ax.get_title() for ax in figure.axes[:3]] == [predictor.class_names[k] for k in y[:3]]
    captions = [ax.get_xlabel() for ax in figure.axes[3:]]
    for caption, name in zip(captions, predictor.predict(x[:3]).names, strict=True):
        assert f"{name}, " in caption
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(predictor.show(x, n=2).axes) == 4


@pytest.mark.parametrize("device", ["meta", "banana", "cuda:99"])
def test_a_device_that_can_not_be_used_is_explained(run: Path, device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device {device} can't be used here \(.+\); take cpu$"):
        predictors.load(run, device)
    with pytest.raises(FileNotFoundError, match="no such run"):
        predictors.load(run / "nowhere", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be used")
def test_a_gpu_where_there_is_none(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^device cuda can't be used here \(.+\); take cpu$"):
        predictors.load(run, device="cuda")


def test_it_says_which_model_it_is(run: Path) -> None:
    best, last = predictors.load(run), predictors.load(run / "model.pkl")
    assert best.step == torch.load(run / "model_best.pkl", weights_only=True)["step"]
    assert f"model_best.pkl, of step {best.step}, best (AA + WGA) / 2 on validation; 4 classes" in repr(best)
    assert "model.pkl, of step 9, not chosen" in repr(last)


def test_files_are_opened_as_the_dataset_evaluates_them(tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(0), ["path,label,split"]
    for i, (mode, size) in enumerate([("RGB", (50, 31)), ("L", (16, 16)), ("RGB", (9, 40)), ("RGBA", (20, 20))]):
        shape = (*size, len(mode)) if len(mode) > 1 else size
        suffix = "jpg" if i == 0 else "png"
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8), mode).save(tmp_path / f"{i}.{suffix}")
        lines.append(f"{i}.{suffix},{'ab'[i % 2]},{'train' if i < 2 else 'test'}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    csv = str(tmp_path / "set.csv")
    dataset = datasets.get_dataset_class(csv)(None, [1], {"image_size": 16})
    own = Input.of(csv, dataset.input_shape)
    pixels, troubles = own.read(sorted(tmp_path.glob("*.[jp][pn]g")))
    assert not troubles
    images = [environment[key][0] for environment in dataset for key in range(len(environment))]
    assert torch.equal(own.finish(torch.stack(list(pixels.values()))), torch.stack(images))


@pytest.mark.parametrize("name", ["DigitsSubpop", "ColoredDigits"])
def test_embedded_images_come_back_from_files(tmp_path: Path, name: str) -> None:
    cls = datasets.get_dataset_class(name)
    dataset = cls(None, [2], {})
    x, _ = dataset[0][:4]
    colours = torch.cat([x, torch.zeros(4, 3 - x.shape[1], *x.shape[2:])], 1)  # two channels are red and green
    pixels, _ = (own := Input.of(name, dataset.input_shape)).read(save(tmp_path, colours))
    assert torch.equal(own.finish(torch.stack(list(pixels.values()))), x)


def test_one_channel_is_grey_and_vectors_are_refused() -> None:
    grey = Image.new("RGB", (3, 5), (9, 9, 9))
    own = Input.of("RotatedMNIST", (1, 28, 28))
    assert torch.equal(own.pixels(grey), torch.full((1, 28, 28), 9, dtype=torch.uint8))
    assert own.finish(own.pixels(grey)[None]).max() == pytest.approx(9 / 255)
    with pytest.raises(ValueError, match=r"1 to 3 channels.*\(7,\)"):
        Input.of("RotatedMNIST", (7,))


def test_what_can_not_be_predicted_is_explained(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images \(2, 3, 28, 28\) do not fit.*\(B, \*\(3, 36, 36\)\)"):
        predictor.predict(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match="no images; give a folder"):
        predictor.predict([])
    with pytest.raises(ValueError, match="holds no images"):
        predictor.predict(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        predictor.predict(tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"not Tensor; torch.stack"):
        predictor.predict([torch.zeros(3, 36, 36)])
    (tmp_path / "bad.jpg").write_text("no image")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.jpg")
    with pytest.raises(ValueError, match=r"1 images can't be used.*\n.*bad.jpg: not an image"):
        predictor.predict(tmp_path)


def test_classes_without_names_have_numbers(tmp_path: Path) -> None:
    path = model(tmp_path, "Debug28", (3, 28, 28), 2)
    assert predictors.load(path).class_names == ["y=0", "y=1"]
    assert predictors.load(path, class_names=["cat", "dog"]).class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="class_names has 1 names, and the model 2 classes"):
        predictors.load(path, class_names=["cat"])


ROWS = [f"{i}.png,{'cat' if i % 2 else 'dog'},{'train' if i < 8 else 'test'}" for i in range(12)]


def test_a_run_predicts_where_its_dataset_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, torch.rand(12, 3, 20, 20))
    for path in tmp_path.glob("*/*.png"):
        path.rename(tmp_path / path.name)
    Path("pets.csv").write_text("\n".join(["path,label,split", *ROWS]))
    flags = ["--dataset", "pets.csv", "--steps", "1", "--save_model_every_checkpoint", "--output_dir", "run"]
    hparams = {"backbone": "small_cnn", "batch_size": 2, "image_size": 16}
    assert train.main([*flags, "--hparams", records.dumps(hparams)]) == 0
    expected = predictors.load("run").predict("0.png").probabilities
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("model.pkl", "model_step0.pkl"):
        found = predictors.load(tmp_path / "run" / name)
        assert found.class_names == ["cat", "dog"]
        assert found.input == Input((3, 16, 16), normalised=True)
        assert np.array_equal(found.predict(tmp_path / "0.png").probabilities, expected)


def test_a_small_dataset_that_says_it_is_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pets(datasets.get_dataset_class("Debug28")):  # type: ignore[misc]
        NORMALISED, CLASSES = True, ("cat", "dog")

    flags = ["--dataset", "Pets", "--steps", "1", "--hparams", '{"batch_size": 2}']
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "Pets", Pets, raising=False)
        assert train.main([*flags, "--output_dir", str(tmp_path)]) == 0
    found = predictors.load(tmp_path)
    assert (found.class_names, found.input.normalised) == (["cat", "dog"], True)


@pytest.mark.parametrize(
    ("dataset", "advice"),
    [("Pets", r"not found: Pets.*\$DOMAINBED_PLUGINS"), ("no/pets.csv", "counts from where the run was started")],
)
def test_an_older_model_of_an_unknown_dataset_is_refused(tmp_path: Path, dataset: str, advice: str) -> None:
    path = model(tmp_path, "Debug28", (3, 28, 28), 2)
    content = torch.load(path, weights_only=True)
    content["args"]["dataset"] = dataset
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"how images of {dataset} are opened is not known here.*{advice}"):
        predictors.load(path, class_names=["cat", "dog"])


def test_what_a_model_says_comes_before_what_the_class_says(tmp_path: Path) -> None:
    path = model(tmp_path, "DigitsSubpop", (3, 36, 36), 2, class_names=["three", "eight"], normalised=True)
    found = predictors.load(path)
    assert (found.class_names, found.input.normalised) == (["three", "eight"], True)
    assert predictors.load(path, class_names=["a", "b"]).class_names == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_pixels_of_other_kinds_are_refused(predictor: Predictor, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"images of {dtype}; give uint8 pixels, or floats"):
        predictor.predict(torch.ones(2, 3, 36, 36, dtype=dtype))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"labels of shape \(2,\) and 3 images; give one label of each image"),
        ([[0], [1], [2]], r"labels of shape \(3, 1\) and 3 images"),
        ([0, 1, 4], "labels 0, 1, 4; give whole numbers of 0 to 3, one of each image"),
        ([-1, 1, 1], "labels -1, 1; give whole numbers"),
        ([0.5, 1, 1], "labels 0.5, 1.0; give whole numbers"),
        (["1", "4", "6"], "labels 1, 4, 6; give whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_explained(predictor: Predictor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor.show(torch.zeros(3, 3, 36, 36), labels=labels, n=2)


def test_what_is_no_image_and_no_number_of_images(predictor: Predictor) -> None:
    x = torch.zeros(3, 3, 36, 36)
    for given in (x.numpy(), x.numpy()[0, 0, 0, 0], [x.numpy()[0]]):
        with pytest.raises(TypeError, match=r"path or a picture of PIL, not (ndarray|float32); .*from_numpy one of an"):
            predictor.predict(given)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}: give 1 or more"):
            predictor.predict(x, batch_size=size)
        with pytest.raises(ValueError, match=f"n={size}: give 1 or more"):
            predictor.show(x, n=size)


def test_a_single_logit_is_a_score_with_threshold_0(tmp_path: Path) -> None:
    predictor = predictors.load(model(tmp_path, "Debug28", (3, 28, 28), 2))
    predictor.algorithm.predict = lambda x: x[:, :1, 0, 0]
    x = torch.zeros(3, 3, 28, 28)
    x[:, 0, 0, 0] = torch.tensor([-1.0, 0.5, 3.0])
    found = predictor.predict(x)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.probabilities[:, 1] == pytest.approx(1 / (1 + np.exp([1.0, -0.5, -3.0])), abs=1e-6)


def test_a_model_of_domainbed_itself_predicts(tmp_path: Path) -> None:
    path = model(tmp_path, "DigitsM2M", (3, 36, 36), 4)
    x = torch.rand(2, 3, 36, 36)
    expected = predictors.load(path).predict(x).probabilities
    content = torch.load(path, weights_only=True)
    del content["task"]
    torch.save(content, path)
    predictor = predictors.load(path)
    assert np.array_equal(predictor.predict(x).probabilities, expected)
    assert predictor.step == -1
    assert "of an unknown step" in repr(predictor)


def test_every_method_of_attribution(predictor: Predictor, tested: tuple[torch.Tensor, torch.Tensor]) -> None:
    for method in [*attribution.METHODS, *attribution.EVALUATION_METHODS]:
        heatmaps = predictor.explain(tested[0][:3], method)
        assert heatmaps.max(axis=(1, 2)) == pytest.approx(np.ones(3)), method
